"""What the ranks of the tests of cached teachers run. Imports no transformers: workers import this file."""

import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rich.console import Console

from minitron.config.parallel import ParallelConfig
from minitron.config.run import Device, RunConfig
from minitron.distill import cache_write
from minitron.distill.cache_write import write_teacher_logits
from minitron.distill.run import distill
from minitron.errors import ArtefactError, StoppedError
from minitron.runtime.artefact import RunFolder
from minitron.runtime.session import Session
from minitron.runtime.signals import STOP_SIGNAL, hold_stop_signal, stop_was_asked
from minitron.runtime.tracking import read_metrics
from minitron.train.run import StartingPoint
from tests.parallel.workers import in_layout

TEACHER_ID = "the teacher of these tests"


@dataclass(frozen=True, kw_only=True)
class Job:
    """Folders and settings of a run; each call has a layout of its own."""

    config: RunConfig
    teacher: Path
    student: Path
    data: Path

    def session(self, groups: object, parallel: ParallelConfig) -> Session:
        config = replace(self.config, parallel=parallel)
        return Session(
            config=config,
            run=RunFolder(self.data.parent),
            groups=groups,  # type: ignore[arg-type]
            device=Device.cpu,
            console=Console(quiet=True),
        )


def write_cache(job: Job, parallel: ParallelConfig, out: Path, *, stop_after: int | None = None) -> dict[str, float]:
    """Write what is missing; with ``stop_after``, fail like a killed writer while the next shard is written."""
    written: list[Path] = []
    whole = cache_write.write_shard

    def die(path: Path, records: Sequence[tuple[int, bytes]]) -> None:
        if len(written) == stop_after:
            path.with_suffix(cache_write.PARTIAL_SUFFIX).write_bytes(records[0][1])
            raise KeyboardInterrupt
        whole(path, records)
        written.append(path)

    with in_layout(parallel) as groups:
        session = job.session(groups, parallel)
        write = partial(
            write_teacher_logits,
            session,
            teacher=job.teacher,
            teacher_id=TEACHER_ID,
            imported=job.student,
            data=job.data,
            out=out,
        )
        out.mkdir(exist_ok=True)
        if stop_after is None:
            return write()
        seconds, cache_write._SHARD_SECONDS, cache_write.write_shard = cache_write._SHARD_SECONDS, -1.0, die
        try:
            write()
        except KeyboardInterrupt:
            return {"shards": len(written)}
        finally:
            cache_write._SHARD_SECONDS, cache_write.write_shard = seconds, whole
    raise AssertionError("it was not stopped")


def write_asked_to_stop(job: Job, parallel: ParallelConfig, out: Path) -> str:
    """Write what is missing, the last rank being asked to stop before; what the stop says, on this rank."""
    hold_stop_signal()
    try:
        with in_layout(parallel) as groups:
            session = job.session(groups, parallel)
            out.mkdir(exist_ok=True)
            if groups.world_rank == parallel.num_ranks - 1:
                signal.pthread_kill(threading.get_ident(), STOP_SIGNAL)  # other threads do not hold it back
            try:
                write_teacher_logits(
                    session, teacher=job.teacher, teacher_id=TEACHER_ID, imported=job.student, data=job.data, out=out
                )
            except StoppedError as stopped:
                return str(stopped)
    finally:
        if stop_was_asked():
            signal.sigwait({STOP_SIGNAL})
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {STOP_SIGNAL})
    raise AssertionError("it did not stop")


def refusal(job: Job, parallel: ParallelConfig, teacher: Path, out: Path) -> str:
    """Why a cache is not learnt from, as this rank says it."""
    try:
        distill_steps(job, parallel, teacher, out)
    except ArtefactError as error:
        return str(error)
    raise AssertionError("it was learnt from")


def distill_steps(
    job: Job, parallel: ParallelConfig, teacher: Path, out: Path, *, teacher_id: str = TEACHER_ID
) -> list[dict[str, float]]:
    """Distill to the end; what each step logged."""
    with in_layout(parallel) as groups:
        out.mkdir(exist_ok=True)
        distill(
            job.session(groups, parallel),
            stage="distill",
            teacher=teacher,
            teacher_id=teacher_id,
            start=StartingPoint(job.student),
            settings=job.config.distill.train,
            data=job.data,
            out=out,
        )
    return read_metrics(out)
