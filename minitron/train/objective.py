"""What a training method gives the loop: signals for a group of micro-batches, and a loss."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from minitron.data.batch import Batch
from minitron.losses import linear_cross_entropy
from minitron.models.gpt import FinalState
from minitron.models.loss_inputs import loss_inputs
from minitron.parallel.groups import Groups


@dataclass(frozen=True)
class Loss:
    """The loss of one micro-batch; under context parallelism this rank's share of it.

    Attributes:
        total: Scalar to differentiate, in nats per token.
        terms: Its parts by name, each a scalar in nats per token, and weights of parts that change from one micro-batch
            to the next; under context parallelism this rank's share of both.
    """

    total: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """A training method."""

    def signals(self, microbatches: Sequence[Batch]) -> Sequence[object]:
        """Prepare what the loss of each micro-batch needs (a teacher's states), before the student runs."""
        ...

    def watch(self, batch: Batch, signal: object, scale: float) -> AbstractContextManager[None]:
        """A block around the forward pass of one micro-batch, on every pipeline stage.

        Args:
            batch: The micro-batch.
            signal: Its signal.
            scale: What its loss is multiplied by on the way to the step's mean; a loss that a stage adds to the
                gradient by itself must be too.
        """
        ...

    def loss(self, state: FinalState, batch: Batch, signal: object) -> Loss:
        """The loss of one micro-batch, on the last pipeline stage."""
        ...

    def drain(self) -> dict[str, Tensor]:
        """What this stage adds to the terms of `loss` by itself: sums over the micro-batches since the last call."""
        ...


@dataclass(frozen=True)
class CrossEntropy:
    """Plain next-token training.

    Attributes:
        vocab_size: True size of the vocabulary, without padding.
        groups: This rank's process groups.
        sequence_parallel: Whether the hidden state is split along the sequence.
    """

    vocab_size: int
    groups: Groups
    sequence_parallel: bool

    def signals(self, microbatches: Sequence[Batch]) -> Sequence[object]:
        """Nothing to prepare: the labels are in the batch."""
        return [None] * len(microbatches)

    def watch(self, batch: Batch, signal: object, scale: float) -> AbstractContextManager[None]:
        """Nothing to see inside the model."""
        return nullcontext()

    def drain(self) -> dict[str, Tensor]:
        """Nothing but the loss."""
        return {}

    def loss(self, state: FinalState, batch: Batch, signal: object) -> Loss:
        """Mean cross-entropy of the next token."""
        hidden_TH, weights_T = loss_inputs(
            state.hidden_SBH, batch, self.groups, sequence_parallel=self.sequence_parallel
        )
        total = linear_cross_entropy(
            hidden_TH,
            state.weight_vH,
            batch.labels_BS.transpose(0, 1).reshape(-1),
            vocab_size=self.vocab_size,
            tp_group=self.groups.tp,
            token_weights_T=weights_T,
        )
        return Loss(total, {"cross_entropy": total.detach().clone()})
