"""The losses as dense fp64 formulas, and the tensors they are tried on. Imports little: workers import it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Case:
    """Student and teacher of different hidden size, their labels and token weights; rows are padded."""

    student_hidden_TH: Tensor
    student_weight_VH: Tensor
    teacher_hidden_TH: Tensor
    teacher_weight_VH: Tensor
    labels_T: Tensor
    token_weights_T: Tensor
    vocab_size: int

    @property
    def student_logits_TV(self) -> Tensor:
        return self.student_hidden_TH @ self.student_weight_VH.T

    @property
    def teacher_logits_TV(self) -> Tensor:
        return self.teacher_hidden_TH @ self.teacher_weight_VH.T


def make_case(
    *, num_tokens: int = 13, vocab_size: int = 37, num_rows: int = 40, dtype: torch.dtype = torch.float64
) -> Case:
    """Logits of a few nats; one token has weight 0."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    token_weights_T = torch.rand(num_tokens, generator=generator, dtype=torch.float64)
    token_weights_T[num_tokens // 2] = 0
    return Case(
        student_hidden_TH=normal(num_tokens, 8),
        student_weight_VH=normal(num_rows, 8),
        teacher_hidden_TH=normal(num_tokens, 5),
        teacher_weight_VH=normal(num_rows, 5),
        labels_T=torch.randint(vocab_size, (num_tokens,), generator=generator),
        token_weights_T=token_weights_T,
        vocab_size=vocab_size,
    )


def dense_kl(student_TV: Tensor, teacher_TV: Tensor, vocab_size: int, token_weights_T: Tensor) -> Tensor:
    """Sum of w * sum_v p_v (log p_v - log q_v), with softmax written out."""
    q_TV, p_TV = (x[:, :vocab_size].double().exp() for x in (student_TV, teacher_TV))
    q_TV, p_TV = q_TV / q_TV.sum(1, keepdim=True), p_TV / p_TV.sum(1, keepdim=True)
    return (token_weights_T.double()[:, None] * p_TV * (p_TV.log() - q_TV.log())).sum()


def loss_and_grads(loss: Callable[..., Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
    """Value and gradients of ``loss(*tensors)``."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    value = loss(*leaves)
    return value.detach(), *torch.autograd.grad(value, leaves)
