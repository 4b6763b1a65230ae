"""FLOPs against a case worked by hand, and against what torch counts in a real model."""

from dataclasses import replace

import pytest

from minitron.config.model import Architecture, ModelConfig
from minitron.config.parallel import ParallelConfig, RecomputeGranularity, RecomputeMethod
from minitron.plan.flops import forward_flops, training_flops

MODEL = ModelConfig(
    architecture=Architecture.llama,
    num_layers=2,
    hidden_size=8,
    ffn_hidden_size=12,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=3,
    vocab_size=10,
    max_position_embeddings=16,
    layernorm_epsilon=1e-5,
    rotary_base=10000.0,
)
# One layer by hand: q 8 x 12, k and v 8 x 6 each, o 12 x 8, gate and up 8 x 12 each, down 12 x 8.
LINEARS = 2 * 2 * (96 + 48 + 48 + 96 + 96 + 96 + 96)
# Four positions see 1, 2, 3, 4 tokens: 2.5; scores and values, 2 x 12 each.
ATTENTION = 2 * (2 * 12 * 2.5 + 2 * 12 * 2.5)
OUTPUT = 2 * 10 * 8


def test_forward_by_hand() -> None:
    flops = forward_flops(MODEL, 4)
    assert (flops.linears, flops.attention, flops.output) == (LINEARS, ATTENTION, OUTPUT)
    assert flops.total == LINEARS + ATTENTION + OUTPUT
    tied = replace(MODEL, share_embeddings_and_output_weights=True)
    assert forward_flops(tied, 4) == flops  # the output layer is computed all the same


def test_sliding_window_by_hand() -> None:
    windowed = replace(MODEL, architecture=Architecture.mistral, sliding_window=2)
    assert forward_flops(windowed, 4).attention == 2 * 48 * (1 + 2 + 2 + 2) / 4
    assert forward_flops(replace(windowed, sliding_window=9), 4).attention == ATTENTION


@pytest.mark.parametrize(
    ("parallel", "again"),
    [
        (ParallelConfig(), 0),
        (ParallelConfig(recompute_granularity=RecomputeGranularity.selective), ATTENTION),
        (
            ParallelConfig(
                recompute_granularity=RecomputeGranularity.full,
                recompute_method=RecomputeMethod.uniform,
                recompute_num_layers=1,
            ),
            LINEARS + ATTENTION,
        ),
        (
            ParallelConfig(
                recompute_granularity=RecomputeGranularity.full,
                recompute_method=RecomputeMethod.block,
                recompute_num_layers=1,
            ),
            (LINEARS + ATTENTION) / 2,
        ),
    ],
)
def test_training_is_three_forwards_and_what_is_computed_again(parallel: ParallelConfig, again: float) -> None:
    assert training_flops(MODEL, 4, parallel) == 3 * (LINEARS + ATTENTION + OUTPUT) + again
