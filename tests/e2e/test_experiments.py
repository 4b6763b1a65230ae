"""The papers' experiments, scaled down, through the whole line on two processes."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.timeout(600)  # the first test waits for all of the runs

REPOSITORY = Path(__file__).resolve().parents[2]

SHAPES = {
    "nemotron4_15b-to-8b": (4, 64, 256, 12, 2),
    "nemotron4_8b-to-4b": (4, 48, 144, 6, 2),
    "nemotron4_15b-to-8b-to-4b": (4, 48, 144, 6, 2),
    "llama31_8b-to-4b_width": (4, 48, 144, 8, 2),
    "llama31_8b-to-4b_depth": (2, 64, 224, 8, 2),
    "mistral_nemo_12b-to-8b": (5, 64, 180, 8, 2),
}
"""Layers, hidden size, ffn, heads and groups of each exported student: the papers' over 8, 64, 64, 4 and 4."""


def _free_ports(number: int) -> list[int]:
    """Below those that the system gives to outgoing connections, which the jobs before may hold."""
    found: list[socket.socket] = []
    for port in range(20000 + os.getpid() % 10000, 32000):
        with contextlib.suppress(OSError):
            found.append(socket.create_server(("127.0.0.1", port)))
        if len(found) == number:
            break
    ports = [listening.getsockname()[1] for listening in found]
    for listening in found:
        listening.close()
    return ports


def _environment(rank: int) -> dict[str, str]:
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    return {**os.environ, **place, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every experiment, run."""
    folder = tmp_path_factory.mktemp("runs")
    work = [f"{name}:{port}" for name, port in zip(SHAPES, _free_ports(len(SHAPES)), strict=True)]
    command = [sys.executable, "-m", "tests.e2e.run_experiments", str(folder), *work]
    logs = [folder / f"rank{rank}.log" for rank in (0, 1)]
    with logs[0].open("w") as first, logs[1].open("w") as second:
        ranks = [
            subprocess.Popen(command, cwd=REPOSITORY, env=_environment(rank), stdout=log, stderr=subprocess.STDOUT)
            for rank, log in enumerate((first, second))
        ]
        try:
            codes = [rank.wait(timeout=500) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
    assert codes == [0, 0], "\n".join(log.read_text()[-4000:] for log in logs)
    return folder


@pytest.mark.parametrize("experiment", SHAPES)
def test_experiment_runs_end_to_end(runs_dir: Path, experiment: str) -> None:
    run = runs_dir / f"{experiment}_tiny"
    is_chain = experiment.count("-to-") > 1
    last = run / "steps" / "4b" if is_chain else run
    folder = last / "export" / "hf"
    model = AutoModelForCausalLM.from_pretrained(folder)
    config = model.config
    assert SHAPES[experiment] == (
        config.num_hidden_layers,
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.num_key_value_heads,
    )
    assert config.head_dim == 8
    assert torch.isfinite(model(torch.arange(8)[None]).logits).all()
    files = [*run.glob("*/meta.json"), *run.glob("steps/*/*/meta.json")]
    metas = {file.parent.relative_to(run).as_posix(): json.loads(file.read_text()) for file in files}
    distilled = [meta for stage, meta in metas.items() if stage.endswith("distill")]
    assert [meta["summary"]["tokens"] for meta in distilled] == [2048] * experiment.count("-to-")
    if not experiment.startswith("nemotron"):  # paper 1 distils on the teacher's own data
        assert metas["correct"]["summary"]["tokens"] == 1024
        assert "correct" in metas["distill"]["inputs"]  # the corrected teacher taught
    if is_chain:  # the 4b is cut from the distilled 8b, and the 15b teaches both
        assert "steps/8b/distill" in metas["steps/4b/prune"]["inputs"]
        assert all("import" in meta["inputs"] for meta in distilled)
    assert (last / "report" / "report.html").exists()
