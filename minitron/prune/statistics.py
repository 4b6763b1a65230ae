"""The numbers that scores are made of.

Every activation is first reduced over the sequence, sample by sample; per unit, the sum of those
numbers and the sum of their squares over samples are kept in float64. That is enough for every
batch reduction, and makes the scores independent of how samples were grouped into micro-batches and
spread over ranks.

Sums are float64, but for those of a chunk's bf16 values: fp32 holds 65,536 of them of one size exactly, and is half the
work. Norms over a token's channels are at least fp32. What rounding there is comes from the forward pass. On a CPU that
is cheap as long as a chunk of tokens stays in the cache between one step and the next.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from minitron.config.score import Reduction
from minitron.prune.depth_scores import Floats

TOTAL, SQUARES = 0, 1
"""Places of the two sums over samples."""

_CHUNK_ELEMENTS = {"cpu": 300_000, "cuda": 2**24}
"""Elements of an activation that are worked on at once: 1.2 MB of a core's cache in fp32, 64 MiB of a GPU's memory."""


def reduce_sequence(
    activation_SBX: Tensor, reductions: Sequence[Reduction], *, per_head: int | None = None
) -> dict[Reduction, Tensor]:
    """Reduce an activation over the sequence, a chunk of tokens at a time.

    Args:
        activation_SBX: The activation; X is any unit.
        reductions: Which reductions to compute; what none of them needs is not.
        per_head: Replace every run of so many channels by its L2 norm, token by token, first.

    Returns:
        ``[B, X]`` per reduction in float64 (``[B, X / per_head]`` with heads).
    """
    length, width = len(activation_SBX), activation_SBX.shape[-1] // (per_head or 1)
    absolute = signed = squares = torch.zeros((), dtype=torch.float64)
    scratch_CBX: Tensor | None = None
    for chunk in _chunks(activation_SBX):
        values = chunk if per_head is None else _norms(chunk.unflatten(-1, (width, per_head)))
        if Reduction.mean in reductions:
            wider = torch.float32 if values.dtype is torch.bfloat16 else torch.float64
            absolute = absolute + values.abs().sum(dim=0, dtype=wider).double()
        if Reduction.var in reductions:
            signed = signed + values.sum(dim=0, dtype=torch.float64)
        if Reduction.l2 in reductions or Reduction.var in reductions:
            if scratch_CBX is None:  # the first chunk is the longest
                scratch_CBX = torch.empty_like(values, dtype=torch.float64)
            squares = squares + scratch_CBX[: len(values)].copy_(values).square_().sum(dim=0)
    reduced = {
        Reduction.mean: absolute / length,
        Reduction.l2: squares.sqrt(),
        Reduction.var: (squares / length - (signed / length).square()).clamp_min(0),
    }
    return {reduction: reduced[reduction] for reduction in reductions}


def reduce_batch(sums: Floats, count: int, reduction: Reduction) -> Floats:
    """Reduce over samples.

    Args:
        sums: ``[2, width]``: over samples, the sum of the sequence reductions (none is negative, so
            it is also the sum of their absolute values) and the sum of their squares.
        count: Number of samples.
        reduction: How.
    """
    mean: Floats = sums[TOTAL] / count
    root: Floats = np.sqrt(sums[SQUARES])
    variance: Floats = np.maximum(sums[SQUARES] / count - mean**2, 0.0)
    return {Reduction.mean: mean, Reduction.l2: root, Reduction.var: variance}[reduction]


def cosine_distance(before_SBH: Tensor, after_SBH: Tensor) -> Tensor:
    """``[B]``: the sum over a sample's tokens of ``1 - cos``, in float64.

    From three norms, which is quicker than from a dot product:
    ``1 - cos = (|b - a|^2 - (|b| - |a|)^2) / (2 |a| |b|)``. It is 0 where a state is 0.
    """
    distance_B = torch.zeros(before_SBH.shape[1], dtype=torch.float64, device=before_SBH.device)
    for before, after in zip(_chunks(before_SBH), _chunks(after_SBH), strict=True):
        before, after = before.to(_working_dtype(before)), after.to(_working_dtype(after))
        before_CB, after_CB, step_CB = (_norms(x).double() for x in (before, after, after - before))
        product_CB = (2 * before_CB * after_CB).clamp_min(torch.finfo(torch.float64).tiny)
        distance_B += ((step_CB.square() - (after_CB - before_CB).square()) / product_CB).sum(dim=0)
    return distance_B


def _chunks(activation_SBX: Tensor) -> Sequence[Tensor]:
    """Runs of tokens."""
    tokens = _CHUNK_ELEMENTS[activation_SBX.device.type] // activation_SBX[0].numel()
    chunks: Sequence[Tensor] = activation_SBX.split(max(1, tokens))
    return chunks


def _norms(values: Tensor) -> Tensor:
    """L2 norms over the last dimension, in fp32 or better."""
    norms: Tensor = torch.linalg.vector_norm(values.to(_working_dtype(values)), dim=-1)
    return norms


def _working_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
