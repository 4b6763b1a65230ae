"""Merged heads against dense algebra on transformers' own projections."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from minitron.config.model import ModelConfig
from minitron.config.prune import HeadResidual, PruneConfig, check_target
from minitron.config.score import Aggregation
from minitron.errors import PruneError
from minitron.prune.ranking import choose, pair_heads
from minitron.prune.scores import Scores, random_scores
from minitron.prune.slicer import apply_spec
from minitron.prune.spec import HeadPair, PruneSpec
from tests.unit.prune.reference import FAMILIES, canonical, hf_model, read_checkpoint, restore, shape, write_checkpoint


def test_pairs_by_hand() -> None:
    """The formula: by importance heads 2, 4, 0 stay, and 3, 1 go; i = 3 pairs with 4, and i = 2 with 5."""
    one_group = shape(num_attention_heads=5, num_query_groups=1)
    scores = np.array([0.5, 0.1, 0.9, 0.3, 0.7])
    target = replace(one_group, num_attention_heads=3)
    assert pair_heads(scores, [0], one_group, target) == [HeadPair(0, 3), HeadPair(4, 1)]
    # In groups of 3 and 3, the second kept alone: only its own heads are merged.
    groups = shape(num_attention_heads=6, num_query_groups=2)
    target = replace(groups, num_attention_heads=2, num_query_groups=1)
    scores = np.array([9.0, 8.0, 7.0, 0.2, 0.3, 0.1])
    assert pair_heads(scores, [1], groups, target) == [HeadPair(3, 5)]
    # Heads with keys and values of their own: all heads of the layer, whatever their group.
    alone = shape(num_attention_heads=4, num_query_groups=4)
    target = replace(alone, num_attention_heads=3, num_query_groups=3)
    assert pair_heads(np.array([0.4, 0.3, 0.2, 0.1]), [0, 1, 2], alone, target) == [HeadPair(2, 3)]


def test_too_few_heads_are_kept() -> None:
    model = shape(num_attention_heads=12, num_query_groups=4)
    config = PruneConfig(num_attention_heads=4, head_residual=HeadResidual.paper)
    with pytest.raises(PruneError, match=r"head_residual=paper pairs .* of 3 heads that may be merged .* only 1 are"):
        check_target(model, config)
    assert check_target(model, replace(config, head_residual=HeadResidual.none)).num_attention_heads == 4


def pruned(
    model: ModelConfig, config: PruneConfig, folder: Path, scores: Scores
) -> tuple[dict[str, torch.Tensor], PruneSpec]:
    """State of the pruned transformers model."""
    source = write_checkpoint(folder / "source", canonical(hf_model(model), model), model)
    spec = choose(model, config, scores=scores, source_id=scores.source_id)
    spec.save(folder / "spec.json")
    assert PruneSpec.load(folder / "spec.json") == spec
    apply_spec(spec, source=source, out=folder / "out")
    return restore(*read_checkpoint(folder / "out")).state_dict(), spec


@pytest.mark.parametrize("merging", [HeadResidual.paper, HeadResidual.laco])
@pytest.mark.parametrize("groups", [4, 12])
@pytest.mark.parametrize("family", ["llama", "qwen2", "nemotron"])
def test_merged_projections(tmp_path: Path, family: str, merging: HeadResidual, groups: int) -> None:
    """Query rows (keys and values too, where heads have their own) are W + (W - V), or with LaCo's sign V."""
    model = shape(num_attention_heads=12, num_query_groups=groups, **FAMILIES[family])
    config = PruneConfig(
        num_layers=3,
        hidden_size=16,
        num_attention_heads=8,
        num_query_groups=min(groups, 8),
        head_residual=merging,
    )
    scores = random_scores(model, Aggregation.l2_mean, 3)
    have, spec = pruned(model, config, tmp_path, scores)
    teacher, width = hf_model(model).state_dict(), model.kv_channels
    per_group = 12 // groups
    merged = 0
    for new, old in enumerate(spec.layers):
        head_scores = scores.width[Aggregation.l2_mean].head[old]
        names = ["q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"]
        biases = [f"{name}_proj.bias" for name in "qkv"] if family == "qwen2" else []
        for name in names + biases:
            key = f"model.layers.{{}}.self_attn.{name}"
            dim = 1 if name == "o_proj.weight" else 0
            weight = teacher[key.format(old)]
            if weight.dim() == 2:
                weight = weight.index_select(1 - dim, torch.tensor(spec.hidden))
            by_unit = weight.unflatten(dim, (-1, width))
            units = spec.groups[new] if name[0] in "kv" else spec.heads[new]
            parts = []
            for unit in units:
                part = by_unit.select(dim, unit)
                peers = range(12) if per_group == 1 else range(unit // per_group * 3, unit // per_group * 3 + 3)
                ranked = sorted(peers, key=lambda head: -head_scores[head])
                keep = 8 if per_group == 1 else 2
                partner = 2 * keep - 1 - ranked.index(unit) if unit in ranked else len(ranked)
                if (name[0] == "q" or (per_group == 1 and name[0] != "o")) and partner < len(ranked):
                    other = by_unit.select(dim, ranked[partner])
                    part = part + (part - other if merging is HeadResidual.paper else other - part)
                    merged += 1
                parts.append(part)
            torch.testing.assert_close(have[key.format(new)], torch.cat(parts, dim), rtol=1e-12, atol=0)
    tensors = 2 if biases else 1
    assert merged == 3 * 4 * tensors * (3 if per_group == 1 else 1)  # every layer drops 4 heads


def test_pairs_that_do_not_fit() -> None:
    model = shape()
    config = PruneConfig(num_attention_heads=4, head_residual=HeadResidual.paper)
    spec = choose(model, config, scores=random_scores(model, Aggregation.l2_mean, 0), source_id="random")
    spec.validate()
    (kept, dropped), *rest = spec.head_pairs[1]
    others = spec.head_pairs[:1], spec.head_pairs[2:]
    for pair in (HeadPair(dropped, kept), HeadPair(kept, 99), HeadPair(kept, rest[0].dropped)):
        wrong = replace(spec, head_pairs=[*others[0], [pair], *others[1]])
        with pytest.raises(PruneError, match=r"head_pairs of layer 1 merge head .* name a kept head and a dropped one"):
            wrong.validate()
    with pytest.raises(PruneError, match="head_pairs has 0 lists, but head_residual=paper with 4 kept layers needs 4"):
        replace(spec, head_pairs=[]).validate()
    with pytest.raises(PruneError, match=r"head_pairs has 4 lists, but head_residual=none .* needs 0"):
        replace(spec, head_residual=HeadResidual.none).validate()
