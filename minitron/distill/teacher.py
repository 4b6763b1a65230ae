"""Where the teacher's signal comes from. Every source gives a `Signal` for each micro-batch."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from minitron.data.batch import Batch
from minitron.distill.states import TeacherStates
from minitron.losses import SparseTarget
from minitron.models.gpt import Chunks, FinalState
from minitron.train.heldout import forward_only


@dataclass(frozen=True)
class Signal:
    """What the teacher leaves on this rank for one micro-batch of the student.

    Attributes:
        final: Final hidden state and output layer, or entries of the distributions, on the student's last pipeline
            stage; None elsewhere.
        states: Intermediate states by name, on the stage that holds the student's side of the pair.
        whole: Whether the final state has the whole sequence on every rank even where the student's is split over TP.
    """

    final: FinalState | SparseTarget | None = None
    states: Mapping[str, Tensor] = field(default_factory=dict)
    whole: bool = False


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
        states: Its intermediate states, where the student is pulled towards any.
    """

    gpt: Chunks
    states: TeacherStates | None = None

    def signals(self, microbatches: Sequence[Batch]) -> list[Signal]:
        """Run a forward-only schedule; the final states stay on the last pipeline stage."""
        with self.states.recording() if self.states else nullcontext():
            finals = forward_only(self.gpt, microbatches, lambda state, _batch: state)
        states = self.states.deliver(microbatches) if self.states else [{}] * len(microbatches)
        return [Signal(f, s) for f, s in zip(finals or [None] * len(microbatches), states, strict=True)]


def freeze(gpt: Chunks) -> Chunks:
    """Make a model a teacher: no gradient reaches its parameters."""
    gpt.eval()
    for parameter in gpt.parameters():
        parameter.requires_grad_(False)
    return gpt
