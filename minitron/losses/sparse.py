"""Forward KL from a few probabilities per token: the teacher's K largest, or ids and probabilities from a cache.

The student's softmax is kept in two parts, the picked columns and the rest, each with its own maximum: the
probability of the rest is then a sum of its own, not 1 minus a number close to 1.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from minitron.config.logit_loss import TopKRest
from minitron.losses.divergence import Block
from minitron.losses.vocab import ScaledSums, VocabShard, row_max


@dataclass(frozen=True)
class SparseTarget:
    """A teacher's distribution by its K entries per token, equal on all tensor-parallel ranks.

    Attributes:
        ids_TK: token ids, int64, no id twice for one token; -1 for a slot that is not used.
        probs_TK: their probabilities, any floating dtype; 0 in slots not used.
        entropy_T: entropy of the whole distribution in nats; only needed where the entries are a random sample.
    """

    ids_TK: Tensor
    probs_TK: Tensor
    entropy_T: Tensor | None = None

    def __getitem__(self, tokens: slice, /) -> "SparseTarget":
        """The same for a part of the tokens."""
        entropy_T = None if self.entropy_T is None else self.entropy_T[tokens]
        return SparseTarget(self.ids_TK[tokens], self.probs_TK[tokens], entropy_T)


class _Split(NamedTuple):
    """The student's softmax in two parts.

    Attributes:
        index_CK: column of each slot on this rank; any column where it is not here.
        here_CK: whether the slot's id is one of this rank's columns.
        picked_CK: the student's logits in the slots, -inf where not here.
        rest_Cv: exp(s - rest_max), 0 in picked columns; may be overwritten.
        rest_max_C: what was taken out, finite.
        rest: sum of the rest's exponentials over all ranks.
        picked_lse_C: log-sum-exp of the picked columns of all ranks, -inf without any.
        rest_lse_C: log-sum-exp of the rest of all ranks, -inf without any.
        dot_C: sum over all slots of probability * logit.
    """

    index_CK: Tensor
    here_CK: Tensor
    picked_CK: Tensor
    rest_Cv: Tensor
    rest_max_C: Tensor
    rest: ScaledSums
    picked_lse_C: Tensor
    rest_lse_C: Tensor
    dot_C: Tensor


def _split(student_Cv: Tensor, ids_CK: Tensor, probs_CK: Tensor, out_Cv: Tensor, vocab: VocabShard) -> _Split:
    """Split the student's logits into picked columns and the rest, which goes to ``out_Cv``. One collective."""
    index_CK = ids_CK - vocab.start
    here_CK = (index_CK >= 0) & (index_CK < vocab.num_valid)
    index_CK = index_CK.clamp(0, max(0, vocab.num_valid - 1))
    picked_CK = torch.full_like(probs_CK, -torch.inf)
    if out_Cv.data_ptr() != student_Cv.data_ptr():
        out_Cv.copy_(student_Cv)
    if vocab.num_valid:
        picked_CK = student_Cv.gather(1, index_CK).where(here_CK, picked_CK)
        # Adding: slots that are not here share a column with one that may be, and must leave it alone.
        out_Cv.scatter_add_(1, index_CK, torch.zeros_like(picked_CK).masked_fill_(here_CK, -torch.inf))
    lowest = torch.finfo(student_Cv.dtype).min  # instead of -inf, whose differences are not numbers
    rest_max_C, picked_max_C = row_max(out_Cv).clamp_(min=lowest), row_max(picked_CK).clamp_(min=lowest)
    rest_Cv = out_Cv.sub_(rest_max_C[:, None]).exp_()
    dot_C = (probs_CK * picked_CK.where(here_CK, 0)).sum(-1)
    rest, picked, dot = vocab.merge(
        ScaledSums(rest_max_C, (rest_Cv.sum(-1),)),
        ScaledSums(picked_max_C, ((picked_CK - picked_max_C[:, None]).exp().sum(-1),)),
        ScaledSums(torch.zeros_like(dot_C), (dot_C,)),
    )
    picked_lse_C, rest_lse_C = (part.max_C + part.sums[0].log() for part in (picked, rest))
    return _Split(index_CK, here_CK, picked_CK, rest_Cv, rest_max_C, rest, picked_lse_C, rest_lse_C, dot.sums[0])


