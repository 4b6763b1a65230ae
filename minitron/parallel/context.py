"""Which positions of a sequence each context-parallel rank holds.

A sequence is cut into two chunks per rank, and rank r holds chunks r and 2 CP - 1 - r: under a causal mask every
rank then has as many (query, key) pairs. It is the order that Megatron-Core's rotary embedding and Transformer
Engine's attention expect.
"""

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup


def context_positions(length: int, *, rank: int, size: int) -> Tensor:
    """Positions that one context-parallel rank holds, in its order, [length / size].

    Args:
        length: Tokens of the whole sequence, a multiple of ``2 * size``.
        rank: Place in the context-parallel group.
        size: Ranks of the group.
    """
    if size == 1:
        return torch.arange(length)
    chunks = torch.arange(length).view(2 * size, -1)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]])


def gathered_positions(length: int, *, size: int) -> Tensor:
    """Positions of the whole sequence in the order in which gathering the ranks' parts leaves them, [length]."""
    return torch.cat([context_positions(length, rank=rank, size=size) for rank in range(size)])


def whole_sequence(hidden_SBH: Tensor, cp_group: ProcessGroup) -> Tensor:
    """Gather a state over the context-parallel ranks and put it in the sequence's order, for comparisons.

    Args:
        hidden_SBH: This rank's positions.
        cp_group: The context-parallel group.
    """
    size = cp_group.size()
    if size == 1:
        return hidden_SBH
    gathered: Tensor = gather_from_sequence_parallel_region(hidden_SBH, group=cp_group)
    order = gathered_positions(len(gathered), size=size).argsort()
    return gathered.index_select(0, order.to(gathered.device))
