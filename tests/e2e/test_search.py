"""`minitron search` as a user runs it: to the end in one process, and killed, then gone on with side by side."""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from minitron.checkpoint.folder import read_model_config
from minitron.config.compose import compose_run, flat_values
from minitron.models.axes import num_parameters
from minitron.runtime.tracking import read_metrics
from minitron.search.rank import rank_correlation
from tests.helpers.processes import kill_tree
from tests.helpers.torchrun import torchrun

pytestmark = pytest.mark.timeout(900)  # several commands a test, each with a limit of its own

REPOSITORY = Path(__file__).resolve().parents[2]
SEARCH = [
    "search.grid.num_layers=[3,4]",
    "search.grid.hidden_size=[48,56]",
    "search.grid.ffn_factor=[1.5,2]",
    "search.budget.parameters.max=118000",
    "search.num_tokens=2048",
    "search.lr_warmup_steps=1",
    "search.eval_tokens=512",
    "search.halving.rungs=2",
]
STEPS = [4, 8]  # 2048 / (8 x 32), and half of it


def _command(runs_dir: Path, *overrides: str) -> list[str]:
    start = [sys.executable, "-m", "minitron.cli.main", "search", "experiment=tiny", f"runs_dir={runs_dir}"]
    return [*start, "device=cpu", *SEARCH, *overrides]


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}  # the same sums, however many processes share the cores


