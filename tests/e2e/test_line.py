"""The whole line as a user runs it: two processes, a change, a kill, a full disk."""

import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from minitron.runtime.tracking import read_metrics
from tests.helpers.line import LINE
from tests.helpers.processes import kill_tree

pytestmark = pytest.mark.timeout(900)  # several commands a test, each with a limit of its own

REPOSITORY = Path(__file__).resolve().parents[2]
TWO_STAGES = "parallel.pipeline_model_parallel_size=2"
AFTER_TOKENS = {"distill", "eval_distilled", "baseline", "eval_baseline", "export", "report"}
"""Stages whose result depends on distill.train.num_tokens."""


def _command(runs_dir: Path, *overrides: str) -> list[str]:
    start = [sys.executable, "-m", "minitron.cli.main", "compress", "experiment=tiny", f"runs_dir={runs_dir}"]
    return [*start, "device=cpu", *overrides]


def _compress(runs_dir: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        _command(runs_dir, *overrides), cwd=REPOSITORY, capture_output=True, text=True, timeout=280, check=False
    )


def _metas(run: Path) -> dict[str, dict[str, Any]]:
    return {file.parent.name: json.loads(file.read_text()) for file in run.glob("*/meta.json")}


def _one_error(result: subprocess.CompletedProcess[str]) -> str:
    """The only `error:` line; there is no traceback."""
    assert "Traceback" not in result.stderr + result.stdout, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert len(errors) == 1, result.stderr
    return errors[0]


@dataclass(frozen=True)
class Line:
    runs_dir: Path
    run: Path
    first: subprocess.CompletedProcess[str]
    distill_metrics: list[dict[str, Any]]


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Line:
    runs_dir = tmp_path_factory.mktemp("runs")
    first = _compress(runs_dir, TWO_STAGES)
    assert first.returncode == 0, first.stdout + first.stderr
    run = runs_dir / "tiny"
    return Line(runs_dir, run, first, read_metrics(run / "distill"))


def test_whole_line_on_two_processes(line: Line) -> None:
    assert set(_metas(line.run)) == set(LINE)
    assert list((line.run / ".partial").iterdir()) == []
    assert "tensor 1 x pipeline 2 x data 1 = 2 ranks" in line.first.stdout
    verified = _metas(line.run)["verify"]["summary"]
    assert verified["masked_teacher"] == "not compared (prune.reconstruct.enabled=true)"
    assert (line.run / "report" / "report.html").read_text().lstrip().lower().startswith("<!doctype html")
    assert json.loads((line.run / "report" / "report.json").read_text())
    assert [record["step"] for record in line.distill_metrics] == list(range(1, 21))  # 5120 / (8 x 32)
    assert all(math.isfinite(record["loss"]) for record in line.distill_metrics)


def test_exported_folder_loads(line: Line) -> None:
    folder = line.run / "export" / "hf"
    model = AutoModelForCausalLM.from_pretrained(folder)
    config = model.config
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (3, 48, 96)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 4, 8)
    assert model.dtype == torch.float32
    ids = AutoTokenizer.from_pretrained(folder)("The capital", return_tensors="pt").input_ids
    assert torch.isfinite(model(ids).logits).all()


def test_second_run_starts_no_rank(line: Line) -> None:
    again = _compress(line.runs_dir, TWO_STAGES)
    assert again.returncode == 0, again.stderr
    for stage in LINE:
        assert f"{stage}: done before" in again.stdout
    assert "ranks, artefacts in" not in again.stdout
    assert "gap recovered" in again.stdout  # the table is shown again


def test_change_is_an_error_by_default(line: Line) -> None:
    before = _metas(line.run)
    refused = _compress(line.runs_dir, TWO_STAGES, "distill.train.num_tokens=2560", "on_change=error")
    assert refused.returncode == 8
    message = _one_error(refused)
    assert message.startswith(f"error: {line.run / 'distill'} was made with other inputs")
    assert "distill.train.num_tokens: 5120 -> 2560" in message
    assert _metas(line.run) == before


def test_rerun_runs_what_depends_on_the_change(line: Line) -> None:
    before = _metas(line.run)
    result = _compress(line.runs_dir, TWO_STAGES, "distill.train.num_tokens=2560", "on_change=rerun")
    assert result.returncode == 0, result.stdout + result.stderr
    after = _metas(line.run)
    assert set(after) == set(LINE)
    assert {stage for stage in LINE if after[stage] != before[stage]} == AFTER_TOKENS
    aside = {folder.name for folder in (line.run / "superseded").iterdir()}
    assert aside == {f"{stage}-{before[stage]['digest'][:12]}" for stage in AFTER_TOKENS}
    assert [record["step"] for record in read_metrics(line.run / "distill")] == list(range(1, 11))


def test_killed_in_distill_goes_on_with_the_same_numbers(line: Line, tmp_path: Path) -> None:
    metrics = tmp_path / "tiny" / ".partial" / "distill"
    with subprocess.Popen(
        _command(tmp_path, TWO_STAGES),
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        deadline = time.monotonic() + 200
        while len(read_metrics(metrics)) < 8:
            assert process.poll() is None, "ended before step 8 of distill"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        kill_tree(process.pid)
    assert metrics.exists(), "the kill came after the stage's end"
    assert not (tmp_path / "tiny" / "distill").exists()

    resumed = _compress(tmp_path, TWO_STAGES)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "prune: done before" in resumed.stdout
    got = read_metrics(tmp_path / "tiny" / "distill")
    assert [record["step"] for record in got] == [record["step"] for record in line.distill_metrics]
    for name in ("loss", "grad_norm"):
        expected = [record[name] for record in line.distill_metrics]
        assert [record[name] for record in got] == pytest.approx(expected, rel=0, abs=1e-9)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB; the whole line needs about 5."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(tmp_path)]
    try:
        mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount program")
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_full_disk_is_one_line_and_the_run_goes_on(small_disk: Path) -> None:
    full = _compress(small_disk)
    assert full.returncode == 8, full.stdout + full.stderr
    message = _one_error(full)
    assert "no space left for " in message
    failing = re.findall(r"^\[ *\d+/13\] (\w+) \.\.\.$", full.stdout, re.MULTILINE)[-1]
    assert f"/.partial/{failing}" in message
    assert not (small_disk / "tiny" / failing).exists()

    subprocess.run(["mount", "-o", "remount,size=200m", str(small_disk)], check=True)
    finished = _compress(small_disk)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert set(_metas(small_disk / "tiny")) == set(LINE)
    assert "import: done before" in finished.stdout