@dataclass(frozen=True)
class SparseKL:
    """KL(teacher || student) from a `SparseTarget` with entries p_k.

    Gradients: with M = sum of p_k, M q - p; with a ghost the columns of the rest share (M + p_rest) q_rest -
    p_rest in proportion to their q; renormalised, it is that of the KL over the K, and zero elsewhere.

    Attributes:
        rest: what becomes of the probability that the target does not hold; None for entries that are a random
            sample of the whole distribution: then sum_k p_k (-log q_k) - entropy, an unbiased estimate.
    """

    rest: TopKRest | None

    def __call__(self, block: Block[SparseTarget]) -> Tensor:
        """Compute one block, see `Divergence`. An id outside the vocabulary gives NaN, in the gradient too."""
        student_Cv, target, grad_Cv, weight_C, vocab, _ = block
        known_C = ((target.ids_TK >= -1) & (target.ids_TK < vocab.vocab_size)).all(-1)
        weight_C = weight_C.where(known_C, torch.nan)
        ids_CK, probs_CK = target.ids_TK, target.probs_TK.to(student_Cv.dtype)
        if self.rest is TopKRest.renormalize:
            mass_C = probs_CK.sum(-1, keepdim=True)
            probs_CK = probs_CK / mass_C.where(mass_C > 0, 1)
        split = _split(student_Cv, ids_CK, probs_CK, block.work_memory(), vocab)
        mass_C = probs_CK.sum(-1)
        ghost_C = torch.zeros_like(mass_C)
        if self.rest is TopKRest.ghost:  # without a column left, what 1 - mass holds is rounding
            ghost_C = (1 - mass_C).clamp_(min=0).where(split.rest.sums[0] > 0, 0)
        if self.rest is TopKRest.renormalize:
            lse_C = split.picked_lse_C.where(split.picked_lse_C > -torch.inf, 0)
        else:
            lse_C = torch.logaddexp(split.picked_lse_C, split.rest_lse_C)
        if grad_Cv is not None:
            self._write_gradient(grad_Cv, split, probs_CK, ghost_C, lse_C, weight_C)
        loss_C = mass_C * lse_C - split.dot_C
        if self.rest is None:
            assert target.entropy_T is not None
            loss_C -= target.entropy_T.to(loss_C.dtype)
        else:
            loss_C += torch.special.xlogy(probs_CK, probs_CK).sum(-1)
        rest_log_q_C = (split.rest_lse_C - lse_C).where(ghost_C > 0, 0)
        loss_C += torch.special.xlogy(ghost_C, ghost_C) - ghost_C * rest_log_q_C
        return loss_C.where(known_C, torch.nan)

    def _write_gradient(
        self, grad_Cv: Tensor, split: _Split, probs_CK: Tensor, ghost_C: Tensor, lse_C: Tensor, weight_C: Tensor
    ) -> None:
        """Scale the rest's exponentials, which ``grad_Cv`` holds, and put the picked columns' gradient in place."""
        mass_C = probs_CK.sum(-1)
        total_C = mass_C + ghost_C
        (rest_sum_C,) = split.rest.sums
        has_rest_C = rest_sum_C > 0
        picked_q_C, rest_q_C = ((part_C - lse_C).exp() for part_C in (split.picked_lse_C, split.rest_lse_C))
        # What the rest's columns share, from the smaller of the student's two parts: the same but for rounding.
        rest_C = torch.where(picked_q_C < 0.5, mass_C - total_C * picked_q_C, total_C * rest_q_C - ghost_C)
        if self.rest is TopKRest.renormalize:
            rest_C = torch.zeros_like(rest_C)
        share_C = (split.rest_max_C - split.rest.max_C).exp() / rest_sum_C
        grad_Cv.mul_((weight_C * rest_C * share_C).where(has_rest_C, 0)[:, None])
        if grad_Cv.shape[1]:
            picked_CK = total_C[:, None] * (split.picked_CK - lse_C[:, None]).exp() - probs_CK
            grad_Cv.scatter_add_(1, split.index_CK, (weight_C[:, None] * picked_CK).where(split.here_CK, 0))


@dataclass(frozen=True)
class TopKKL:
    """`SparseKL` with the K largest of the teacher's logits.

    Attributes:
        top_k: K, at most the size of the vocabulary.
        rest: what becomes of the rest.
    """

    top_k: int
    rest: TopKRest

    def __call__(self, block: Block[Tensor]) -> Tensor:
        """Compute one block, see `Divergence`."""
        student_Cv, target, grad_Cv, weight_C, vocab, scratch = block
        logits_CK, ids_CK = vocab.top_k(target, self.top_k)
        max_C = row_max(target)
        exp_Cv = torch.sub(target, max_C[:, None], out=scratch.like("teacher_exp", target)).exp_()
        (softmax,) = vocab.merge(ScaledSums(max_C, (exp_Cv.sum(-1),)))
        probs_CK = (logits_CK - softmax.max_C[:, None]).exp_().div_(softmax.sums[0][:, None])
        sparse = SparseTarget(ids_CK, probs_CK)
        return SparseKL(self.rest)(Block(student_Cv, sparse, grad_Cv, weight_C, vocab, scratch))
