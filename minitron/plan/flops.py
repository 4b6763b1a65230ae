"""Floating-point operations of a model, from its axes table; a multiplication and an addition are two."""

from dataclasses import dataclass

import numpy as np

from minitron.config.model import ModelConfig
from minitron.config.parallel import ParallelConfig, RecomputeGranularity, RecomputeMethod
from minitron.models.axes import layer_shape, params_of


@dataclass(frozen=True)
class ForwardFlops:
    """One forward pass, per token.

    Attributes:
        linears: Matrix products of the layers' weights: 2 x their elements, of the experts those that a token goes to.
        attention: Scores and weighted values: 4 x heads x head size x the mean number of tokens attended to. A token
            at position i attends to i of them, or to the sliding window if that is shorter; so the mean is
            (S + 1) / 2 without a window.
        output: The output layer: 2 x vocabulary x hidden size. Looking up an embedding takes none.
    """

    linears: float
    attention: float
    output: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.linears + self.attention + self.output


def forward_flops(model: ModelConfig, seq_length: int) -> ForwardFlops:
    """FLOPs of a forward pass per token.

    Args:
        model: The architecture.
        seq_length: Tokens of a sequence; each attends to those before it and to itself.
    """
    stacked = 0
    for param in (param for param in params_of(model) if param.stacked and len(param.dims) > 1):
        times = (model.moe_router_topk or 1) if param.per_expert else 1  # experts that a token goes to
        stacked += times * int(np.prod(layer_shape(param, model)))
    window = min(model.sliding_window or seq_length, seq_length)
    attended = (window * (window + 1) / 2 + (seq_length - window) * window) / seq_length
    width = model.num_attention_heads * model.kv_channels
    return ForwardFlops(
        linears=2.0 * model.num_layers * stacked,
        attention=4.0 * model.num_layers * width * attended,
        output=2.0 * model.vocab_size * model.hidden_size,
    )


def training_flops(model: ModelConfig, seq_length: int, parallel: ParallelConfig) -> float:
    """FLOPs of forward and backward per token, 3 x the forward's, and of what is computed again.

    Args:
        model: The architecture.
        seq_length: Tokens of a sequence.
        parallel: Says what the backward pass computes again: the attention (``selective``) or whole layers (``full``;
            with ``block`` the first `recompute_num_layers` of each stage's chunks).
    """
    forward = forward_flops(model, seq_length)
    again = 0.0
    if parallel.recompute_granularity is RecomputeGranularity.selective:
        again = forward.attention
    elif parallel.recompute_granularity is RecomputeGranularity.full:
        chunks = parallel.num_chunks * parallel.pipeline_model_parallel_size
        share = 1.0
        if parallel.recompute_method is RecomputeMethod.block:
            share = min(1.0, (parallel.recompute_num_layers or 0) * chunks / model.num_layers)
        again = share * (forward.linears + forward.attention)
    return 3 * forward.total + again
