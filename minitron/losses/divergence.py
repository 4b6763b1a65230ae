"""The losses themselves: one small object each, on a block of tokens.

A new loss is a new object with the `Divergence` call: everything around it (output layers, chunks,
token weights, dtypes, autograd) is in `minitron.losses.engine`.
"""

from typing import Protocol

import torch
from torch import Tensor

from minitron.losses.vocab import ScaledSums, VocabShard, row_max


class Scratch:
    """Work memory shared by the blocks of one loss: fresh memory for each costs page faults on a CPU."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def like(self, name: str, block_Cv: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Uninitialised memory of the block's shape; the same name gives the same memory again.

        Args:
            name: what it is for.
            block_Cv: the block; the first one asked for must have the most tokens.
            dtype: dtype, None for the block's.
        """
        if name not in self._buffers:
            self._buffers[name] = block_Cv.new_empty(block_Cv.shape, dtype=dtype)
        return self._buffers[name][: block_Cv.shape[0]]


class Divergence(Protocol):
    """Loss per token and its gradient with respect to the student's logits.

    Logits are fp32 (fp64 for fp64 inputs), over this rank's valid columns, and read only.
    """

    def __call__(
        self,
        student_Cv: Tensor,
        target: Tensor,
        grad_Cv: Tensor | None,
        weight_C: Tensor,
        vocab: VocabShard,
        scratch: Scratch,
    ) -> Tensor:
        """Compute one block.

        Args:
            student_Cv: student's logits.
            target: the teacher's logits [C, v], or labels [C].
            grad_Cv: where to write d(sum of weight * loss) / d student_Cv; None when no gradient is
                needed. It may be the memory of ``student_Cv``, which may then be overwritten.
            weight_C: weight of each token.
            vocab: this rank's columns, and the reduction over the tensor-parallel group.
            scratch: work memory.

        Returns:
            Unweighted loss of each token, in nats, equal on all ranks.
        """


def forward_kl(
    student_Cv: Tensor,
    target: Tensor,
    grad_Cv: Tensor | None,
    weight_C: Tensor,
    vocab: VocabShard,
    scratch: Scratch,
) -> Tensor:
    """KL(teacher || student) = sum_v p_v (t_v - s_v) - lse(t) + lse(s), with gradient q - p.

    The dot product takes the difference of the logits, not that of two large sums: fp32 precision.
    """
    teacher_max_C, student_max_C = row_max(target), row_max(student_Cv)
    diff_Cv = torch.sub(target, student_Cv, out=scratch.like("diff", target))
    teacher_exp_Cv = torch.sub(target, teacher_max_C[:, None], out=scratch.like("teacher_exp", target)).exp_()
    student_out_Cv = scratch.like("student_exp", student_Cv) if grad_Cv is None else grad_Cv
    student_exp_Cv = torch.sub(student_Cv, student_max_C[:, None], out=student_out_Cv).exp_()
    dot_C = diff_Cv.mul_(teacher_exp_Cv).sum(-1)
    teacher, student = vocab.merge(
        ScaledSums(teacher_max_C, (teacher_exp_Cv.sum(-1), dot_C)),
        ScaledSums(student_max_C, (student_exp_Cv.sum(-1),)),
    )
    teacher_sum_C, dot_C = teacher.sums
    (student_sum_C,) = student.sums
    if grad_Cv is not None:
        student_scale_C = weight_C * (student_max_C - student.max_C).exp() / student_sum_C
        teacher_scale_C = weight_C * (teacher_max_C - teacher.max_C).exp() / teacher_sum_C
        # Two rounded products, not addcmul's fused one: where q = p the gradient is exactly zero.
        grad_Cv.mul_(student_scale_C[:, None]).sub_(teacher_exp_Cv.mul_(teacher_scale_C[:, None]))
    log_ratio_C = (student.max_C - teacher.max_C) + (student_sum_C.log() - teacher_sum_C.log())
    return dot_C / teacher_sum_C + log_ratio_C


def cross_entropy(
    student_Cv: Tensor,
    target: Tensor,
    grad_Cv: Tensor | None,
    weight_C: Tensor,
    vocab: VocabShard,
    scratch: Scratch,
) -> Tensor:
    """Cross-entropy with label ids, lse(s) - s_label, with gradient q - onehot(label).

    A label outside the vocabulary gives NaN.
    """
    max_C = row_max(student_Cv)
    index_C = target - vocab.start
    here_C = (index_C >= 0) & (index_C < vocab.num_valid)
    index_C1 = index_C.clamp(0, max(0, vocab.num_valid - 1))[:, None]
    label_C = torch.zeros_like(weight_C)
    if vocab.num_valid:
        label_C = student_Cv.gather(1, index_C1).squeeze(1).where(here_C, label_C)
    out_Cv = scratch.like("student_exp", student_Cv) if grad_Cv is None else grad_Cv
    exp_Cv = torch.sub(student_Cv, max_C[:, None], out=out_Cv).exp_()
    softmax, label = vocab.merge(
        ScaledSums(max_C, (exp_Cv.sum(-1),)), ScaledSums(torch.zeros_like(label_C), (label_C,))
    )
    (sum_C,), (label_C,) = softmax.sums, label.sums
    if grad_Cv is not None and vocab.num_valid:
        grad_Cv.mul_((weight_C * (max_C - softmax.max_C).exp() / sum_C)[:, None])
        grad_Cv.scatter_add_(1, index_C1, (-weight_C * here_C)[:, None])
    known_C = (target >= 0) & (target < vocab.vocab_size)
    return (softmax.max_C - label_C + sum_C.log()).where(known_C, torch.nan)
