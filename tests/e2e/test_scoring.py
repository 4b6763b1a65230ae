"""Scoring as a user runs it: by removing layers, in rounds, with questions; and pruning by another run's scores."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from minitron.config.prune import HiddenNorm
from minitron.config.score import Aggregation, DepthMetric
from minitron.prune.scores import Scores
from minitron.prune.spec import PruneSpec

REPOSITORY = Path(__file__).resolve().parents[2]
QUESTIONS = [
    {"context": "The sky is", "choices": ["blue", "loud"], "answer": 0},
    {"context": ["He", "She"], "choices": ["ran", "ran"], "answer": 1},
]


def minitron(verb: str, runs_dir: Path, *overrides: str) -> str:
    command = [sys.executable, "-m", "minitron.cli.main", verb, "experiment=tiny", f"runs_dir={runs_dir}", "device=cpu"]
    layout = "parallel.pipeline_model_parallel_size=2"
    done = subprocess.run(
        [*command, layout, *overrides], cwd=REPOSITORY, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for verb in ("import", "data"):
        minitron(verb, folder)
    return folder


@pytest.mark.slow
def test_depth_in_rounds_then_pruned(runs_dir: Path, tmp_path: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    target = ["prune.num_layers=2", "prune.depth_metric=loss", "prune.depth_selection=iterative"]
    more = ["score.depth.metrics=[logit_mse,accuracy]", "score.depth.blocks=[2]", f"score.depth.questions={questions}"]
    said = minitron("score", runs_dir, *target, *more, "score.rounds=2", "score.seq_length=16")
    folder = runs_dir / "tiny" / "score"
    plots = {path.name for path in folder.glob("*.png")}
    assert plots == {f"scores_{name}.png" for name in ("ffn", "head", "group", "hidden_norms", "depth")}
    assert f"5 plots in {folder}/" in said
    assert not (folder / "rounds").exists()
    scores = Scores.load(folder)
    assert scores.seq_length == 16
    assert set(scores.depth.blocks) == {(m, n) for m in (DepthMetric.logit_mse, DepthMetric.accuracy) for n in (1, 2)}
    assert scores.depth.greedy is not None
    assert len(scores.depth.greedy.layers) == 2
    width = next(iter(scores.width.values()))
    assert [(row > 0).sum() for row in width.ffn] == [112] * 4  # 128, cut once half the way to 96

    # Pruned by the scores from where they are copied to, as another run of the same source would.
    shutil.copytree(folder, tmp_path / "scores")
    shutil.rmtree(folder)
    minitron("prune", runs_dir, *target, f"prune.scores={tmp_path / 'scores'}")
    assert not folder.exists()
    spec = PruneSpec.load(runs_dir / "tiny" / "prune" / "prune_spec.json")
    assert sorted(set(range(4)) - set(spec.layers)) == sorted(scores.depth.greedy.layers)
    channels = scores.channels(Aggregation.l2_mean, [HiddenNorm.input, HiddenNorm.pre_mlp])
    assert spec.hidden == sorted(np.argsort(-channels)[:48])
