"""Losses between two hidden states, each the weighted sum over tokens."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minitron.config.intermediate import HiddenLoss


def hidden_loss(kind: HiddenLoss, teacher_SBH: Tensor, student_SBH: Tensor, weights_SB: Tensor) -> Tensor:
    """Distance of hidden states of one width, computed in fp32 at least.

    Args:
        kind: ``cosine``: 1 - cos per token. ``mse``: mean over channels of the squared difference.
        teacher_SBH: The teacher's states.
        student_SBH: The student's, already at the teacher's width.
        weights_SB: Weights of the tokens.

    Returns:
        The weighted sum over tokens, a scalar.
    """
    dtype = torch.promote_types(student_SBH.dtype, torch.float32)
    teacher_SBH, student_SBH = teacher_SBH.to(dtype), student_SBH.to(dtype)
    if kind is HiddenLoss.cosine:
        per_token_SB = 1 - F.cosine_similarity(student_SBH, teacher_SBH, dim=-1)
    else:
        per_token_SB = (student_SBH - teacher_SBH).square().mean(-1)
    return (per_token_SB * weights_SB.to(dtype)).sum()


def relation_loss(teacher_SBX: Tensor, student_SBX: Tensor, weights_SB: Tensor, *, heads: int) -> Tensor:
    """KL(teacher || student) between the relations of queries (or keys, or values) with one another.

    A relation is softmax(X X^T / sqrt(d)) of one head of d channels; the channels of all heads of a model are
    regrouped into ``heads``, so the two models' widths may differ (MiniLMv2, arXiv 2012.15828, section 3.1). Here a
    position relates to itself and those before it, as in the decoder's own attention.

    One head's relations exist at a time; their gradient has a closed form and is taken in the forward pass.

    Args:
        teacher_SBX: The teacher's vectors, heads side by side.
        student_SBX: The student's; its width may be another.
        weights_SB: Weights of the positions.
        heads: Relation heads in these channels.

    Returns:
        The weighted sum over positions, and the sum over heads, a scalar.
    """
    loss: Tensor = _RelationLoss.apply(student_SBX, teacher_SBX, weights_SB, heads)  # type: ignore[no-untyped-call]
    return loss


class _RelationLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student_SBX: Tensor, teacher_SBX: Tensor, weights_SB: Tensor, heads: int) -> Tensor:
        dtype = torch.promote_types(student_SBX.dtype, torch.float32)
        weights_BS = weights_SB.t().to(dtype)
        length = student_SBX.shape[0]
        later_SS = torch.ones(length, length, dtype=torch.bool, device=student_SBX.device).triu(1)
        loss = torch.zeros((), dtype=dtype, device=student_SBX.device)
        gradient_SBX = torch.empty_like(student_SBX, dtype=dtype)
        teacher_heads, student_heads = teacher_SBX.chunk(heads, -1), student_SBX.chunk(heads, -1)
        for teacher, student, gradient in zip(teacher_heads, student_heads, gradient_SBX.chunk(heads, -1), strict=True):
            student_BSD = student.transpose(0, 1).to(dtype)
            log_p_BSS = _log_relation(teacher.transpose(0, 1).to(dtype), later_SS)
            log_q_BSS = _log_relation(student_BSD, later_SS)
            p_BSS = log_p_BSS.exp()
            kl_BS = (p_BSS * (log_p_BSS - log_q_BSS).masked_fill(later_SS, 0)).sum(-1)
            loss += (kl_BS * weights_BS).sum()
            # d KL / d scores = q - p; a score is the product of two vectors, each of which takes its part.
            scores_BSS = (log_q_BSS.exp() - p_BSS) * weights_BS[..., None] / math.sqrt(student_BSD.shape[-1])
            gradient.copy_(((scores_BSS + scores_BSS.transpose(1, 2)) @ student_BSD).transpose(0, 1))
        ctx.save_for_backward(gradient_SBX.to(student_SBX.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient_SBX,) = ctx.saved_tensors
        return gradient_SBX * grads[0].to(gradient_SBX.dtype), None, None, None


def _log_relation(heads_BSD: Tensor, later_SS: Tensor) -> Tensor:
    scores_BSS = heads_BSD @ heads_BSD.transpose(1, 2) / math.sqrt(heads_BSD.shape[-1])
    return scores_BSS.masked_fill(later_SS, -math.inf).log_softmax(-1)
