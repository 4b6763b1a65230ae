"""The chunk engine: output layer, blocks of tokens, dtypes and autograd around one `Divergence`.

Everything is computed in the forward pass, gradients included: a chunk's logits are made, turned
into their own gradient and multiplied out before the next chunk's are made. The backward pass only
scales.

Precision: products are made in the inputs' dtype (as Megatron's output layer does); softmax,
divergence and sums in fp32; the weight's gradient is accumulated over the chunks in fp32. fp64
inputs are computed in fp64.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minitron.config import logit_loss
from minitron.config.logit_loss import CUDA_BLOCK_BYTES, CUDA_CHUNK_BYTES
from minitron.errors import ConfigError
from minitron.losses.divergence import Block, Divergence, Scratch, Target
from minitron.losses.vocab import VocabShard

_MIB = 2**20


class _Workspace:
    """Chunks of logits, kept from call to call on the CPU: there, fresh memory costs page faults each time.

    They are a few, of the size that `choose_chunk_tokens` allows. A GPU's allocator keeps memory by itself.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.dtype], Tensor] = {}

    def chunk(self, name: str, shape: tuple[int, int], like: Tensor) -> Tensor:
        """Uninitialised memory, valid until the next call with this name."""
        if like.device.type != "cpu":
            return like.new_empty(shape)
        numel, key = shape[0] * shape[1], (name, like.dtype)
        if key not in self._kept or self._kept[key].numel() < numel:
            self._kept[key] = like.new_empty(numel)
        return self._kept[key][:numel].view(shape)

    def release(self) -> None:
        """Let go of the memory that is kept; the next call takes new."""
        self._kept.clear()


workspace = _Workspace()


@dataclass(frozen=True)
class Job[T: Target]:
    """What a loss needs besides the differentiable tensors.

    Attributes:
        divergence: the loss of a block.
        target: gives what the divergence compares with for a slice of the tokens; valid until it is
            called again.
        weight_T: token weights, in the dtype of the computation (fp32, or fp64).
        vocab: this rank's columns.
        chunk_tokens: tokens per matrix product.
        takes_chunks: whether the divergence takes a chunk as it is: all its tokens, in the logits' own dtype.
        scratch: work memory of the blocks, which lives as long as the job.
    """

    divergence: Divergence[T]
    target: Callable[[slice], T]
    weight_T: Tensor
    vocab: VocabShard
    chunk_tokens: int
    takes_chunks: bool = False
    scratch: Scratch = field(default_factory=Scratch)


def linear_loss(hidden_TH: Tensor, weight_vH: Tensor, job: Job[Any]) -> Tensor:
    """Weighted loss of the logits ``hidden @ weight.T``, which never exist as a whole."""
    enabled = torch.is_grad_enabled()
    needs = (enabled and hidden_TH.requires_grad, enabled and weight_vH.requires_grad)
    loss: Tensor = _LinearLoss.apply(hidden_TH, weight_vH, job, *needs)  # type: ignore[no-untyped-call]
    return loss


def logits_loss(logits_Tv: Tensor, job: Job[Any], *, overwrite: bool) -> Tensor:
    """Weighted loss of logits that exist already; ``overwrite`` puts their gradient into their memory."""
    needs_grad = torch.is_grad_enabled() and logits_Tv.requires_grad
    loss: Tensor = _LogitsLoss.apply(logits_Tv, job, needs_grad, overwrite)  # type: ignore[no-untyped-call]
    return loss


