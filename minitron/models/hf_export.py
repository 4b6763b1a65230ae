"""Export: a checkpoint folder -> a Hugging Face folder, streamed shard by shard."""

import json
import shutil
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from minitron.checkpoint.folder import read_model_config, side_dir, weights_dir
from minitron.checkpoint.format import disk_errors
from minitron.checkpoint.store import CheckpointReader
from minitron.config.model import ModelConfig
from minitron.errors import ArtefactError, CheckpointError
from minitron.models.axes import Dim, ParamAxes, global_shape, layer_shape, params_of, part_rows
from minitron.models.hf_config import read_json, to_hf_config
from minitron.models.hf_names import HfTensor, hf_tensors
from minitron.models.hf_source import INDEX_FILE, SINGLE_FILE

Progress = Callable[[int, int], None]


def export_model(
    folder: Path,
    out: Path,
    *,
    dtype: torch.dtype,
    max_shard_bytes: float = 5e9,
    card: str | None = None,
    on_progress: Progress | None = None,
) -> None:
    """Write a checkpoint folder as a Hugging Face model folder.

    One shard is held at a time. Vocabulary rows that tensor parallelism added as padding are left out.

    Args:
        folder: Checkpoint folder.
        out: Folder to make; must hold no weights yet.
        dtype: Element type of the weights.
        max_shard_bytes: A file is closed before it would be larger; a tensor is never split.
        card: README.md (`minitron.models.model_card`).
        on_progress: Called after each file with tensors done and tensors in all.

    Raises:
        CheckpointError: ``folder`` is incomplete, or its tensors are not those of its ``model.json``.
        ModelError: transformers could not load the model.
        ArtefactError: ``out`` cannot be written, or holds weights already.
    """
    model = read_model_config(folder)
    source = side_dir(folder)
    config = to_hf_config(model, read_json(source / "config.json"))
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(dtype).removeprefix("torch.")
    reader = CheckpointReader(weights_dir(folder))
    _check_tensors(folder, reader, model)
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        if any(out.glob("*.safetensors")):
            raise ArtefactError(f"{out} holds weights already; remove it or export elsewhere")
        shutil.copytree(source, out, dirs_exist_ok=True)
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if card is not None:
            (out / "README.md").write_text(card, encoding="utf-8")
    shards = _plan_shards(hf_tensors(model), dtype, max_shard_bytes)
    _write_index(out, shards, dtype)
    done = 0
    for name, tensors in shards.items():
        _write_shard(out / name, tensors, reader, model, dtype)
        done += len(tensors)
        if on_progress is not None:
            on_progress(done, sum(map(len, shards.values())))


def hf_logits(folder: Path, tokens_BS: Tensor) -> Tensor:
    """Logits of a Hugging Face model folder, computed by transformers in fp32 on the CPU.

    Args:
        folder: The model folder.
        tokens_BS: Token ids.

    Returns:
        logits_BSV.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        experts_implementation="eager",  # transformers' grouped product wants rows of 16 bytes
        local_files_only=True,
        trust_remote_code=False,
    )
    with torch.no_grad():
        logits_BSV: Tensor = model.eval()(tokens_BS).logits
    return logits_BSV


def _check_tensors(folder: Path, reader: CheckpointReader, model: ModelConfig) -> None:
    """The checkpoint holds the model's tensors, and no other."""
    expected = {param.key: param for param in params_of(model)}
    extra = sorted(reader.tensors.keys() - expected.keys())
    missing = sorted(expected.keys() - reader.tensors.keys())
    if extra or missing:
        raise CheckpointError(
            f"{folder} does not hold the tensors of its model.json: missing {missing[:3]}, not known {extra[:3]}"
        )
    for key, param in expected.items():
        want, have = global_shape(param, model), reader.tensors[key].shape
        padded = param.dims[0] is Dim.vocab and have[0] >= want[0] and have[1:] == want[1:]
        if have != want and not padded:
            raise CheckpointError(f"{folder}: {key} has shape {have}, but model.json needs {want}")


def _plan_shards(tensors: Sequence[HfTensor], dtype: torch.dtype, max_shard_bytes: float) -> dict[str, list[HfTensor]]:
    """Names of the files, and the tensors of each in order."""
    shards: list[list[HfTensor]] = [[]]
    size = 0
    for tensor in tensors:
        num_bytes = prod(tensor.shape) * dtype.itemsize
        if shards[-1] and size + num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += num_bytes
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    return {f"model-{n:05d}-of-{len(shards):05d}.safetensors": shard for n, shard in enumerate(shards, start=1)}


def _write_index(out: Path, shards: dict[str, list[HfTensor]], dtype: torch.dtype) -> None:
    if len(shards) == 1:
        return
    tensors = [tensor for shard in shards.values() for tensor in shard]
    total = sum(prod(tensor.shape) for tensor in tensors)
    index = {
        "metadata": {"total_parameters": total, "total_size": total * dtype.itemsize},
        "weight_map": {tensor.name: name for name, shard in shards.items() for tensor in shard},
    }
    with disk_errors(out):
        (out / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _write_shard(
    file: Path,
    tensors: Sequence[HfTensor],
    reader: CheckpointReader,
    model: ModelConfig,
    dtype: torch.dtype,
) -> None:
    held: dict[str, Tensor] = {}
    block: tuple[ParamAxes, tuple[int, ...]] | None = None
    canonical = torch.empty(0)
    for tensor in tensors:
        if block != (tensor.param, tensor.index):  # the parts of one parameter follow each other
            block = (tensor.param, tensor.index)
            canonical = _read_block(reader, tensor, model)
        rows = torch.from_numpy(part_rows(tensor.param.dims[0], tensor.part, model))
        part = canonical if len(tensor.param.hf) == 1 else canonical[rows]
        held[tensor.name] = part.to(dtype).contiguous()
    try:
        with disk_errors(file):
            save_file(held, file, metadata={"format": "pt"})
            # safetensors makes its files for the owner alone; the others in the folder are not.
            file.chmod((file.parent / "config.json").stat().st_mode)
    except SafetensorError as error:  # what a full disk looks like through safetensors
        raise ArtefactError(f"cannot write {file}: {error}") from error


def _read_block(reader: CheckpointReader, tensor: HfTensor, model: ModelConfig) -> Tensor:
    """One layer (and expert) of a parameter, or a whole one that is not stacked, without vocabulary padding."""
    shape = layer_shape(tensor.param, model)
    offsets = [*tensor.index, *[0] * len(shape)]
    return reader.read(tensor.param.key, offsets, [*[1] * len(tensor.index), *shape]).reshape(shape)
