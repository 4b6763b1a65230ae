"""Distillation as an objective of the training loop.

The teacher is a signal, not a part of the student: for each group of micro-batches it runs a forward-only pipeline
schedule and leaves its final hidden state on the last stage; then the student runs Megatron's ordinary schedule,
and its loss reads the signal. Both models' logits exist only chunk by chunk, inside the fused loss.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from minitron.config.distill import DistillConfig
from minitron.config.mixing import Mixing
from minitron.data.batch import Batch
from minitron.distill.balance import factor_to_size
from minitron.distill.intermediate import IntermediateLosses
from minitron.distill.teacher import Signal, Teacher
from minitron.losses import SparseTarget, linear_distillation, linear_sparse_kl
from minitron.models.gpt import FinalState
from minitron.models.loss_inputs import loss_inputs
from minitron.parallel.groups import Groups
from minitron.train.objective import CrossEntropy, Loss


@dataclass(frozen=True)
class Distillation:
    """Logit loss against the teacher, by default KL(teacher || student) alone over the full vocabulary.

    That is the papers' winning recipe (arXiv 2407.14679, section 4.3; arXiv 2408.11796, section 3).

    Attributes:
        teacher: Where the teacher's signals come from.
        vocab_size: True size of the student's vocabulary, without padding.
        groups: This rank's process groups.
        sequence_parallel: Whether hidden states are split along the sequence.
        recipe: The losses and their weights.
        common_vocab_size: Ids that teacher and student both have, on which they are compared; None for all of
            ``vocab_size``.
        intermediate: Losses of this stage's intermediate states, where there are any.
    """

    teacher: Teacher
    vocab_size: int
    groups: Groups
    sequence_parallel: bool
    recipe: DistillConfig
    common_vocab_size: int | None = None
    intermediate: IntermediateLosses | None = None

    def signals(self, microbatches: Sequence[Batch]) -> Sequence[Signal]:
        """Run the teacher."""
        return self.teacher.signals(microbatches)

    def watch(self, batch: Batch, signal: object, scale: float) -> AbstractContextManager[None]:
        """Compute the losses of intermediate states in the forward pass inside the block."""
        assert isinstance(signal, Signal)
        return self.intermediate.watch(batch, signal.states, scale) if self.intermediate else nullcontext()

    def drain(self) -> dict[str, Tensor]:
        """The losses of this stage's intermediate states."""
        return self.intermediate.drain() if self.intermediate else {}

    def loss(self, state: FinalState, batch: Batch, signal: object) -> Loss:
        """Mean loss per token, its parts unweighted, and the weight of the cross-entropy where it is dynamic."""
        assert isinstance(signal, Signal)
        total = self._logit_loss(state, batch, signal)
        terms = {self.recipe.logit_loss.kind.value: total.detach().clone()}
        if self.intermediate:
            self.intermediate.balance(total.detach())
        mix = self.recipe.cross_entropy
        if mix.weight:
            plain = CrossEntropy(self.vocab_size, self.groups, self.sequence_parallel).loss(state, batch, None)
            terms |= plain.terms
            weight: float | Tensor = mix.weight
            if mix.mixing is Mixing.scaled:
                weight = weight * factor_to_size(self._whole(plain.total), self._whole(total))
                terms["cross_entropy_weight"] = weight / self.groups.cp.size()  # terms of its ranks are added up
            total = total + weight * plain.total
        return Loss(total, terms)

    def _whole(self, loss: Tensor) -> Tensor:
        """A micro-batch's loss over all of its tokens, detached: context-parallel ranks have a share each."""
        whole = loss.detach().clone()
        if self.groups.cp.size() > 1:
            torch.distributed.all_reduce(whole, group=self.groups.cp)
        return whole

    def _logit_loss(self, state: FinalState, batch: Batch, signal: Signal) -> Tensor:
        assert signal.final is not None, "the last stage has the teacher's distributions"
        split = self.sequence_parallel
        hidden_TH, weights_T = loss_inputs(state.hidden_SBH, batch, self.groups, sequence_parallel=split)
        if isinstance(signal.final, SparseTarget):
            sampled = signal.final.entropy_T is not None
            return linear_sparse_kl(
                hidden_TH,
                state.weight_vH,
                signal.final,
                rest=None if sampled else self.recipe.logit_loss.top_k_rest,
                vocab_size=self.common_vocab_size or self.vocab_size,
                tp_group=self.groups.tp,
                token_weights_T=weights_T,
            )
        teacher_TH, _ = loss_inputs(
            signal.final.hidden_SBH, batch, self.groups, sequence_parallel=split and not signal.whole
        )
        return linear_distillation(
            hidden_TH,
            state.weight_vH,
            teacher_TH,
            signal.final.weight_vH,
            loss=self.recipe.logit_loss,
            vocab_size=self.common_vocab_size or self.vocab_size,
            tp_group=self.groups.tp,
            token_weights_T=weights_T,
        )
