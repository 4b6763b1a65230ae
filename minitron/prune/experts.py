"""What experts did with the tokens that were routed to them, as if every expert had seen every token."""

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from minitron.prune.depth_scores import Floats


def spread(activation_TX: Tensor, layer: Any, expert: int, seq_length: int) -> Tensor:
    """Put an expert's activation back to the tokens it belongs to, zero at those that are routed elsewhere.

    An expert sees its tokens in a row, whatever sample they are of: scores that do not depend on how samples are
    grouped need them apart.

    Args:
        activation_TX: One row for each token that was routed to the expert.
        layer: The Megatron layer, in its forward pass.
        expert: Number of the expert.
        seq_length: Tokens of every sequence.

    Returns:
        activation_SBX.
    """
    dispatcher = layer.mlp.token_dispatcher
    routed_T: Tensor = dispatcher.local_map[:, expert]  # over S x B, the sequence outside
    whole = activation_TX.new_zeros(len(routed_T), activation_TX.shape[-1])
    whole[routed_T] = activation_TX
    # Without sequence parallelism each tensor-parallel rank hands in every token.
    copies: Tensor = whole.view(dispatcher.tp_size, seq_length, -1, activation_TX.shape[-1])
    return copies[0]


def output_norms(output_TH: Tensor, layer: Any) -> Tensor:
    """``[T, 1]``: norms of what an expert adds to the layer's output; a rank holds a part of every sum."""
    whole_TH = output_TH.to(torch.float64, copy=True)  # the sum over ranks must not reach the layer itself
    if layer.mlp.token_dispatcher.tp_size > 1:
        dist.all_reduce(whole_TH, group=layer.mlp.token_dispatcher.tp_group)
    norms_T1: Tensor = whole_TH.norm(dim=-1, keepdim=True)
    return norms_T1


def expert_scores(sums_L2E: Floats) -> Floats:
    """``[L, E]``: the mean norm over an expert's tokens; 0 for an expert that got none.

    Args:
        sums_L2E: Sum of the norms, and number of the tokens.
    """
    total, tokens = sums_L2E[:, 0], sums_L2E[:, 1]
    scores: Floats = np.divide(total, tokens, out=np.zeros_like(total), where=tokens > 0)
    return scores
