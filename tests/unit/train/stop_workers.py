"""The training loop on ranks of which one is asked to stop. Imports no transformers: workers import this file."""

import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from minitron.config.parallel import ParallelConfig
from minitron.config.run import TrackingConfig
from minitron.data.batch import Batch
from minitron.errors import StoppedError
from minitron.runtime.progress import StageProgress
from minitron.runtime.signals import STOP_SIGNAL, hold_stop_signal, stop_agreement, stop_was_asked, work_of_one
from minitron.runtime.tracking import MetricsWriter, read_metrics
from minitron.train.heldout import HeldoutLoss
from minitron.train.loop import TrainJob, train
from minitron.train.objective import CrossEntropy
from tests.unit.train.workers import MODEL, SEQ_LENGTH, Waits, _Batches, _settings, _trainable


def stopped_loop(
    parallel: ParallelConfig, folder: Path, *, num_steps: int, asked_rank: int = -1, asked_step: int = 0
) -> tuple[list[dict[str, Any]], str]:
    """Run the loop with one rank sent the signal to stop before a step; its records, and what it stopped with."""
    settings = _settings(num_steps, parallel, log_interval_steps=1, save_interval_steps=0, eval_interval_steps=0)
    hold_stop_signal()
    stopped = ""
    with _trainable(parallel, settings) as (trainable, groups):
        cross_entropy = CrossEntropy(MODEL.vocab_size, groups, sequence_parallel=False)

        class Asking(_Batches):
            def microbatches(self, step: int) -> list[Batch]:
                if (groups.world_rank, step + 1) == (asked_rank, asked_step):
                    # To this thread: the pool's other threads were started before the signal was held back.
                    signal.pthread_kill(threading.get_ident(), STOP_SIGNAL)
                return super().microbatches(step)

        job = TrainJob(
            trainable=trainable,
            objective=cross_entropy,
            batches=Asking(num_steps, groups, Waits()),  # type: ignore[arg-type]
            validate=lambda: HeldoutLoss(0.0, 1),
            train=settings,
            seq_length=SEQ_LENGTH,
            group_size=0,
            states=folder / "states",
            open_metrics=lambda first: MetricsWriter(
                folder, TrackingConfig(), run_name="t", config={}, first_step=first, enabled=groups.world_rank == 0
            ),
            progress=StageProgress("t", enabled=False, console=Console()),
            groups=groups,
            device=torch.device("cpu"),
        )
        try:
            with stop_agreement() as stop_agreed:
                train(replace(job, stop_agreed=stop_agreed))
        except StoppedError as caught:
            stopped = str(caught)
        _forget_signal()
        torch.distributed.barrier()  # rank 0 has written its last record
    return read_metrics(folder), stopped


def _forget_signal() -> None:
    """The next call of this process is not asked."""
    if stop_was_asked():
        signal.sigwait({STOP_SIGNAL})


def stopped_work(*, asked_rank: int) -> str:
    """Rank 0 works alone until it hears that a rank was asked to stop; how it ended on this rank."""
    hold_stop_signal()
    rank = torch.distributed.get_rank()

    def work(should_stop: Callable[[], bool]) -> str:
        for number in range(1000):
            if should_stop():
                raise StoppedError("saved")
            if number == 3 and asked_rank == 0:
                signal.pthread_kill(threading.get_ident(), STOP_SIGNAL)
            time.sleep(0.02)
        return "finished"

    if rank == asked_rank == 1:
        signal.pthread_kill(threading.get_ident(), STOP_SIGNAL)
    try:
        told = work_of_one(work, is_main=rank == 0) or "waited"
    except StoppedError as stopped:
        told = f"stopped: {stopped}"
    _forget_signal()
    return told


def done_work() -> int | None:
    """Work that nobody stops, of rank 0."""
    return work_of_one(lambda should_stop: 7 + should_stop(), is_main=torch.distributed.get_rank() == 0)
