"""Losses over the full vocabulary: `Divergence` objects on two rows of logits, or on logits and labels.

p is the teacher's distribution (logits t), q the student's (logits s). The teacher's logits come in the
student's dtype and divided by the temperature (`minitron.losses.select`). Each gradient is exactly zero where
the student's logits are the teacher's: differences are taken before sums.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from minitron.losses.divergence import Block
from minitron.losses.vocab import ScaledSums, VocabShard, row_max


class _Softmax(NamedTuple):
    """A softmax over this rank's columns, and what joins it to the other ranks'.

    Attributes:
        probs_Cv: sums to 1 over this rank's columns; may be overwritten.
        max_C: largest logit, -inf without columns.
        sum_C: sum of exp(logit - max).
    """

    probs_Cv: Tensor
    max_C: Tensor
    sum_C: Tensor

    @classmethod
    def of(cls, logits_Cv: Tensor, out_Cv: Tensor) -> "_Softmax":
        """PyTorch's kernel goes through a row once, where separate operations cost a pass through memory each.

        It is not said to work in place: ``out_Cv`` must be other memory.
        """
        torch.softmax(logits_Cv, -1, out=out_Cv)
        # The largest probability is exp(0) / sum.
        return cls(out_Cv, row_max(logits_Cv), row_max(out_Cv).reciprocal())

    def sums(self, *means: Tensor) -> ScaledSums:
        """The denominator, and sums over the columns from means under the local softmax."""
        return ScaledSums(self.max_C, (self.sum_C, *(mean_C * self.sum_C for mean_C in means)))

    def over_all(self, whole: ScaledSums, vocab: VocabShard) -> Tensor:
        """The probabilities over every rank's columns, in the same memory."""
        if vocab.num_ranks == 1:
            return self.probs_Cv
        share_C = (self.max_C - whole.max_C).exp() * self.sum_C / whole.sums[0]
        return self.probs_Cv.mul_(share_C[:, None])


def _log_ratio(student: ScaledSums, teacher: ScaledSums) -> Tensor:
    """lse(s) - lse(t), from sums over all columns."""
    return (student.max_C - teacher.max_C) + (student.sums[0].log() - teacher.sums[0].log())


def forward_kl(block: Block[Tensor]) -> Tensor:
    """KL(teacher || student) = sum_v p_v (t_v - s_v) - lse(t) + lse(s), with gradient q - p.

    The dot product takes the difference of the logits, not that of two large sums: fp32 precision.
    """
    student_Cv, target, grad_Cv, weight_C, vocab, scratch = block
    diff_Cv = torch.sub(target, student_Cv, out=scratch.like("diff", target))
    local_teacher = _Softmax.of(target, scratch.like("teacher_probs", target))
    dot_C = diff_Cv.mul_(local_teacher.probs_Cv).sum(-1)
    local_student = _Softmax.of(student_Cv, diff_Cv)
    teacher, student = vocab.merge(local_teacher.sums(dot_C), local_student.sums())
    if grad_Cv is not None:
        teacher_Cv = local_teacher.over_all(teacher, vocab)
        torch.sub(local_student.over_all(student, vocab), teacher_Cv, out=grad_Cv).mul_(weight_C[:, None])
    teacher_sum_C, dot_C = teacher.sums
    return dot_C / teacher_sum_C + _log_ratio(student, teacher)


def reverse_kl(block: Block[Tensor]) -> Tensor:
    """KL(student || teacher) = sum_v q_v (s_v - t_v) - lse(s) + lse(t), with gradient q (s - t - its mean under q)."""
    student_Cv, target, grad_Cv, weight_C, vocab, scratch = block
    diff_Cv = torch.sub(student_Cv, target, out=scratch.like("diff", target))
    local_teacher = _Softmax.of(target, scratch.like("teacher_probs", target))
    local_student = _Softmax.of(student_Cv, scratch.like("student_probs", target))
    dot_C = torch.mul(local_student.probs_Cv, diff_Cv, out=local_teacher.probs_Cv).sum(-1)
    teacher, student = vocab.merge(local_teacher.sums(), local_student.sums(dot_C))
    student_sum_C, dot_C = student.sums
    mean_C = dot_C / student_sum_C
    if grad_Cv is not None:
        student_Cv = local_student.over_all(student, vocab)
        torch.mul(student_Cv, diff_Cv.sub_(mean_C[:, None]), out=grad_Cv).mul_(weight_C[:, None])
    return mean_C - _log_ratio(student, teacher)


