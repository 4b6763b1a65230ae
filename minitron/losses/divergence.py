"""What a loss is to the chunk engine: one small object, on a block of tokens.

A new loss is a new object with the `Divergence` call: everything around it (output layers, chunks,
token weights, the student's dtype, autograd) is in `minitron.losses.engine`.
"""

from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor

from minitron.losses.vocab import VocabShard


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

    def cast(self, name: str, block_Cv: Tensor, dtype: torch.dtype) -> Tensor:
        """The block in this dtype: itself if it has it, else a copy in the memory of that name."""
        if block_Cv.dtype == dtype:
            return block_Cv
        return self.like(name, block_Cv, dtype).copy_(block_Cv)


class Target(Protocol):
    """What a student is compared with, for some tokens: logits, labels, a sparse distribution."""

    def __getitem__(self, tokens: slice, /) -> Self:
        """The same for a part of the tokens."""


class Block[T: Target](NamedTuple):
    """Some tokens of a loss.

    Attributes:
        student_Cv: student's logits over this rank's valid columns, fp32 (fp64 for fp64 inputs), read only.
        target: what they are compared with, read only; any dtype.
        grad_Cv: where to write d(sum of weight * loss) / d student_Cv; None when no gradient is needed. It may be the
            memory of ``student_Cv``, which may then be overwritten.
        weight_C: weight of each token.
        vocab: this rank's columns, and the reduction over the tensor-parallel group.
        scratch: work memory.
    """

    student_Cv: Tensor
    target: T
    grad_Cv: Tensor | None
    weight_C: Tensor
    vocab: VocabShard
    scratch: Scratch

    def work_memory(self) -> Tensor:
        """Where a loss may turn the student's logits into something else: the gradient's memory if there is one."""
        return self.scratch.like("student_exp", self.student_Cv) if self.grad_Cv is None else self.grad_Cv


class Divergence[T: Target](Protocol):
    """Loss per token and its gradient with respect to the student's logits."""

    def __call__(self, block: Block[T], /) -> Tensor:
        """Compute one block: write the gradient, and return each token's unweighted loss, equal on all ranks."""
