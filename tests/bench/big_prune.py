"""Import and pruning of a large random model: memory of each process, and speed next to a plain file copy.

    python -m tests.bench.big_prune                 # a 64th of Llama-3.1-8B, in seconds
    python -m tests.bench.big_prune --scale 1       # all of it: 16 GB, and as much again while it is imported

A Hugging Face folder of bf16 noise in Llama-3.1-8B's shape is imported, and the checkpoint pruned to the shapes of
Llama-3.1-Minitron-4B-Width and -Depth by 1, 2 and 4 processes. Every result is read back and hashed, tensor by tensor.

The copy reads and writes as many bytes, in one process, 16 MB at a time. Both start without the source in the page
cache, and both end when the result is on the disk. Memory of the process that has most: anonymous memory (RssAnon,
looked at every few milliseconds), which is what the work allocates, and the kernel's peak of all resident memory
(VmHWM), in which pages of libraries and of mapped files count; before is RssAnon when the imports are done.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minitron.checkpoint.folder import weights_dir, write_model_config
from minitron.checkpoint.store import CheckpointReader, CheckpointWriter
from minitron.config.model import Architecture, ModelConfig
from minitron.config.prune import PruneConfig, Ranking
from minitron.config.run import RandomModelConfig
from minitron.models.axes import global_shape, layer_shape, num_parameters
from minitron.models.hf_config import to_hf_config
from minitron.models.hf_import import import_model
from minitron.models.hf_names import HfTensor, blocks, hf_tensors
from minitron.models.hf_source import INDEX_FILE, SINGLE_FILE
from minitron.models.random_source import write_random_model
from minitron.prune.ranking import choose
from minitron.prune.slicer import apply_spec
from minitron.prune.spec import PruneSpec
from tests.helpers.bench import run_ranks

GB = 1e9
BLOCK_BYTES = 16 * 2**20
SHARD_BYTES = 4e9
STEPS = ("import", "width", "depth")


def llama31_8b(scale: float) -> ModelConfig:
    """Llama-3.1-8B with hidden size, neurons, heads and vocabulary times ``scale``; all layers stay."""
    return ModelConfig(
        architecture=Architecture.llama,
        num_layers=32,
        hidden_size=round(4096 * scale),
        ffn_hidden_size=round(14336 * scale),
        num_attention_heads=round(32 * scale),
        num_query_groups=max(1, round(8 * scale)),
        kv_channels=128,
        vocab_size=max(512, round(128256 * scale)),
        max_position_embeddings=8192,
        layernorm_epsilon=1e-5,
        rotary_base=500000.0,
    )


def target(model: ModelConfig, step: str, scale: float) -> PruneSpec:
    """The shapes of ``conf/prune/llama31_8b_to_4b_*``; units chosen at random, as scattered as scores leave them."""
    if step == "width":
        sizes = PruneConfig(
            ranking=Ranking.random, hidden_size=round(3072 * scale), ffn_hidden_size=round(9216 * scale)
        )
    else:
        sizes = PruneConfig(ranking=Ranking.random, drop_layers=list(range(15, 31)))
    return choose(model, sizes, scores=None, source_id="noise")


@dataclass(frozen=True)
class Usage:
    """Of the process that has most, in bytes; seconds from start to end of the work."""

    seconds: float
    before: int
    anonymous: int
    resident: int


def status(name: str) -> int:
    """An entry of this process's ``/proc/self/status``, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


@contextmanager
def watching() -> Iterator[Callable[[], int]]:
    """Watch this process's anonymous memory; what it gives is the most there was so far."""
    most, stop = status("RssAnon"), threading.Event()

    def look() -> None:
        nonlocal most
        while not stop.wait(0.004):
            most = max(most, status("RssAnon"))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield lambda: most
    finally:
        stop.set()
        thread.join()