def _search(runs_dir: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        _command(runs_dir, *overrides),
        cwd=REPOSITORY,
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


@dataclass(frozen=True)
class Unbroken:
    runs_dir: Path
    folder: Path
    result: dict[str, Any]
    shown: str

    def loss(self, name: str, steps: int) -> float:
        meta = json.loads((self.folder / name / f"distill_{steps}" / "meta.json").read_text())
        return float(meta["summary"]["heldout_loss"])


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Unbroken:
    runs_dir = tmp_path_factory.mktemp("runs")
    done = _search(runs_dir)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = runs_dir / "tiny" / "search"
    return Unbroken(runs_dir, folder, json.loads((folder / "result" / "search.json").read_text()), done.stdout)


def test_every_shape_in_the_budget_is_a_candidate(unbroken: Unbroken) -> None:
    """By hand: V = 257 tied; per layer 2h + h (4 + 2 x 4) 8 + 4 x 8 h + 3 f h; besides V h and h."""
    totals = {
        (layers, hidden, ffn): 257 * hidden + hidden + layers * (2 * hidden + 128 * hidden + 3 * ffn * hidden)
        for layers in (3, 4)
        for hidden in (48, 56)
        for ffn in (3 * hidden // 2, 2 * hidden)
    }
    inside = {shape: total for shape, total in totals.items() if total <= 118_000}
    assert len(inside) == 7 == len(totals) - 1
    rows = unbroken.result["rows"]
    assert {(r["num_layers"], r["hidden_size"], r["ffn_hidden_size"]): r["parameters"] for r in rows} == inside
    for row in rows:
        assert num_parameters(read_model_config(unbroken.folder / row["name"] / "prune")) == row["parameters"]
    assert "8 shapes, 7 candidates, dropped: 1 by search.budget.parameters.max" in unbroken.shown


def test_half_of_the_candidates_go_on(unbroken: Unbroken) -> None:
    rows = unbroken.result["rows"]
    names = [row["name"] for row in rows]
    first = {name: unbroken.loss(name, STEPS[0]) for name in names}
    alive = sorted(first, key=lambda name: first[name])[:4]
    assert {path.parent.name for path in unbroken.folder.glob("*/distill_8")} == set(alive)
    last = {name: unbroken.loss(name, STEPS[1]) for name in alive}
    stopped = sorted(set(names) - set(alive), key=lambda name: first[name])
    assert names == [*sorted(alive, key=lambda name: last[name]), *stopped]
    assert unbroken.result["winner"] == names[0]
    assert [row["loss"] for row in rows] == [last.get(name, first[name]) for name in names]
    assert [row["num_tokens"] for row in rows] == [2048] * 4 + [1024] * 3
    assert [row["finished"] for row in rows] == [True] * 4 + [False] * 3
    for row in rows:
        pruned = json.loads((unbroken.folder / row["name"] / "eval_pruned" / "eval.json").read_text())
        assert (row["pruned_loss"], pruned["num_tokens"], pruned["sample"]) == (pruned["loss"], 512, "")


def test_training_goes_on_where_the_rung_stopped(unbroken: Unbroken) -> None:
    """One schedule over both rungs: steps 1 to 4, then 5 to 8 with the rest of the cosine, and states are freed."""
    name = unbroken.result["winner"]
    parts = [read_metrics(unbroken.folder / name / f"distill_{steps}") for steps in STEPS]
    assert [record["step"] for part in parts for record in part] == list(range(1, 9))
    rates = [record["lr"] for part in parts for record in part]
    assert rates == pytest.approx([1e-4 + 9e-4 * (1 + math.cos(math.pi * step / 7)) / 2 for step in range(8)], rel=1e-6)
    assert list(unbroken.folder.glob("*/*/states")) == []


def test_stability_is_over_the_last_two_validations(unbroken: Unbroken) -> None:
    finished = [row["name"] for row in unbroken.result["rows"] if row["finished"]]
    curves = {
        name: {
            record["step"]: record["heldout_loss"]
            for steps in STEPS
            for record in read_metrics(unbroken.folder / name / f"distill_{steps}")
            if "heldout_loss" in record
        }
        for name in finished
    }
    assert all(set(curve) == {2, 4, 6, 8} for curve in curves.values())
    expected = rank_correlation([curves[n][6] for n in finished], [curves[n][8] for n in finished])
    assert unbroken.result["stability"] == expected
    assert unbroken.result["stability_tokens"] == [6 * 256, 8 * 256]


def test_winner_is_ready_for_the_line(unbroken: Unbroken) -> None:
    section = yaml.safe_load((unbroken.folder / "result" / "winner.yaml").read_text())
    assert section.pop("defaults") == ["schema", "_self_"]
    overrides = unbroken.result["overrides"]
    assert f"go on: minitron compress <the same settings> {' '.join(overrides)}" in unbroken.shown
    composed = compose_run(["experiment=tiny", *overrides])
    assert flat_values(composed.prune, "p") == {f"p.{key}": value for key, value in section.items()}
    row = unbroken.result["rows"][0]
    assert (composed.prune.num_layers, composed.prune.hidden_size) == (row["num_layers"], row["hidden_size"])
    assert (unbroken.folder / "result" / "pareto.png").stat().st_size > 10_000


def test_second_search_starts_no_rank(unbroken: Unbroken) -> None:
    again = _search(unbroken.runs_dir)
    assert again.returncode == 0, again.stderr
    assert "ranks" not in again.stdout
    assert unbroken.result["winner"] in again.stdout


def test_killed_search_goes_on_side_by_side_with_the_same_table(unbroken: Unbroken, tmp_path: Path) -> None:
    partial = tmp_path / "tiny" / ".partial" / "search"
    with subprocess.Popen(
        _command(tmp_path),
        cwd=REPOSITORY,
        env=_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        deadline = time.monotonic() + 200
        while not any(len(read_metrics(folder)) >= 2 for folder in partial.glob("*/distill_8")):
            assert process.poll() is None, "ended before the second rung"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        kill_tree(process.pid)
    assert not (tmp_path / "tiny" / "search" / "result").exists()
    for states in list((tmp_path / "tiny" / "search").glob("*/distill_4/states")):
        shutil.rmtree(states)  # what is gone is trained again from the first step, to the same end

    resumed = _search(tmp_path, "search.workers=2")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "2 candidates side by side" in resumed.stdout
    assert json.loads((tmp_path / "tiny" / "search" / "result" / "search.json").read_text()) == unbroken.result
    logs = tmp_path / "tiny" / "search" / "logs"
    assert all("distill_8" in (logs / f"worker_{number}.log").read_text() for number in (0, 1))


def test_a_failing_candidate_stops_the_others_and_is_one_line(unbroken: Unbroken) -> None:
    """Weights that are gone, in a search that needs them again."""
    name = unbroken.result["rows"][-1]["name"]
    weights = unbroken.folder / name / "prune" / "weights"
    weights.rename(weights.with_name("away"))
    failed = _search(unbroken.runs_dir, "search.workers=2", "search.eval_tokens=256", "on_change=rerun")
    weights.with_name("away").rename(weights)
    assert failed.returncode == 6, failed.stdout + failed.stderr
    errors = [line for line in failed.stderr.splitlines() if line.startswith("error")]
    assert len(errors) == 1, failed.stderr
    assert str(weights.parent) in errors[0]
    assert "Traceback" not in failed.stderr


def test_ranks_of_torchrun_with_measured_latencies_and_a_cached_teacher(tmp_path: Path) -> None:
    """Two stages; one of three shapes is not distilled."""
    job = ["-m", "minitron.cli.main", "search", "experiment=tiny", f"runs_dir={tmp_path}", "device=cpu"]
    settings = [
        "parallel.pipeline_model_parallel_size=2",
        "distill.teacher.source=cached",
        "search.grid.num_layers=[2,3,4]",
        "search.latency.source=measured",
        "search.serving.prompt_tokens=32",
        "search.serving.new_tokens=2",
        "search.budget.latency_ms.max=60000",
        "search.num_tokens=512",
        "search.lr_warmup_steps=0",
        "search.eval_tokens=256",
        "search.distill_best=2",
    ]
    unset = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    done = subprocess.run(
        [*torchrun(2), *job, *settings],
        cwd=REPOSITORY,
        env={name: value for name, value in _environment().items() if name not in unset},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("go on: minitron compress") == 1
    folder = tmp_path / "tiny" / "search"
    rows = json.loads((folder / "result" / "search.json").read_text())["rows"]
    [width] = json.loads((folder / "latency" / "latency.json").read_text()).values()
    expected = {layers: width["rest_ms"] + layers * width["layer_ms"] for layers in (2, 3, 4)}
    assert {row["num_layers"]: row["latency_ms"] for row in rows} == pytest.approx(expected)
    best = sorted(rows, key=lambda row: row["pruned_loss"])[:2]
    assert {row["name"] for row in rows if row["loss"] is not None} == {row["name"] for row in best}
    meta = json.loads((folder / rows[0]["name"] / "distill_2" / "meta.json").read_text())
    assert "teacher_logits" in meta["inputs"]
