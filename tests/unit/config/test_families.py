"""What is refused for which architecture."""

from dataclasses import replace

import pytest

from minitron.config.families import check_family
from minitron.config.model import Architecture, ModelConfig
from minitron.config.prune import HeadResidual, PruneConfig
from minitron.config.reconstruct import ReconstructConfig
from minitron.config.score import ScoreConfig
from minitron.errors import PruneError

DENSE = ModelConfig(
    architecture=Architecture.llama,
    num_layers=2,
    hidden_size=16,
    ffn_hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=4,
    vocab_size=32,
    max_position_embeddings=64,
    layernorm_epsilon=1e-5,
    rotary_base=10000.0,
)
EXPERTS = replace(DENSE, architecture=Architecture.qwen3_moe, num_moe_experts=4, moe_router_topk=2)
SLICED = PruneConfig(reconstruct=ReconstructConfig(enabled=False))


@pytest.mark.parametrize("architecture", list(Architecture)[:5])
def test_only_llama_like_layers_are_fitted(architecture: Architecture) -> None:
    source = replace(DENSE, architecture=architecture)
    target = replace(source, hidden_size=8)
    check_family(source, target, SLICED, ScoreConfig())
    check_family(source, source, PruneConfig(), ScoreConfig())  # nothing is cut, so nothing is fitted
    if architecture in (Architecture.llama, Architecture.mistral):
        check_family(source, target, PruneConfig(), ScoreConfig())
        return
    with pytest.raises(PruneError, match=rf"{architecture}; set prune\.reconstruct\.enabled=false"):
        check_family(source, target, PruneConfig(), ScoreConfig())


@pytest.mark.parametrize("architecture", list(Architecture)[:5])
def test_queries_that_are_normed_are_not_merged(architecture: Architecture) -> None:
    source = replace(DENSE, architecture=architecture)
    target = replace(source, num_attention_heads=2)
    merged = replace(SLICED, head_residual=HeadResidual.laco)
    if architecture is not Architecture.qwen3:
        check_family(source, target, merged, ScoreConfig())
        return
    with pytest.raises(PruneError, match=r"Qwen3ForCausalLM norms them afterwards.* set prune\.head_residual=none"):
        check_family(source, target, merged, ScoreConfig())


def test_experts_are_not_scored_in_rounds() -> None:
    target = replace(EXPERTS, num_moe_experts=2)
    check_family(EXPERTS, target, SLICED, ScoreConfig())
    with pytest.raises(PruneError, match=r"set score\.rounds=1"):
        check_family(EXPERTS, target, SLICED, ScoreConfig(rounds=2))