class _Softmaxes(NamedTuple):
    """Both distributions, each in memory that may be overwritten, and lse(s) - lse(t)."""

    teacher_Cv: Tensor
    student_Cv: Tensor
    log_ratio_C: Tensor


def _softmaxes(block: Block[Tensor]) -> _Softmaxes:
    """Both distributions over all columns. One collective."""
    student_Cv, target, vocab, scratch = block.student_Cv, block.target, block.vocab, block.scratch
    local_teacher = _Softmax.of(target, scratch.like("teacher_probs", target))
    local_student = _Softmax.of(student_Cv, scratch.like("student_probs", target))
    teacher, student = vocab.merge(local_teacher.sums(), local_student.sums())
    return _Softmaxes(
        local_teacher.over_all(teacher, vocab), local_student.over_all(student, vocab), _log_ratio(student, teacher)
    )


def _add_up(vocab: VocabShard, *sums: Tensor) -> tuple[Tensor, ...]:
    """Sums over all ranks' columns."""
    (whole,) = vocab.merge(ScaledSums(torch.zeros_like(sums[0]), sums))
    return whole.sums


@dataclass(frozen=True)
class JensenShannon:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q.

    Its gradient is (1 - beta) q (log(q / m) - KL(q || m)). From d = log(q / p), with c = beta where q is
    the larger of the two and 1 - beta elsewhere: log(m / max(p, q)) = log1p(c expm1(-|d|)), which neither
    overflows nor loses the digits of a small d.

    Attributes:
        beta: the teacher's weight, in (0, 1).
    """

    beta: float

    def __call__(self, block: Block[Tensor]) -> Tensor:
        """Compute one block, see `Divergence`."""
        student_Cv, target, grad_Cv, weight_C, vocab, scratch = block
        ratio_Cv = torch.sub(student_Cv, target, out=scratch.like("diff", target))
        teacher_Cv, student_Cv, log_ratio_C = _softmaxes(block)
        ratio_Cv.sub_(log_ratio_C[:, None])
        log_m_Cv = torch.abs(ratio_Cv, out=scratch.like("log_m", target)).neg_().expm1_()
        factor_Cv = scratch.like("student_term", target).fill_(1 - self.beta)
        log_m_Cv.mul_(factor_Cv.masked_fill_(ratio_Cv >= 0, self.beta)).log1p_()  # log(m / max(p, q))
        student_term_Cv = torch.clamp(ratio_Cv, max=0, out=scratch.like("student_term", target))
        torch.sub(log_m_Cv, student_term_Cv, out=student_term_Cv)  # log(m / q)
        log_m_Cv += ratio_Cv.clamp_(min=0)  # log(m / p)
        teacher_sum_C = teacher_Cv.mul_(log_m_Cv).sum(-1)
        student_sum_C = torch.mul(student_Cv, student_term_Cv, out=teacher_Cv).sum(-1)
        teacher_kl_C, student_kl_C = _add_up(vocab, -teacher_sum_C, -student_sum_C)
        if grad_Cv is not None:
            scale_C = (self.beta - 1) * weight_C
            torch.mul(student_Cv, student_term_Cv.add_(student_kl_C[:, None]), out=grad_Cv).mul_(scale_C[:, None])
        return self.beta * teacher_kl_C + (1 - self.beta) * student_kl_C


def mse(block: Block[Tensor]) -> Tensor:
    """Mean over the vocabulary of (q - p)^2, with gradient 2/V q (q - p - sum_u q_u (q_u - p_u))."""
    student_Cv, target, grad_Cv, weight_C, vocab, scratch = block
    teacher_Cv, student_Cv, _ = _softmaxes(block)
    diff_Cv = torch.sub(student_Cv, teacher_Cv, out=teacher_Cv)
    product_Cv = scratch.like("diff", target)
    square_C = torch.mul(diff_Cv, diff_Cv, out=product_Cv).sum(-1)
    dot_C = torch.mul(student_Cv, diff_Cv, out=product_Cv).sum(-1)
    square_C, dot_C = _add_up(vocab, square_C, dot_C)
    if grad_Cv is not None:
        scale_C = weight_C * (2 / vocab.vocab_size)
        torch.mul(student_Cv, diff_Cv.sub_(dot_C[:, None]), out=grad_Cv).mul_(scale_C[:, None])
    return square_C / vocab.vocab_size


def cosine(block: Block[Tensor]) -> Tensor:
    """1 - cos(p, q) = |p/|p| - q/|q||^2 / 2, with gradient q' (q' - p' - loss q') where ' is over the length.

    Softmax' denominators cancel: only the sums of squares are needed.
    """
    student_Cv, target, grad_Cv, weight_C, vocab, scratch = block
    outs = (scratch.like("teacher_probs", target), block.work_memory())
    product_Cv = scratch.like("diff", target)
    units, parts = [], []
    for logits_Cv, out_Cv in zip((target, student_Cv), outs, strict=True):
        max_C = row_max(logits_Cv)
        units.append(torch.sub(logits_Cv, max_C[:, None], out=out_Cv).exp_())
        parts.append(ScaledSums(2 * max_C, (torch.mul(out_Cv, out_Cv, out=product_Cv).sum(-1),)))
    for unit_Cv, part, whole in zip(units, parts, vocab.merge(*parts), strict=True):
        unit_Cv.mul_((((part.max_C - whole.max_C) / 2).exp() / whole.sums[0].sqrt())[:, None])
    teacher_Cv, student_Cv = units
    diff_Cv = torch.sub(student_Cv, teacher_Cv, out=teacher_Cv)
    (square_C,) = _add_up(vocab, torch.mul(diff_Cv, diff_Cv, out=product_Cv).sum(-1))
    loss_C = square_C / 2
    if grad_Cv is not None:
        diff_Cv.sub_(torch.mul(student_Cv, loss_C[:, None], out=product_Cv))
        grad_Cv.mul_(diff_Cv).mul_(weight_C[:, None])
    return loss_C


def cross_entropy(block: Block[Tensor]) -> Tensor:
    """Cross-entropy with label ids, lse(s) - s_label, with gradient q - onehot(label).

    A label outside the vocabulary gives NaN, in the gradient too.
    """
    student_Cv, target, grad_Cv, weight_C, vocab, scratch = block
    index_C = target - vocab.start
    here_C = (index_C >= 0) & (index_C < vocab.num_valid)
    index_C1 = index_C.clamp(0, max(0, vocab.num_valid - 1))[:, None]
    known_C = (target >= 0) & (target < vocab.vocab_size)
    weight_C = weight_C.where(known_C, torch.nan)
    label_C = torch.zeros_like(weight_C)
    if vocab.num_valid:
        label_C = student_Cv.gather(1, index_C1).squeeze(1).where(here_C, label_C)
    local = _Softmax.of(student_Cv, scratch.like("student_probs", student_Cv))
    softmax, label = vocab.merge(local.sums(), ScaledSums(torch.zeros_like(label_C), (label_C,)))
    (sum_C,), (label_C,) = softmax.sums, label.sums
    if grad_Cv is not None and vocab.num_valid:
        torch.mul(local.over_all(softmax, vocab), weight_C[:, None], out=grad_Cv)
        grad_Cv.scatter_add_(1, index_C1, (-weight_C * here_C)[:, None])
    return (softmax.max_C - label_C + sum_C.log()).where(known_C, torch.nan)
