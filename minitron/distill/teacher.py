"""Where the teacher's signal comes from. Every source gives a `Signal` for each micro-batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from minitron.data.batch import Batch
from minitron.losses import SparseTarget
from minitron.models.gpt import FinalState
from minitron.train.heldout import forward_only


@dataclass(frozen=True)
class Signal:
    """What the teacher leaves on this rank for one micro-batch of the student.

    Attributes:
        final: Final hidden state and output layer, or entries of the distributions, on the student's last pipeline
            stage; None elsewhere.
        states: Intermediate states by name, on the stage that holds the student's side of the pair.
    """

    final: FinalState | SparseTarget | None = None
    states: Mapping[str, Tensor] = field(default_factory=dict)


class Teacher(Protocol):
    """A source of signals."""

    def signals(self, microbatches: Sequence[Batch]) -> list[Signal]:
        """One signal per micro-batch of this rank; all ranks call it together."""
        ...


@dataclass(frozen=True)
class OnlineTeacher:
    """A teacher that runs beside the student, in the same layout.

    Attributes:
        gpt: The teacher; frozen and in evaluation mode (see `freeze`).
    """

    gpt: GPTModel

    def signals(self, microbatches: Sequence[Batch]) -> list[Signal]:
        """Run a forward-only schedule; the final states stay on the last pipeline stage."""
        finals = forward_only(self.gpt, microbatches, lambda state, _batch: state)
        return [Signal(final) for final in finals] if finals else [Signal()] * len(microbatches)


def freeze(gpt: GPTModel) -> GPTModel:
    """Make a model a teacher: no gradient reaches its parameters."""
    gpt.eval()
    for parameter in gpt.parameters():
        parameter.requires_grad_(False)
    return gpt
