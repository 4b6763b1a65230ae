"""Attempts of a SLURM job: what it had done when it started again, and whether it asks for another start."""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path

from minitron.data.summary import PROGRESS_NAME
from minitron.errors import PlatformError
from minitron.runtime.artefact import META_FILE, PARTIAL_DIR, write_json
from minitron.runtime.env import slurm_job
from minitron.runtime.slurm import JOBS_DIR


def note_attempt(run: Path, stages: Sequence[str], *, limit: int) -> None:
    """Write down what is done, at the start of a job; rank 0 does it.

    Args:
        run: Folder of the run.
        stages: What the job is for.
        limit: Restarts in a row that may come without progress.

    Raises:
        PlatformError: There were more; the job should not be started again until someone has looked.
    """
    job = slurm_job()
    if job is None:
        return
    file = run / JOBS_DIR / f"{job.job_id}.attempts.json"
    before = json.loads(file.read_text(encoding="utf-8")) if job.num_restarts and file.exists() else []
    now = _progress(run, stages)
    idle = 0
    for earlier in reversed(before):
        if earlier != now:
            break
        idle += 1
    if idle > limit:
        raise PlatformError(
            f"job {job.job_id} was started again {idle} times without saving anything or finishing a stage; see its "
            "log for the reason, and raise launch.time_limit (alone_time_limit for a job of one process), or lower "
            "distill.train.save_interval_steps or launch.signal_lead_s"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, [*before, now])


def _progress(run: Path, stages: Sequence[str]) -> list[str]:
    """Everything that a stage leaves only once: its result, saved steps, shards of a cache, how far a text is read."""
    done = [path for stage in stages for path in (run / stage).rglob(META_FILE)]  # a search has many
    partial = [run / PARTIAL_DIR / stage for stage in stages]
    saved = [path for folder in partial for path in (*folder.rglob("states/step_*"), *folder.rglob("*.shard"))]
    read = [file.read_text(encoding="utf-8") for folder in partial for file in folder.glob(PROGRESS_NAME)]
    return sorted(str(path.relative_to(run)) for path in (*done, *saved)) + read


def note_stop(run: Path) -> None:
    """Tell the job's script that everything is saved and that it is to go back into the queue; rank 0 does it."""
    job = slurm_job()
    if job is not None:
        (run / JOBS_DIR).mkdir(parents=True, exist_ok=True)
        (run / JOBS_DIR / f"{job.job_id}.stopped").touch()


def note_error(run: Path, code: int) -> None:
    """Tell the job's script the exit code of the error that ends it; the first rank that has one does it."""
    job = slurm_job()
    if job is not None:
        with contextlib.suppress(OSError), (run / JOBS_DIR / f"{job.job_id}.code").open("x") as file:
            file.write(f"{code}\n")
