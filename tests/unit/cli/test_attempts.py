"""Restarts of a job that come without progress."""

from pathlib import Path

import pytest

from minitron.cli.attempts import note_attempt, note_error, note_stop
from minitron.errors import PlatformError

Env = pytest.MonkeyPatch


def _start(run: Path, env: Env, restarts: int) -> None:
    env.setenv("SLURM_JOB_ID", "7")
    if restarts:
        env.setenv("SLURM_RESTART_COUNT", str(restarts))
    else:
        env.delenv("SLURM_RESTART_COUNT", raising=False)
    note_attempt(run, ["distill", "eval_distilled"], limit=2)


def test_two_idle_restarts_are_allowed_and_no_third(tmp_path: Path, monkeypatch: Env) -> None:
    for restarts in range(3):
        _start(tmp_path, monkeypatch, restarts)
    with pytest.raises(PlatformError, match="job 7 was started again 3 times without saving anything or finishing"):
        _start(tmp_path, monkeypatch, 3)


@pytest.mark.parametrize(
    "made", [".partial/distill/states/step_00000010", ".partial/distill/000000-00000.shard", "distill/meta.json"]
)
def test_progress_starts_the_count_again(tmp_path: Path, monkeypatch: Env, made: str) -> None:
    for restarts in range(3):
        _start(tmp_path, monkeypatch, restarts)
    (tmp_path / made).parent.mkdir(parents=True)
    (tmp_path / made).touch()
    for restarts in range(3, 6):
        _start(tmp_path, monkeypatch, restarts)
    with pytest.raises(PlatformError):
        _start(tmp_path, monkeypatch, 6)


def test_text_read_since_the_last_start_is_progress(tmp_path: Path, monkeypatch: Env) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    progress = tmp_path / ".partial" / "data" / "progress.json"
    progress.parent.mkdir(parents=True)
    for restarts in range(3):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
        progress.write_text(f"{restarts}")
        note_attempt(tmp_path, ["import", "data"], limit=0)
    with pytest.raises(PlatformError, match="started again 1 times"):
        note_attempt(tmp_path, ["import", "data"], limit=0)


def test_progress_of_a_search_is_that_of_its_candidates(tmp_path: Path, monkeypatch: Env) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    stages, candidate = ["score", "search"], "search/L3-h48-f96-a4-g4"
    made = [f".partial/{candidate}/distill_4/states/step_00000002", f"{candidate}/distill_4/meta.json"]
    for restarts, path in enumerate(["score/meta.json", *made]):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
        note_attempt(tmp_path, stages, limit=0)
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).touch()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    note_attempt(tmp_path, stages, limit=0)
    with pytest.raises(PlatformError, match="started again 1 times"):
        note_attempt(tmp_path, stages, limit=0)


def test_a_new_job_of_the_same_number_starts_afresh(tmp_path: Path, monkeypatch: Env) -> None:
    for restarts in (0, 1, 2, 0, 1, 2):
        _start(tmp_path, monkeypatch, restarts)


def test_nothing_is_noted_outside_of_a_job(tmp_path: Path, monkeypatch: Env) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    note_attempt(tmp_path, ["distill"], limit=0)
    note_stop(tmp_path)
    note_error(tmp_path, 10)
    assert list(tmp_path.iterdir()) == []


def test_the_mark_that_the_script_looks_for(tmp_path: Path, monkeypatch: Env) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    note_stop(tmp_path)
    assert (tmp_path / "jobs" / "7.stopped").exists()


def test_the_first_error_s_code_counts(tmp_path: Path, monkeypatch: Env) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    note_error(tmp_path, 10)  # a folder that cannot be written is no further error
    (tmp_path / "jobs").mkdir()
    for code in (9, 10):
        note_error(tmp_path, code)
    assert (tmp_path / "jobs" / "7.code").read_text() == "9\n"