def on_rank(work: Callable[..., Any], *args: Any) -> Usage:
    """Runs on every rank."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's peak starts anew
    before = status("RssAnon")
    torch.distributed.barrier()
    with watching() as most:
        start = time.perf_counter()
        work(*args, rank=rank, world_size=size, group=torch.distributed.group.WORLD)
        seconds = time.perf_counter() - start
    return Usage(seconds, before, most(), status("VmHWM"))


def slice_checkpoint(spec: PruneSpec, source: Path, out: Path, **ranks: Any) -> None:
    apply_spec(spec, source=source, out=out, **ranks)


def measure(num_ranks: int, work: Callable[..., Any], *args: Any) -> Usage:
    threads = max(1, (os.cpu_count() or 1) // num_ranks)
    ranks = run_ranks(on_rank, num_ranks, threads, work, *args)
    return Usage(*(max(getattr(usage, name) for usage in ranks) for name in Usage.__annotations__))


def copy_seconds(files: Sequence[Path], out: Path, num_read: int, num_written: int) -> float:
    """Time to read so many bytes of the files and to write so many (no more than that) to one."""
    start = time.perf_counter()
    buffer = memoryview(bytearray(BLOCK_BYTES))
    done = 0
    with out.open("wb", buffering=0) as target_file:
        for file in files:
            with file.open("rb", buffering=0) as source_file:
                while done < num_read and (count := source_file.readinto(buffer)):
                    done += count
                    target_file.write(buffer[: round(count * num_written / num_read)])
        os.fsync(target_file.fileno())
    seconds = time.perf_counter() - start
    out.unlink()
    return seconds


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def content(folder: Path) -> str:
    """Hash of every tensor's content by key, whatever boxes and files hold it."""
    reader = CheckpointReader(weights_dir(folder))
    total = hashlib.sha256()
    for key, info in sorted(reader.tensors.items()):
        total.update(f"{key} {info}".encode())
        row = prod(info.shape[1:]) * info.dtype.itemsize
        step = max(1, 4 * BLOCK_BYTES // row)
        for first in range(0, info.shape[0], step):
            lengths = (min(step, info.shape[0] - first), *info.shape[1:])
            tensor = reader.read(key, (first, *[0] * (len(info.shape) - 1)), lengths)
            total.update(tensor.view(torch.uint8).numpy())
    return total.hexdigest()


def write_noise(model: ModelConfig, folder: Path) -> None:
    """A Hugging Face folder of random bf16 numbers below 2 in size, with a byte tokenizer."""
    write_random_model(RandomModelConfig(), folder)
    (folder / SINGLE_FILE).unlink()
    base = {"bos_token_id": 0, "eos_token_id": 0, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(to_hf_config(model, base)))
    shards: list[list[HfTensor]] = [[]]
    for tensor in hf_tensors(model):
        if sum(num_bytes(other) for other in shards[-1]) + num_bytes(tensor) > SHARD_BYTES:
            shards.append([])
        shards[-1].append(tensor)
    names = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    rng = np.random.Generator(np.random.SFC64(0))
    for name, shard in zip(names, shards, strict=True):
        write_shard(folder / name, shard, rng)


def num_bytes(tensor: HfTensor) -> int:
    return 2 * prod(tensor.shape)


def write_shard(file: Path, tensors: Sequence[HfTensor], rng: np.random.Generator) -> None:
    header, end = {}, 0
    for tensor in tensors:
        start, end = end, end + num_bytes(tensor)
        header[tensor.name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for first in range(0, end, BLOCK_BYTES):
            size = min(BLOCK_BYTES, end - first)
            stream.write(memoryview(rng.integers(2**16, size=size // 2, dtype=np.uint16) & 0xBFFF).cast("B"))


COLUMNS = (
    *("step", "processes", "s", "copy, s", "share of copy", "GB/s written"),
    *("before, GB", "anonymous, GB", "resident, GB", "content"),
)


def say(cells: Sequence[str]) -> None:
    """One line of the table, as soon as it is known."""
    line = "  ".join(f"{cell:>{len(heading)}}" for cell, heading in zip(cells, COLUMNS, strict=True))
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def write_source(model: ModelConfig, folder: Path) -> None:
    """The checkpoint without the folder it would be imported from, where the disk does not hold both."""
    write_random_model(RandomModelConfig(), folder / "hf")
    (folder / "hf" / SINGLE_FILE).unlink()
    write_model_config(folder, model)
    writer = CheckpointWriter(weights_dir(folder))
    rng = np.random.Generator(np.random.SFC64(0))
    for param, index in blocks(model):
        shape = global_shape(param, model)
        box = (*[1] * len(index), *layer_shape(param, model))
        numbers = rng.integers(2**16, size=box, dtype=np.uint16) & 0xBFFF
        tensor = torch.from_numpy(numbers).view(torch.bfloat16)
        writer.write(param.key, tensor, global_shape=shape, offsets=(*index, *[0] * (len(shape) - len(index))))
    writer.finish()


def row(step: str, num_ranks: int, num_written: int, usage: Usage, copied: float, digest: str) -> list[str]:
    memory = (f"{size / GB:.2f}" for size in (usage.before, usage.anonymous, usage.resident))
    times = (f"{usage.seconds:.1f}", f"{copied:.1f}", f"{copied / usage.seconds:.0%}")
    return [step, str(num_ranks), *times, f"{num_written / GB / usage.seconds:.2f}", *memory, digest[:12]]


def run(step: str, num_ranks: int, scale: float, folder: Path) -> list[str]:
    """One line of the table; the result is removed again, and what it was made from once it is not needed."""
    hf, source, out = folder / "hf", folder / "source", folder / "out"
    work: Callable[..., object]
    args: tuple[object, ...]
    shutil.rmtree(out, ignore_errors=True)
    if step == "import":
        model = llama31_8b(scale)
        if not hf.exists():
            write_noise(model, hf)
        shutil.rmtree(source, ignore_errors=True)
        work, args, read_from, made = import_model, (hf, source), hf, source
        num_read = num_written = 2 * num_parameters(model)
    else:
        model = llama31_8b(scale)
        if not source.exists():
            write_source(model, source)
        spec = target(model, step, scale)
        work, args, read_from, made = slice_checkpoint, (spec, source, out), source, out
        num_read = 2 * num_parameters(replace(model, num_layers=spec.target.num_layers))
        num_written = 2 * num_parameters(spec.target)
    files = sorted(file for file in read_from.rglob("*") if file.stat().st_size > BLOCK_BYTES)
    forget(read_from)
    copied = copy_seconds(files, folder / "copy", num_read, num_written)
    forget(read_from)
    usage = measure(num_ranks, work, *args)
    forget(made)
    digest = content(made)
    shutil.rmtree(out, ignore_errors=True)
    return row(step, num_ranks, num_written, usage, copied, digest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=0.125, help="of the sizes of Llama-3.1-8B; 1 is all of it")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="processes that share the work")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-big-prune"), help="where the files go")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS, help="which to run, in order")
    parser.add_argument("--keep", action="store_true", help="leave the imported checkpoint for a later call's steps")
    args = parser.parse_args()
    say(COLUMNS)
    args.folder.mkdir(parents=True, exist_ok=True)
    try:
        for step in args.steps:
            for num_ranks in args.ranks:
                say(run(step, num_ranks, args.scale, args.folder))
            shutil.rmtree(args.folder / "hf", ignore_errors=True)
    finally:
        if not args.keep:
            shutil.rmtree(args.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
