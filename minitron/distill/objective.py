"""Distillation as an objective of the training loop.

The teacher is a signal, not a part of the student: for each group of micro-batches it runs a forward-only pipeline
schedule and leaves its final hidden state on the last stage; then the student runs Megatron's ordinary schedule,
and its loss reads the signal. Both models' logits exist only chunk by chunk, inside the fused loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from minitron.data.batch import Batch
from minitron.losses import linear_kl
from minitron.models.gpt import Chunks, FinalState
from minitron.models.loss_inputs import loss_inputs
from minitron.parallel.groups import Groups
from minitron.train.heldout import forward_only
from minitron.train.objective import Loss


@dataclass(frozen=True)
class OnlineTeacher:
    """A teacher that runs beside the student, in the same layout.

    Attributes:
        gpt: The teacher; frozen and in evaluation mode (see `freeze`).
    """

    gpt: Chunks

    def states(self, microbatches: Sequence[Batch]) -> list[FinalState]:
        """Final states of the micro-batches on the last pipeline stage, an empty list elsewhere."""
        return forward_only(self.gpt, microbatches, lambda state, _batch: state)


def freeze(gpt: Chunks) -> Chunks:
    """Make a model a teacher: no gradient reaches its parameters."""
    gpt.eval()
    for parameter in gpt.parameters():
        parameter.requires_grad_(False)
    return gpt


@dataclass(frozen=True)
class ForwardKL:
    """KL(teacher || student) over the full vocabulary, temperature 1, no cross-entropy.

    The papers' winning recipe (arXiv 2407.14679, section 4.3; arXiv 2408.11796, section 3).

    Attributes:
        teacher: Where the teacher's states come from.
        vocab_size: True size of the vocabulary, without padding.
        groups: This rank's process groups.
        sequence_parallel: Whether hidden states are split along the sequence.
    """

    teacher: OnlineTeacher
    vocab_size: int
    groups: Groups
    sequence_parallel: bool

    def signals(self, microbatches: Sequence[Batch]) -> Sequence[object]:
        """Run the teacher; off the last stage there is nothing to hold."""
        states = self.teacher.states(microbatches)
        return states if self.groups.is_last_stage else [None] * len(microbatches)

    def loss(self, state: FinalState, batch: Batch, signal: object) -> Loss:
        """Mean divergence per token."""
        assert isinstance(signal, FinalState)
        split = self.sequence_parallel
        hidden_TH, weights_T = loss_inputs(state.hidden_SBH, batch, self.groups, sequence_parallel=split)
        teacher_TH, _ = loss_inputs(signal.hidden_SBH, batch, self.groups, sequence_parallel=split)
        total = linear_kl(
            hidden_TH,
            state.weight_vH,
            teacher_TH,
            signal.weight_vH,
            vocab_size=self.vocab_size,
            tp_group=self.groups.tp,
            token_weights_T=weights_T,
        )
        return Loss(total, {"forward_kl": total.detach().clone()})
