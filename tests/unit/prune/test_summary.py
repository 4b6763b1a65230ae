"""Figures of what was kept, worked by hand."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from minitron.config.prune import HeadResidual, PruneConfig
from minitron.config.score import Aggregation
from minitron.errors import CheckpointError
from minitron.prune.ranking import choose
from minitron.prune.scores import random_scores
from minitron.prune.spec import PruneSpec
from minitron.prune.summary import check_parameters, describe, scores_kept
from tests.unit.prune.reference import shape, write_checkpoint

SOURCE = shape(num_layers=2, hidden_size=8, ffn_hidden_size=3, num_attention_heads=4, num_query_groups=2)


def spec() -> PruneSpec:
    target = replace(SOURCE, num_layers=1, hidden_size=4, ffn_hidden_size=2, num_attention_heads=2)
    units = {"layers": [1], "hidden": [0, 1, 2, 7], "ffn": [[0, 2]], "heads": [[1, 2]], "groups": [[0, 1]]}
    return PruneSpec(source=SOURCE, target=target, source_id="", **units)  # type: ignore[arg-type]


def kept(of: PruneSpec, *, layer: bool = True) -> dict[str, object]:
    ffn = np.array([[9.0, 9, 9], [1, 5, 2]])
    head = np.array([[9.0, 9, 9, 9], [1, 2, 3, 4]])
    hidden = np.arange(32.0).reshape(4, 8).sum(axis=0)  # 48, 52, ..., 76
    return scores_kept(of, ffn=ffn, head=head, hidden=hidden, layer=np.array([1.0, 3.0]) if layer else None)


def test_shares_of_the_scores() -> None:
    """Of neurons and heads only the kept layer's count: a dropped layer is the layers' axis."""
    want = {"score_kept_hidden": round((48 + 52 + 56 + 76) / 496, 4), "score_kept_ffn": 3 / 8, "score_kept_heads": 0.5}
    assert kept(spec()) == {**want, "score_kept_layers": 3 / 4}
    assert kept(spec(), layer=False) == want
    assert kept(PruneSpec.identity(SOURCE)) == {}


def test_summary() -> None:
    # Per layer 2 x 4 (norms) + 4 x (2 + 2 x 2) x 4 (qkv) + 2 x 4 x 4 (proj) + 3 x 2 x 4 (mlp); the final norm has 4.
    in_layers = 8 + 96 + 32 + 24 + 4
    assert describe(spec()) == {
        "layers": "2 -> 1",
        "hidden": "8 -> 4",
        "ffn": "3 -> 2",
        "heads": "4 -> 2",
        "dropped_layers": "0",
        "parameters": in_layers + 2 * 50 * 4,
        "non_embedding": in_layers,
    }
    config = PruneConfig(num_attention_heads=2, head_residual=HeadResidual.paper)
    merged = choose(SOURCE, config, scores=random_scores(SOURCE, Aggregation.l2_mean, 0), source_id="random")
    assert describe(merged) == {
        "layers": "2 -> 2",
        "hidden": "8 -> 8",
        "ffn": "3 -> 3",
        "heads": "4 -> 2",
        "dropped_layers": "",
        "merged_heads": 4,
        "parameters": 2 * (16 + 8 * 6 * 4 + 2 * 4 * 8 + 3 * 3 * 8) + 8 + 2 * 50 * 8,
        "non_embedding": 2 * (16 + 8 * 6 * 4 + 2 * 4 * 8 + 3 * 3 * 8) + 8,
    }


def test_parameters_of_a_checkpoint(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(3, 5), "b": torch.zeros(7)}
    folder = write_checkpoint(tmp_path / "c", tensors, SOURCE)
    with pytest.raises(CheckpointError, match=r"holds 22 parameters, but the pruned model has 1,752; remove"):
        check_parameters(folder, SOURCE)
