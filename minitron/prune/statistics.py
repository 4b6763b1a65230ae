"""The numbers that scores are made of.

Every activation is first reduced over the sequence, sample by sample; per unit, the sum of those
numbers and the sum of their squares over samples are kept in float64. That is enough for every
batch reduction, and makes the scores independent of how samples were grouped into micro-batches and
spread over ranks.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from minitron.config.score import Reduction
from minitron.prune.scores import Floats

TOTAL, SQUARES = 0, 1
"""Places of the two sums over samples."""

_CHUNK_ELEMENTS = 2**24
"""Elements of an activation that are held in float64 at once (128 MiB)."""


def reduce_sequence(
    activation_SBX: Tensor, reductions: Sequence[Reduction], *, per_head: int | None = None
) -> dict[Reduction, Tensor]:
    """Reduce an activation over the sequence, in float64, a chunk of tokens at a time.

    Args:
        activation_SBX: The activation; X is any unit.
        reductions: Which reductions to compute.
        per_head: Replace every run of so many channels by its L2 norm, token by token, first.

    Returns:
        ``[B, X]`` per reduction (``[B, X / per_head]`` with heads).
    """
    length, batch = activation_SBX.shape[:2]
    absolute = signed = squares = torch.zeros((), dtype=torch.float64)
    step = max(1, _CHUNK_ELEMENTS // activation_SBX[0].numel())
    for part in activation_SBX.split(step):
        chunk = part.double()
        if per_head is not None:
            chunk = chunk.reshape(len(part), batch, -1, per_head).norm(dim=-1)
        squares = squares + chunk.square().sum(dim=0)
        signed = signed + chunk.sum(dim=0)
        absolute = absolute + chunk.abs().sum(dim=0)
    values = {
        Reduction.mean: absolute / length,
        Reduction.l2: squares.sqrt(),
        Reduction.var: (squares / length - (signed / length).square()).clamp_min(0),
    }
    return {reduction: values[reduction] for reduction in reductions}


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
    """``[B]``: the sum over a sample's tokens of ``1 - cos``, in float64."""
    distance_B = torch.zeros(before_SBH.shape[1], dtype=torch.float64, device=before_SBH.device)
    step = max(1, _CHUNK_ELEMENTS // before_SBH[0].numel())
    for before, after in zip(before_SBH.split(step), after_SBH.split(step), strict=True):
        cosine = torch.cosine_similarity(before.double(), after.double(), dim=-1)
        distance_B += (1 - cosine).sum(dim=0)
    return distance_B
