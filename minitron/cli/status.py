"""`minitron status`: what a run's folder and SLURM show of its progress. Needs neither torch nor Megatron-Core."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from minitron.config.compose import load_resolved
from minitron.config.run import RunConfig
from minitron.config.search import RESULT, SEARCH, candidate_training
from minitron.config.trainings import TRAININGS, in_step, settings_of
from minitron.errors import ArtefactError, PlatformError
from minitron.log import complain
from minitron.runtime.artefact import META_FILE, PARTIAL_DIR, RESOLVED_FILE, read_wanted
from minitron.runtime.slurm import JobState, ended_states, job_states, read_jobs
from minitron.runtime.tracking import read_metrics

_UNKNOWN = "unknown to SLURM"


@dataclass(frozen=True)
class StageStatus:
    """One line of the table.

    Attributes:
        stage: Name of the stage.
        state: done, running, begun (no process known), waiting, what SLURM calls a job that has ended, or that it does
            not know the job any more.
        job: Number of its latest job; None when it was started without SLURM.
        note: SLURM's reason for waiting or failing; of what runs, the time that its job has left.
        step, num_steps: Of a training stage, as far as they are known.
        loss: At that step, nats per token.
        seconds: What a finished stage took; of one that trains, what it still needs at its present speed.
    """

    stage: str
    state: str
    job: int | None = None
    note: str = ""
    step: int | None = None
    num_steps: int | None = None
    loss: float | None = None
    seconds: float | None = None


def show_status(run: Path) -> None:
    """Print the table of a run.

    Raises:
        ArtefactError: There is no such run.
    """
    table = Table("stage", "state", "job", "step", "loss", "time", "", box=None, pad_edge=False)
    for row in status_of(run):
        step = "" if row.step is None else f"{row.step}/{row.num_steps or '?'}"
        left = " left" if row.state != "done" and row.seconds is not None else ""
        table.add_row(
            row.stage,
            row.state,
            "" if row.job is None else str(row.job),
            step,
            "" if row.loss is None else f"{row.loss:.4f}",
            "" if row.seconds is None else _duration(row.seconds) + left,
            row.note,
        )
    Console(soft_wrap=True).print(table)


def status_of(run: Path) -> list[StageStatus]:
    """The stages of a run: those of its jobs in their order, others by when they were finished, what is still to come.

    Raises:
        ArtefactError: There is no such run.
    """
    file = run / RESOLVED_FILE
    if not file.exists():
        raise ArtefactError(f"{run} is not a run's folder (it has no {file.name}); give one, such as runs/demo")
    config = load_resolved(file)
    jobs = {RESULT if stage == SEARCH else stage: number for number, _, stages in read_jobs(run) for stage in stages}
    states = _states(sorted(set(jobs.values())))
    metas = {path.parent.relative_to(run).as_posix(): _read(path) for path in _metas(run)}
    begun = [path.parent.relative_to(run / PARTIAL_DIR).as_posix() for path in (run / PARTIAL_DIR).rglob("digest")]
    finished = sorted(metas, key=lambda stage: str(metas[stage].get("finished", "")))
    rows = []
    for stage in dict.fromkeys([*jobs, *finished, *begun, *read_wanted(run)]):
        job = jobs.get(stage, jobs.get(RESULT) if stage.startswith(f"{SEARCH}/") else None)
        rows.append(_status(run, stage, config, metas.get(stage), job, None if job is None else states.get(job)))
    return rows


def _states(jobs: Sequence[int]) -> dict[int, JobState]:
    """What SLURM says of jobs, or that it says nothing; empty where it cannot be asked."""
    if shutil.which("squeue") is None:
        return {}
    try:
        states = job_states(jobs)
    except PlatformError as error:  # the folder has more to say
        complain(f"{error}; what follows is from the folder alone")
        return {}
    states |= ended_states([job for job in jobs if job not in states])
    return {job: states.get(job, JobState(_UNKNOWN, "", "")) for job in jobs}


def _metas(run: Path) -> list[Path]:
    places = ("*", "steps/*/*", "search/*", "search/*/*")
    return [path for place in places for path in run.glob(f"{place}/{META_FILE}")]


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _status(
    run: Path, stage: str, config: RunConfig, meta: dict[str, Any] | None, job: int | None, state: JobState | None
) -> StageStatus:
    folder = run / stage if meta is not None else run / PARTIAL_DIR / stage
    step, num_steps, loss, left = _training(folder, stage, config)
    if meta is not None:
        return StageStatus(stage, "done", job, "", step, num_steps, loss, float(meta.get("seconds", 0)))
    begun = (folder / "digest").exists()
    if state is None:
        word, note = "begun" if begun else "waiting", ""
    elif state.is_over:
        word, note = state.state if state.state == _UNKNOWN else state.state.lower(), state.reason
    elif begun and state.state == "RUNNING":
        word, note = "running", f"job ends in {state.time_left}"
    else:
        word, note = "waiting", state.reason
    return StageStatus(stage, word, job, note, step, num_steps, loss, left)


def _training(folder: Path, stage: str, config: RunConfig) -> tuple[int | None, int | None, float | None, float | None]:
    """Step, number of steps, loss and seconds left of a stage that trains."""
    *place, name = stage.split("/")
    seq_length = config.data.seq_length
    if place[:1] == [SEARCH] and name.startswith("distill_"):  # a candidate, up to the step of that number
        settings = candidate_training(config.distill.train, config.search, seq_length=seq_length)
        num_steps = int(name.removeprefix("distill_"))
    elif name in TRAININGS:
        for step_config in config.chain:
            if place and step_config.name == place[-1]:
                config = in_step(config, step_config)
        settings = settings_of(config, name)
        num_steps = settings.num_steps(seq_length)
    else:
        return None, None, None, None
    records = read_metrics(folder)
    if not records:
        return 0, num_steps, None, None
    last = records[-1]
    tokens_left = (num_steps - last["step"]) * settings.tokens_per_step(seq_length)
    speed = last.get("tokens_per_s")
    return last["step"], num_steps, last.get("loss"), tokens_left / speed if speed else None


def _duration(seconds: float) -> str:
    """A time to read.

    >>> _duration(42), _duration(190), _duration(90061)
    ('42 s', '3 min 10 s', '25 h 1 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
