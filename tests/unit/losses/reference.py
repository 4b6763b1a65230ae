"""The losses as dense fp64 formulas, ours next to them, and the tensors they are tried on.

Imports little: workers import it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minitron.config.logit_loss import LogitLossConfig, LogitLossKind, TopKRest
from minitron.losses import SparseTarget, linear_distillation, logits_distillation


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


def make_target(case: Case, *, num_slots: int = 6) -> SparseTarget:
    """Six random ids of each token, in no order, with 60 % of the probability; some slots not used."""
    generator = torch.Generator().manual_seed(3)
    num_tokens, dtype = len(case.labels_T), case.token_weights_T.dtype
    rows = [torch.randperm(case.vocab_size, generator=generator)[:num_slots] for _ in range(num_tokens)]
    ids_TK = torch.stack(rows)
    ids_TK[::3, 1] = -1
    ids_TK[1] = -1  # a token without any
    probs_TK = torch.rand(num_tokens, num_slots, generator=generator, dtype=dtype).masked_fill_(ids_TK < 0, 0)
    probs_TK *= 0.6 / probs_TK.sum(1, keepdim=True).clamp(min=1e-30)
    return SparseTarget(ids_TK, probs_TK, torch.rand(num_tokens, generator=generator, dtype=dtype))


def softmax(logits_TV: Tensor) -> Tensor:
    exp_TV = logits_TV.double().exp()
    return exp_TV / exp_TV.sum(1, keepdim=True)


def kl(p_TV: Tensor, q_TV: Tensor) -> Tensor:
    return (p_TV * (p_TV.log() - q_TV.log())).sum(1)


def sparse_kl(p_TK: Tensor, q_TV: Tensor, ids_TK: Tensor, rest: TopKRest) -> Tensor:
    """KL per token from the teacher's probabilities of some ids; all slots used, probability left over."""
    q_TK = q_TV.gather(1, ids_TK)
    rest_q_T1 = q_TV.scatter(1, ids_TK, 0).sum(1, keepdim=True)
    match rest:
        case TopKRest.drop:
            return kl(p_TK, q_TK)
        case TopKRest.renormalize:
            return kl(p_TK / p_TK.sum(1, keepdim=True), q_TK / q_TK.sum(1, keepdim=True))
        case TopKRest.ghost:
            return kl(torch.cat([p_TK, 1 - p_TK.sum(1, keepdim=True)], 1), torch.cat([q_TK, rest_q_T1], 1))


def dense_loss(
    loss: LogitLossConfig, student_TV: Tensor, teacher_TV: Tensor, vocab_size: int, token_weights_T: Tensor
) -> Tensor:
    """Weighted sum of the tokens' loss, as the definition has it; differentiable by autograd."""
    q_TV, p_TV = (softmax(x[:, :vocab_size] / loss.temperature) for x in (student_TV, teacher_TV))
    match loss.kind:
        case LogitLossKind.forward_kl if loss.top_k:
            p_TK, ids_TK = p_TV.topk(loss.top_k)
            loss_T = sparse_kl(p_TK, q_TV, ids_TK, loss.top_k_rest)
        case LogitLossKind.forward_kl:
            loss_T = kl(p_TV, q_TV)
        case LogitLossKind.reverse_kl:
            loss_T = kl(q_TV, p_TV)
        case LogitLossKind.jensen_shannon:
            m_TV = loss.beta * p_TV + (1 - loss.beta) * q_TV
            loss_T = loss.beta * kl(p_TV, m_TV) + (1 - loss.beta) * kl(q_TV, m_TV)
        case LogitLossKind.mse:
            loss_T = ((p_TV - q_TV) ** 2).mean(1)
        case LogitLossKind.cosine:
            loss_T = 1 - (p_TV * q_TV).sum(1) / ((p_TV**2).sum(1) * (q_TV**2).sum(1)).sqrt()
    return loss.temperature**2 * (token_weights_T.double() * loss_T).sum()


FORWARD_KL = LogitLossConfig()
ALL_LOSSES = [
    LogitLossConfig(temperature=temperature, **options)
    for temperature in (1.0, 2.0)
    for options in [
        *({"kind": kind} for kind in LogitLossKind),
        {"kind": LogitLossKind.jensen_shannon, "beta": 0.1},
        *({"top_k": 5, "top_k_rest": rest} for rest in TopKRest),
    ]
]


def name_of(loss: LogitLossConfig) -> str:
    """For test ids."""
    top_k = f"-top{loss.top_k}-{loss.top_k_rest}" if loss.top_k else ""
    return f"{loss.kind}-T{loss.temperature:g}-beta{loss.beta:g}{top_k}"


def ours(
    case: Case, loss: LogitLossConfig = FORWARD_KL, *, chunk_tokens: int | None = None, weighted: bool = True
) -> Callable[[Tensor, Tensor], Tensor]:
    """`linear_distillation` as a function of the student's tensors."""
    return lambda hidden_TH, weight_VH: linear_distillation(
        hidden_TH,
        weight_VH,
        case.teacher_hidden_TH,
        case.teacher_weight_VH,
        loss=loss,
        vocab_size=case.vocab_size,
        token_weights_T=case.token_weights_T if weighted else None,
        chunk_tokens=chunk_tokens,
    )


def dense(
    case: Case, loss: LogitLossConfig = FORWARD_KL, *, weighted: bool = True
) -> Callable[[Tensor, Tensor], Tensor]:
    """`dense_loss` as a function of the student's tensors."""
    weights_T = case.token_weights_T if weighted else torch.ones_like(case.token_weights_T)
    teacher_TV = case.teacher_hidden_TH.double() @ case.teacher_weight_VH.double().T
    return lambda hidden_TH, weight_VH: dense_loss(
        loss, hidden_TH.double() @ weight_VH.double().T, teacher_TV, case.vocab_size, weights_T
    )


def from_logits(case: Case, loss: LogitLossConfig = FORWARD_KL) -> Callable[[Tensor], Tensor]:
    """`logits_distillation` as a function of the student's logits."""
    return lambda logits_TV: logits_distillation(
        logits_TV,
        case.teacher_logits_TV,
        loss=loss,
        vocab_size=case.vocab_size,
        token_weights_T=case.token_weights_T,
    )


def dense_from_logits(case: Case, loss: LogitLossConfig = FORWARD_KL) -> Callable[[Tensor], Tensor]:
    """`dense_loss` as a function of the student's logits."""
    return lambda logits_TV: dense_loss(loss, logits_TV, case.teacher_logits_TV, case.vocab_size, case.token_weights_T)


def loss_and_grads(loss: Callable[..., Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
    """Value and gradients of ``loss(*tensors)``."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    value = loss(*leaves)
    return value.detach(), *torch.autograd.grad(value, leaves)


def assert_as_exact_as(plain: Sequence[Tensor], have: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    """``have`` is at most twice as far from ``want`` as ``plain`` is, or 1e-6 of the largest number.

    For sums of many numbers in fp32: how far these are off is the matrix library's, and differs between CPUs.
    """
    for of_plain, ours_, exact in zip(plain, have, want, strict=True):
        allowed = 2 * float((of_plain.double() - exact).abs().max()) + 1e-6 * float(exact.abs().max())
        assert float((ours_.double() - exact).abs().max()) <= allowed
