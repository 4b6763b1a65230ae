"""The line beyond one distillation: the ablation, and a chain with a corrected teacher."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from minitron.config.trainings import ABLATION
from minitron.runtime.tracking import read_metrics

REPOSITORY = Path(__file__).resolve().parents[2]


def _run(runs_dir: Path, verb: str, *overrides: str) -> str:
    command = [sys.executable, "-m", "minitron.cli.main", verb, "experiment=tiny", f"runs_dir={runs_dir}", *overrides]
    short = ["device=cpu", "distill.train.num_tokens=1280", "distill.train.eval_interval_steps=2"]
    result = subprocess.run(
        [*command, *short], cwd=REPOSITORY, capture_output=True, text=True, timeout=280, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_ablation_of_every_recipe(tmp_path: Path) -> None:
    shown = _run(tmp_path, "ablate", "ablation.from_scratch_times=2")
    folder = tmp_path / "tiny" / "ablation"
    result = json.loads((folder / "ablation.json").read_text())
    assert [recipe["name"] for recipe in result["recipes"]] == list(ABLATION)
    tokens = {recipe["name"]: recipe["num_tokens"] for recipe in result["recipes"]}
    assert tokens == dict.fromkeys(ABLATION, 1280) | {"scratch_long": 2560}
    losses = {recipe["name"]: recipe["loss"] for recipe in result["recipes"]}
    for name, loss in losses.items():
        evaluated = "distilled" if name == "distill" else name
        assert json.loads((tmp_path / "tiny" / f"eval_{evaluated}" / "eval.json").read_text())["loss"] == loss
        assert f"{loss:.3f}" in shown
    assert len(set(losses.values())) == len(ABLATION)
    assert (folder / "ablation.png").stat().st_size > 10_000
    assert (folder / "ablation.md").read_text().count("\n| ") == len(ABLATION)


def test_given_teacher_is_evaluated_on_the_runs_text(tmp_path: Path) -> None:
    for verb in ("import", "data"):
        _run(tmp_path, verb)
    _run(tmp_path, "eval", f"distill.teacher.path={tmp_path}/tiny/import")
    own, given = (
        json.loads((tmp_path / "tiny" / f"eval_{which}" / "eval.json").read_text())
        for which in ("teacher", "given_teacher")
    )
    assert given == own  # the same weights


def test_chain_with_a_corrected_teacher(tmp_path: Path) -> None:
    first = "{name: first, prune: {ffn_hidden_size: 112}, num_tokens: 0}"  # only pruned, and pruned again
    small = "{name: small, prune: {num_layers: 2, hidden_size: 48}, num_tokens: 768}"
    last = "{name: last, prune: {num_layers: 2}, num_tokens: 768, source: original, teacher: previous}"
    chain = f"chain=[{first}, {{name: mid, prune: {{num_layers: 3, hidden_size: 56}}}}, {small}, {last}]"
    _run(
        tmp_path,
        "compress",
        "parallel.pipeline_model_parallel_size=2",
        chain,
        "baseline.enabled=false",
        "correction.enabled=true",
    )
    run = tmp_path / "tiny"
    metas = {
        step: json.loads((run / "steps" / step / "distill" / "meta.json").read_text()) for step in ("mid", "small")
    }
    assert [metas[step]["summary"]["tokens"] for step in metas] == [1280, 768]
    assert all("correct" in meta["inputs"] for meta in metas.values())
    assert {folder.name for folder in (run / "steps" / "first").iterdir()} == {
        "score",
        "prune",
        "verify",
        "eval_pruned",
    }
    sizes = ("num_layers", "hidden_size", "ffn_hidden_size")
    sources = [json.loads((run / "steps" / s / "prune" / "prune_spec.json").read_text())["source"] for s in metas]
    assert [[source[size] for size in sizes] for source in sources] == [[4, 64, 112], [3, 56, 112]]
    model = AutoModelForCausalLM.from_pretrained(run / "steps" / "small" / "export" / "hf")
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (2, 48)
    assert torch.isfinite(model(torch.arange(8)[None]).logits).all()
    inputs = json.loads((run / "steps" / "last" / "distill" / "meta.json").read_text())["inputs"]
    assert set(inputs) == {"steps/small/distill", "steps/last/prune", "data"}
    spec = json.loads((run / "steps" / "last" / "prune" / "prune_spec.json").read_text())
    assert [spec["source"][size] for size in sizes] == [4, 64, 128]
    logged = read_metrics(run / "steps" / "last" / "distill")
    assert [metrics["step"] for metrics in logged] == [1, 2, 3]
    report = json.loads((run / "steps" / "mid" / "report" / "report.json").read_text())
    assert [row["role"] for row in report["models"]] == ["teacher", "corrected", "pruned", "distilled"]