def choose_chunk_tokens(chunk_tokens: int | None, hidden_TH: Tensor, vocab: VocabShard) -> int:
    """Tokens per matrix product: enough for efficient products, few enough to bound the memory.

    Args:
        chunk_tokens: the caller's wish, None for a choice by the bytes of a chunk of logits.
        hidden_TH: final hidden state.
        vocab: this rank's columns.

    Raises:
        ConfigError: the wish is not positive.
    """
    if chunk_tokens is None:
        budget = 64 * _MIB if hidden_TH.device.type == "cpu" else CUDA_CHUNK_BYTES
        row_bytes = hidden_TH.dtype.itemsize * vocab.num_columns
        return logit_loss.chunk_tokens(hidden_TH.shape[0], row_bytes=row_bytes, budget_bytes=budget)
    if chunk_tokens < 1:
        raise ConfigError(f"chunk_tokens is {chunk_tokens}, expected at least 1, or None to choose by itself")
    return chunk_tokens


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TH: Tensor, weight_vH: Tensor, job: Job[Any], need_hidden: bool, need_weight: bool
    ) -> Tensor:
        num_tokens, num_valid = hidden_TH.shape[0], job.vocab.num_valid
        rows_vH = weight_vH[:num_valid]
        grad_hidden_TH = torch.empty_like(hidden_TH) if need_hidden else None
        one_chunk = 0 < num_tokens <= job.chunk_tokens
        grad_weight_vH: Tensor | None = None
        if need_weight:
            # One product is written where it belongs; a sum over chunks needs zeros, and a dtype wide enough.
            grad_weight_vH = weight_vH.new_empty(weight_vH.shape, dtype=None if one_chunk else job.weight_T.dtype)
            grad_weight_vH[num_valid if one_chunk else 0 :] = 0
        logits_Cv = workspace.chunk("student", (min(job.chunk_tokens, num_tokens), num_valid), hidden_TH)
        loss = hidden_TH.new_zeros((), dtype=torch.float64)
        for start in range(0, num_tokens, job.chunk_tokens):
            tokens = slice(start, min(start + job.chunk_tokens, num_tokens))
            hidden_CH = hidden_TH[tokens]
            student_Cv = torch.mm(hidden_CH, rows_vH.t(), out=logits_Cv[: hidden_CH.shape[0]])
            grad_Cv = student_Cv if need_hidden or need_weight else None
            loss += _block_loss(job, student_Cv, job.target(tokens), grad_Cv, job.weight_T[tokens])
            if grad_hidden_TH is not None:
                torch.mm(student_Cv, rows_vH, out=grad_hidden_TH[tokens])
            if grad_weight_vH is not None and one_chunk:
                torch.mm(student_Cv.t(), hidden_CH, out=grad_weight_vH[:num_valid])
            elif grad_weight_vH is not None:
                _accumulate(grad_weight_vH[:num_valid], student_Cv, hidden_CH)
        ctx.save_for_backward(grad_hidden_TH, grad_weight_vH)
        ctx.weight_dtype = weight_vH.dtype
        return loss.to(job.weight_T.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_TH, grad_weight_vH = ctx.saved_tensors
        if grad_hidden_TH is not None:
            grad_hidden_TH = _scale(grad_hidden_TH, grad_loss)
        if grad_weight_vH is not None:
            grad_weight_vH = _scale(grad_weight_vH, grad_loss).to(ctx.weight_dtype)
        return grad_hidden_TH, grad_weight_vH, None, None, None


class _LogitsLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_Tv: Tensor, job: Job[Any], needs_grad: bool, overwrite: bool) -> Tensor:
        valid_Tv = logits_Tv[:, : job.vocab.num_valid]
        grad_Tv = grad_valid_Tv = None
        if needs_grad:
            # Detached, it counts as the same tensor: autograd refuses whoever saved the logits for a backward pass.
            grad_Tv = logits_Tv.detach() if overwrite else torch.empty_like(logits_Tv)
            grad_Tv[:, job.vocab.num_valid :] = 0
            grad_valid_Tv = grad_Tv[:, : job.vocab.num_valid]
        loss = _block_loss(job, valid_Tv, job.target(slice(None)), grad_valid_Tv, job.weight_T)
        ctx.save_for_backward(grad_Tv)
        return loss.to(job.weight_T.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        (grad_Tv,) = ctx.saved_tensors
        return None if grad_Tv is None else _scale(grad_Tv, grad_loss), None, None, None


def _block_loss[T: Target](
    job: Job[T], student_Tv: Tensor, target: T, grad_Tv: Tensor | None, weight_T: Tensor
) -> Tensor:
    """Weighted loss of these tokens in fp64, and its gradient into ``grad_Tv``, block by block.

    ``grad_Tv`` may be the memory of ``student_Tv``.
    """
    if job.takes_chunks:
        loss_T = job.divergence(Block(student_Tv, target, grad_Tv, weight_T, job.vocab, job.scratch))
        return (loss_T * weight_T).sum(dtype=torch.float64)
    dtype = job.weight_T.dtype
    block = _block_tokens(student_Tv, job.vocab, dtype)
    loss = weight_T.new_zeros((), dtype=torch.float64)
    for start in range(0, student_Tv.shape[0], block):
        tokens = slice(start, start + block)
        student_Cv, weight_C = student_Tv[tokens], weight_T[tokens]
        grad_Cv = None if grad_Tv is None else grad_Tv[tokens]
        out_Cv = grad_Cv
        if student_Cv.dtype != dtype:
            student_Cv = job.scratch.cast("student", student_Cv, dtype)
            out_Cv = None if grad_Cv is None else student_Cv
        loss_C = job.divergence(Block(student_Cv, target[tokens], out_Cv, weight_C, job.vocab, job.scratch))
        loss += (loss_C * weight_C).sum()
        if grad_Cv is not None and out_Cv is not None and out_Cv is not grad_Cv:
            grad_Cv.copy_(out_Cv)
    return loss


def _accumulate(grad_vH: Tensor, grad_logits_Cv: Tensor, hidden_CH: Tensor) -> None:
    """Add ``grad_logits.T @ hidden`` to the weight's gradient, which may be in a wider dtype."""
    if grad_vH.dtype == hidden_CH.dtype:
        grad_vH.addmm_(grad_logits_Cv.t(), hidden_CH)
        return
    # cuBLAS writes its sums as they are, in fp32 (adding to a sum that is there, torch before 2.10 cannot).
    product = partial(torch.mm, out_dtype=grad_vH.dtype) if grad_vH.is_cuda else torch.mm
    for start in range(0, grad_vH.shape[0], 8192):  # by rows: the product stays small
        rows = slice(start, start + 8192)
        grad_vH[rows] += product(grad_logits_Cv[:, rows].t(), hidden_CH)


def _scale(grad: Tensor, grad_loss: Tensor) -> Tensor:
    """Multiply by the incoming gradient: in place, unless the graph is kept for another backward."""
    if torch._C._autograd._get_current_graph_task_keep_graph():
        return grad * grad_loss
    if grad_loss.device.type == "cpu" and grad_loss.item() == 1.0:
        return grad
    return grad.mul_(grad_loss)


def _block_tokens(logits_Tv: Tensor, vocab: VocabShard, dtype: torch.dtype) -> int:
    """Tokens per block: what stays in the caches of a lone CPU rank, else few launches and collectives."""
    row_bytes = dtype.itemsize * vocab.num_columns
    if logits_Tv.device.type != "cpu":
        return max(1, CUDA_BLOCK_BYTES // row_bytes)
    if vocab.num_ranks > 1:
        return max(1, 8 * _MIB // row_bytes)
    return torch.get_num_threads() * max(1, 3 * _MIB // 4 // row_bytes)  # a softmax gives whole rows to a thread
