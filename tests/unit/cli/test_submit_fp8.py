"""launch=slurm with FP8: refused before anything is submitted where the nodes cannot do it, and else by the ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minitron.cli.stages import stages_of
from minitron.config.compose import compose_run, to_yaml
from tests.unit.cli.conftest import SLURM, Compress


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["precision=fp8_current"],
            (
                "precision.fp8_recipe=tensorwise needs an NVIDIA GPU of compute capability 8.9 or higher, but the job "
                "has none (cluster.gpus_per_node=0); set precision=bf16"
            ),
        ),
        (
            ["cluster=dgx_h100", "device=cpu", "precision=bf16", "distill.teacher.fp8_recipe=blockwise"],
            (
                "distill.teacher.fp8_recipe=blockwise needs an NVIDIA GPU of compute capability 9.0 or higher, but the "
                "job has none (device=cpu); set precision=bf16"
            ),
        ),
        (
            ["cluster=dgx_a100", "precision=fp8_delayed"],
            (
                "precision.fp8_recipe=delayed cannot run on cluster.gpu=a100: delayed needs compute capability 8.9 or "
                "higher, not 8.0; choose another recipe, or bf16"
            ),
        ),
        (
            ["cluster=dgx_h100", "precision=mxfp8", "prune.hidden_size=64"],
            (
                "precision.fp8_recipe=mxfp8 cannot run on cluster.gpu=h100: mxfp8 needs compute capability 10.0 or "
                "higher and below 12.0, not 9.0"
            ),
        ),
    ],
    ids=["no GPUs", "device=cpu", "A100", "H100"],
)
def test_fp8_that_the_nodes_cannot_do(
    compress: Compress,
    slurm: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    overrides: list[str],
    message: str,
) -> None:
    assert compress(*overrides) == 10
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")
    assert not (slurm / "calls").exists()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "overrides",
    [
        ["precision=fp8_blockwise"],
        ["precision=mxfp8", "prune.hidden_size=64", "cluster.gpu=b200"],
        ["cluster.gpu=null"],
    ],
)
def test_fp8_that_the_nodes_may_do(compress: Compress, slurm: Path, overrides: list[str]) -> None:
    assert compress("cluster=dgx_h100", *overrides, verb="import") == 0


def test_a_rank_refuses_fp8_without_a_gpu(tmp_path: Path) -> None:
    """Its node may be another than the submitting machine was told of; one process alone has no GPU, and needs none."""
    overrides = ["experiment=tiny", "precision=fp8_current", "device=cpu", f"runs_dir={tmp_path / 'runs'}", *SLURM]
    config = compose_run(overrides)
    (tmp_path / "resolved.yaml").write_text(to_yaml(config))
    (tmp_path / "outside.json").write_text(json.dumps({stage.name: {} for stage in stages_of(config)}))
    step = {"PROCID": "0", "STEP_NUM_TASKS": "1", "LOCALID": "0", "STEP_NODELIST": "localhost", "JOB_ID": "5"}
    env = {**os.environ, **{f"SLURM_{name}": value for name, value in step.items()}}

    def rank(stage: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "minitron.cli.worker", tmp_path / "resolved.yaml", stage]
        command.append(tmp_path / "outside.json")
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)

    refused = rank("distill")
    assert refused.returncode == 10, refused.stderr
    [line] = refused.stderr.splitlines()
    assert line.startswith("error: precision.fp8_recipe=tensorwise needs an NVIDIA GPU")
    assert not (tmp_path / "runs").exists()
    imported = rank("import")
    assert imported.returncode == 0, imported.stderr
    assert (tmp_path / "runs" / "tiny" / "import").is_dir()
