"""Distilling from a cache as a user does it: the whole line, then again without the teacher's weights."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from minitron.runtime.tracking import read_metrics
from tests.helpers.line import LINE

pytestmark = pytest.mark.timeout(900)  # several commands a test, each with a limit of its own

REPOSITORY = Path(__file__).resolve().parents[2]
CACHED = "distill.teacher.source=cached"
NOT_NEEDED = ["baseline.enabled=false", "eval.num_tokens=256", "score.num_samples=4"]


def _minitron(verb: str, runs_dir: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "-m", "minitron.cli.main", verb, "experiment=tiny", f"runs_dir={runs_dir}", "device=cpu"]
    command = [*start, *NOT_NEEDED, *overrides]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=280, check=False)


def _meta(run: Path, stage: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((run / stage / "meta.json").read_text())
    return values


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished line at PP2 with a cached teacher; then the teacher's weights are moved away."""
    runs_dir = tmp_path_factory.mktemp("runs")
    result = _minitron("compress", runs_dir, CACHED, "parallel.pipeline_model_parallel_size=2")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "160 sequences to write: at most 155 bytes/token, at most 0.000794 GB of" in result.stdout
    assert "teacher_logits: 160/160" in result.stdout
    (runs_dir / "tiny" / "import").rename(runs_dir / "away")
    return runs_dir


def test_the_line_has_the_stage(runs_dir: Path) -> None:
    run = runs_dir / "tiny"
    names = {file.parent.name for file in run.glob("*/meta.json")}
    assert names == ({*LINE, "teacher_logits"} - {"import", "baseline", "eval_baseline"})
    assert set(_meta(run, "distill")["inputs"]) == {"teacher_logits", "prune", "data"}
    summary = _meta(run, "teacher_logits")["summary"]
    assert summary["samples"] == 160  # 5120 / 32
    assert 0 < summary["bytes_per_token"] <= 155 + 32 / 32 + 32 / 5120  # the table: 32 bytes per sample and file
    assert summary["bytes_per_token"] * 5120 == summary["bytes"]


def test_missing_samples_are_refused_before_any_rank_starts(runs_dir: Path) -> None:
    refused = _minitron("distill", runs_dir, CACHED, "distill.train.num_tokens=7680", "on_change=rerun")
    assert refused.returncode == 8
    errors = [line for line in refused.stderr.splitlines() if line]
    assert len(errors) == 1, refused.stderr
    assert "error: distill: 80 of the 240 sequences that distill.train.num_tokens=7680 and seed=1234 read" in errors[0]
    assert "run `minitron teacher-logits` with the same settings, which adds them" in errors[0]
    assert "ranks" not in refused.stdout


def test_another_student_learns_without_the_teacher(runs_dir: Path) -> None:
    """A shorter run at another layout; its first steps are those of the line, its learning rate aside."""
    before = read_metrics(runs_dir / "tiny" / "distill")
    result = _minitron(
        "distill",
        runs_dir,
        CACHED,
        "distill.train.num_tokens=2560",
        "distill.train.lr_warmup_steps=2",
        "distill.train.micro_batch_size=4",
        "on_change=rerun",
    )
    assert result.returncode == 0, result.stdout + result.stderr
    found = read_metrics(runs_dir / "tiny" / "distill")
    assert len(found) == 10
    assert found[0]["loss"] == pytest.approx(before[0]["loss"], rel=1e-4)


def test_another_run_reads_the_same_cache(runs_dir: Path) -> None:
    """``distill.teacher.cache`` names it; more samples than it has are refused before the first step."""
    for stage in ("data", "prune"):
        shutil.copytree(runs_dir / "tiny" / stage, runs_dir / "other" / stage)
    settings = ["name=other", CACHED, f"distill.teacher.cache={runs_dir / 'tiny' / 'teacher_logits'}"]
    refused = _minitron("distill", runs_dir, *settings, "distill.train.num_tokens=7680")
    assert refused.returncode == 8, refused.stderr
    assert "error: 80 of the 240 sequences that distill.train.num_tokens=7680 and seed=1234 read" in refused.stderr
    assert "run `minitron teacher-logits` in the run that this folder belongs to" in refused.stderr
    result = _minitron("distill", runs_dir, *settings, "distill.train.num_tokens=2560")
    assert result.returncode == 0, result.stdout + result.stderr
