"""Share of a step that is no computing: data, metrics, checkpoints: ``python -m tests.bench.overhead``.

The demo's distillation (its shapes, bf16, 8 micro-batches of 256 tokens, two pipeline stages of one thread) runs
through the training loop itself on a data folder of random tokens, logging every step. Timed where the loop calls them:
reading the step's data; reducing and writing its metrics and bar; saving a checkpoint to resume from. Ranks meet before
each of them, so that waiting for the other stage's computing is not counted.

A checkpoint's share depends on how often one is written: it is given for the demo's interval of 15 steps and for the
default of 100.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from rich.console import Console
from rich.table import Table

import minitron.train.loop
from minitron.config.run import TrackingConfig
from minitron.config.train import TrainConfig
from minitron.data.loader import TrainBatches
from minitron.data.summary import DatasetSummary, Split, SplitSummary, save_summary
from minitron.runtime.progress import StageProgress
from minitron.runtime.tracking import MetricsWriter
from minitron.train.heldout import HeldoutLoss
from minitron.train.loop import TrainJob, train
from tests.helpers.bench import run_ranks
from tests.helpers.demo_models import SEQ_LENGTH, TEACHER, demo

NUM_STAGES, NUM_MICROBATCHES = 2, 8
INTERVALS = (15, 100)


def write_data(folder: Path, num_tokens: int) -> None:
    """A data folder of random tokens, as `minitron data` leaves it."""
    dtype = DType.optimal_dtype(TEACHER.vocab_size)
    random = np.random.default_rng(0)
    facts: dict[str, Any] = {"eos_id": 0, "vocab_size": TEACHER.vocab_size, "dtype": np.dtype(dtype).name}
    for split in Split:
        builder = IndexedDatasetBuilder(str(folder / f"{split}.bin"), dtype=dtype)
        for _ in range(num_tokens // 1000):
            builder.add_document(random.integers(TEACHER.vocab_size, size=1000).astype(dtype), [1000])
        builder.finalize(str(folder / f"{split}.idx"))
        facts[str(split)] = SplitSummary(num_documents=num_tokens // 1000, num_tokens=num_tokens, num_bytes=num_tokens)
    facts |= {"tokenizer_sha256": "", "source_fingerprint": "", "train_sha256": "", "heldout_fraction": 0.1}
    save_summary(folder, DatasetSummary(**facts))


class Clock:
    """Seconds of each call, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def timed(self, name: str, call: Callable[..., Any], *, meet: bool = True) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if meet:
                torch.distributed.barrier()
            start = time.perf_counter()
            result = call(*args, **kwargs)
            self.seconds.setdefault(name, []).append(time.perf_counter() - start)
            return result

        return run


def loop_parts(folder: Path, num_steps: int) -> dict[str, list[float]]:
    """Runs on every rank: the loop's parts, in seconds a call."""
    settings = TrainConfig(
        num_tokens=num_steps * NUM_MICROBATCHES * SEQ_LENGTH,
        global_batch_size=NUM_MICROBATCHES,
        log_interval_steps=1,
        eval_interval_steps=0,
        save_interval_steps=2,
    )
    clock = Clock()
    loop: Any = minitron.train.loop  # whose names are replaced
    with (
        demo(NUM_STAGES, settings) as models,
        StageProgress("overhead", enabled=models.groups.world_rank == 0, console=Console(stderr=True)) as progress,
    ):
        batches = TrainBatches(
            folder,
            seq_length=SEQ_LENGTH,
            micro_batch_size=1,
            global_batch_size=NUM_MICROBATCHES,
            dp_rank=0,
            dp_size=1,
            seed=1,
            num_steps=num_steps,
        )
        metrics = MetricsWriter(
            folder, TrackingConfig(), run_name="", config={}, first_step=1, enabled=models.groups.world_rank == 0
        )
        batches.microbatches = clock.timed("data", batches.microbatches)  # type: ignore[method-assign]
        metrics.write = clock.timed("metrics", metrics.write, meet=False)  # type: ignore[method-assign]
        progress.update = clock.timed("metrics", progress.update, meet=False)  # type: ignore[method-assign]
        loop.mean_terms = clock.timed("metrics", loop.mean_terms)
        loop.save_state = clock.timed("checkpoint", loop.save_state)
        loop.train_step = clock.timed("step", loop.train_step)
        train(
            TrainJob(
                trainable=models.student,
                objective=models.distillation,
                batches=batches,
                validate=lambda: HeldoutLoss(0.0, 0),
                train=settings,
                seq_length=SEQ_LENGTH,
                group_size=0,
                states=folder / "states",
                open_metrics=lambda first_step: metrics,
                progress=progress,
                groups=models.groups,
                device=torch.device("cpu"),
            )
        )
    return clock.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder), 2_000_000)
        ranks = run_ranks(loop_parts, NUM_STAGES, 1, Path(folder), args.steps)
    # A step is over when its slower rank is. The first one warms up.
    step = statistics.median(max(times) for times in list(zip(*(rank["step"] for rank in ranks), strict=True))[1:])
    data, metrics, checkpoint = (
        max(_a_step(rank, name) for rank in ranks) for name in ("data", "metrics", "checkpoint")
    )
    table = Table(title=f"demo's distillation at PP{NUM_STAGES}: step {step:.2f} s, one checkpoint {checkpoint:.2f} s")
    table.add_column("checkpoint every")
    for heading in ("data", "metrics", "checkpoints", "together"):
        table.add_column(heading, justify="right")
    for interval in INTERVALS:
        shares = [data / step, metrics / step, checkpoint / interval / step]
        table.add_row(f"{interval} steps", *(f"{100 * share:.3f} %" for share in (*shares, sum(shares))))
    Console(width=120).print(table)


def _a_step(rank: dict[str, list[float]], name: str) -> float:
    """Median over the steps; metrics are three calls a step, a checkpoint's figure is that of one."""
    times = rank[name]
    if name == "metrics":
        calls = len(times) // len(rank["step"])
        times = [sum(times[first : first + calls]) for first in range(0, len(times), calls)]
    return statistics.median(times[1:] or times)


if __name__ == "__main__":
    main()
