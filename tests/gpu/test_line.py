"""The whole line on a GPU, in bf16 and in FP8, against the same line on the CPU of the same machine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from minitron.runtime.tracking import read_metrics
from tests.helpers.line import LINE

pytestmark = pytest.mark.timeout(600)

REPOSITORY = Path(__file__).resolve().parents[2]
RUNS = {
    "cpu": ["device=cpu", "precision=fp32"],
    "bf16": ["device=cuda", "precision=bf16"],
    "fp8": ["device=cuda", "precision=fp8_current", "distill.teacher.fp8_recipe=tensorwise"],
}


def _start(runs_dir: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "minitron.cli.main", "compress", "experiment=tiny", f"runs_dir={runs_dir}"]
    return subprocess.Popen(
        [*command, *overrides], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run folders by name; the three lines ran side by side."""
    folders = {name: tmp_path_factory.mktemp(name) for name in RUNS}
    started = {name: _start(folders[name], *overrides) for name, overrides in RUNS.items()}
    for name, process in started.items():
        said, _ = process.communicate(timeout=500)
        assert process.returncode == 0, f"{name}:\n{said}"
    return {name: folder / "tiny" for name, folder in folders.items()}


def _loss(run: Path, stage: str) -> float:
    return float(json.loads((run / stage / "eval.json").read_text())["loss"])


@pytest.mark.parametrize(("name", "of_kl"), [("bf16", 0.02), ("fp8", 0.10)])
def test_losses_are_the_cpus(runs: dict[str, Path], name: str, of_kl: float) -> None:
    """Held-out losses within 0.5 % (evaluation is bf16 in both), the divergence of every step within ``of_kl``."""
    assert {folder.parent.name for folder in runs[name].glob("*/meta.json")} == set(LINE)
    for stage in ("eval_teacher", "eval_pruned", "eval_distilled", "eval_baseline"):
        assert _loss(runs[name], stage) == pytest.approx(_loss(runs["cpu"], stage), rel=5e-3), stage
    have, wanted = ([step["loss"] for step in read_metrics(runs[run] / "distill")] for run in (name, "cpu"))
    assert have == pytest.approx(wanted, rel=of_kl)


def test_a_cpu_finds_everything_done_that_a_gpu_did(runs: dict[str, Path]) -> None:
    said, _ = _start(runs["bf16"].parent, "device=cpu", "precision=bf16").communicate(timeout=300)
    for stage in LINE:
        assert f"{stage}: done before" in said, said
