"""Bringing the sums of a scoring pass together over ranks, and the input of an activation function."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from minitron.prune.depth_scores import Floats


def first_linear(output: tuple[Tensor, Tensor | None] | Tensor, width: int) -> Tensor:
    """What the activation function is applied to: the first ``width`` channels of the ffn's first linear.

    Of a gated ffn that is the gate's half. Megatron's linears leave their bias to be added by the caller.
    """
    values, bias = output if isinstance(output, tuple) else (output, None)
    return values[..., :width] if bias is None else values[..., :width] + bias[:width]


def all_reduce(tensors: Sequence[Tensor], group: ProcessGroup) -> None:
    """Sum tensors over a group, in place, with one collective."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat, group=group)
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def join_shards(shard: Tensor, group: ProcessGroup, *, replicated: bool) -> Tensor:
    """Join shards along the last dimension in rank order; replicas must be equal."""
    shards = [torch.empty_like(shard) for _ in range(group.size())]
    dist.all_gather(shards, shard.contiguous(), group=group)
    if not replicated:
        return torch.cat(shards, dim=-1)
    for other in shards[1:]:
        torch.testing.assert_close(other, shards[0], rtol=1e-6, atol=0.0)
    return shards[0]


def gather_layers(stage: dict[int, dict[str, Floats]], group: ProcessGroup | None) -> dict[int, dict[str, Floats]]:
    """The layers of all pipeline stages, by number."""
    if group is None:
        return stage
    stages: list[dict[int, dict[str, Floats]] | None] = [None] * group.size()
    dist.all_gather_object(stages, stage, group=group)
    return {number: sums for part in stages if part for number, sums in part.items()}
