"""Every loss of the config against its definition in fp64, values and gradients."""

import math
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from minitron.config.logit_loss import LogitLossConfig, LogitLossKind, TopKRest
from minitron.losses import linear_distillation, logits_distillation
from tests.unit.losses.reference import (
    ALL_LOSSES,
    dense,
    dense_from_logits,
    dense_loss,
    from_logits,
    loss_and_grads,
    make_case,
    name_of,
    ours,
)


def renormalized(loss: LogitLossConfig) -> bool:
    return loss.top_k > 0 and loss.top_k_rest is TopKRest.renormalize


every_loss = pytest.mark.parametrize("loss", ALL_LOSSES, ids=name_of)


@every_loss
@pytest.mark.parametrize(("chunk_tokens", "weighted"), [(None, False), (5, True)])
def test_is_the_dense_formula(loss: LogitLossConfig, chunk_tokens: int | None, weighted: bool) -> None:
    case = make_case()
    student = (case.student_hidden_TH, case.student_weight_VH)
    have = loss_and_grads(ours(case, loss, chunk_tokens=chunk_tokens, weighted=weighted), *student)
    want = loss_and_grads(dense(case, loss, weighted=weighted), *student)
    assert_close(have, want, rtol=1e-11, atol=1e-13)
    with torch.no_grad():
        assert_close(ours(case, loss, chunk_tokens=chunk_tokens, weighted=weighted)(*student), want[0])


@every_loss
def test_from_logits_is_the_dense_formula(loss: LogitLossConfig) -> None:
    case = make_case()
    student_TV, teacher_TV = case.student_logits_TV, case.teacher_logits_TV
    before = (student_TV.clone(), teacher_TV.clone())
    have = loss_and_grads(
        lambda s: logits_distillation(
            s, teacher_TV, loss=loss, vocab_size=case.vocab_size, token_weights_T=case.token_weights_T
        ),
        student_TV,
    )
    want = loss_and_grads(dense_from_logits(case, loss), student_TV)
    assert_close(have, want, rtol=1e-11, atol=1e-13)
    assert_close((student_TV, teacher_TV), before, rtol=0, atol=0)


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_gradient_may_take_the_logits_place(loss: LogitLossConfig, dtype: torch.dtype) -> None:
    case = make_case(dtype=dtype)
    teacher_TV = case.teacher_logits_TV.clone()
    made: list[torch.Tensor] = []

    def of_layer(hidden_TH: torch.Tensor, weight_VH: torch.Tensor, *, overwrite: bool) -> torch.Tensor:
        made.append(hidden_TH @ weight_VH.T)
        made[-1].register_hook(made.append)
        return 3 * logits_distillation(
            made[-1],
            case.teacher_logits_TV,
            loss=loss,
            vocab_size=case.vocab_size,
            token_weights_T=case.token_weights_T,
            overwrite_student=overwrite,
        )

    student = (case.student_hidden_TH, case.student_weight_VH)
    want = loss_and_grads(partial(of_layer, overwrite=False), *student)
    assert made[0].data_ptr() != made[1].data_ptr()
    have = loss_and_grads(partial(of_layer, overwrite=True), *student)
    assert made[2].data_ptr() == made[3].data_ptr()
    assert_close(have, want, rtol=0, atol=0)
    assert_close(case.teacher_logits_TV, teacher_TV, rtol=0, atol=0)


def test_overwritten_logits_are_not_read_again() -> None:
    case = make_case()
    weight_VH = case.student_weight_VH.requires_grad_()
    logits_TV = case.student_hidden_TH @ weight_VH.T
    before_TV, squares = logits_TV.detach().clone(), logits_TV.square().sum()  # which saves the logits
    with torch.no_grad():
        logits_distillation(logits_TV, case.teacher_logits_TV, loss=LogitLossConfig(), overwrite_student=True)
    assert_close(logits_TV, before_TV, rtol=0, atol=0)
    loss = logits_distillation(logits_TV, case.teacher_logits_TV, loss=LogitLossConfig(), overwrite_student=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + squares).backward()


@every_loss
def test_gradcheck(loss: LogitLossConfig) -> None:
    case = make_case(num_tokens=3, vocab_size=7, num_rows=8)
    student = (case.student_hidden_TH.requires_grad_(), case.student_weight_VH.requires_grad_())
    assert torch.autograd.gradcheck(ours(case, loss, chunk_tokens=2), student)
    assert torch.autograd.gradcheck(from_logits(case, loss), case.student_logits_TV.detach().requires_grad_())


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_of_itself_is_zero_with_zero_gradient(loss: LogitLossConfig, dtype: torch.dtype) -> None:
    """Exactly, but for the top K: there the probabilities are rounded before they meet."""
    case = make_case(dtype=dtype)
    hidden_TH, weight_VH = case.student_hidden_TH, case.student_weight_VH
    value, *grads = loss_and_grads(
        lambda h, w: linear_distillation(h, w, hidden_TH, weight_VH, loss=loss, vocab_size=37), hidden_TH, weight_VH
    )
    logits_TV = case.student_logits_TV
    other_value, other_grad = loss_and_grads(
        lambda s: logits_distillation(s, logits_TV, loss=loss, vocab_size=37), logits_TV
    )
    if loss.top_k_rest is TopKRest.drop and loss.top_k:  # what the K do not hold is pushed down
        assert_close([value, other_value], [torch.zeros_like(value)] * 2, rtol=0, atol=1e-4)
        assert other_grad.count_nonzero() > 0
        return
    limit = 0.0 if not loss.top_k else 1e-13 if dtype == torch.float64 else 3e-5
    assert max(abs(value), abs(other_value)) <= limit
    assert all(grad.abs().max() <= limit for grad in (*grads, other_grad))


@every_loss
def test_fp32_on_a_large_vocabulary(loss: LogitLossConfig) -> None:
    case = make_case(num_tokens=4, vocab_size=16_000, num_rows=16_064, dtype=torch.float32)
    student = (case.student_hidden_TH, case.student_weight_VH)
    have = loss_and_grads(ours(case, loss), *student)
    want = loss_and_grads(dense(case, loss), *student)
    for mine, theirs in zip(have, want, strict=True):
        assert_close(mine, theirs, rtol=2e-5, atol=2e-6 * theirs.abs().max().item(), check_dtype=False)


@every_loss
def test_bf16_is_fp64_but_for_the_rounding_of_the_gradient(loss: LogitLossConfig) -> None:
    case = make_case(dtype=torch.bfloat16)
    student_TV = case.student_logits_TV
    value, grad_TV = loss_and_grads(from_logits(case, loss), student_TV)
    want, want_TV = loss_and_grads(dense_from_logits(case, loss), student_TV.double())
    assert (value.dtype, grad_TV.dtype) == (torch.float32, torch.bfloat16)
    assert_close(value.double(), want, rtol=1e-5, atol=0)
    assert_close(grad_TV.double(), want_TV, rtol=2.0**-8, atol=1e-6)


@every_loss
def test_only_the_common_vocabulary_counts(loss: LogitLossConfig) -> None:
    """Tokens beyond ``vocab_size`` that one of the two has: no part in the loss, zero gradient."""
    case, other = make_case(vocab_size=30), make_case(vocab_size=30)
    other.teacher_weight_VH[30:37] = 50.0
    other.student_weight_VH[30:37] *= -9
    have = loss_and_grads(ours(other, loss), other.student_hidden_TH, other.student_weight_VH)
    want = loss_and_grads(ours(case, loss), case.student_hidden_TH, case.student_weight_VH)
    assert_close(have, want, rtol=0, atol=0)
    assert have[2][30:].count_nonzero() == 0
    if not renormalized(loss):
        assert have[2][:30].count_nonzero() == 30 * 8


@every_loss
def test_far_apart_logits_stay_finite(loss: LogitLossConfig) -> None:
    """One side sure of a token that the other gives e^-2000: probabilities underflow in fp32, losses must not."""
    student_TV = torch.tensor([[0.0, 2000, 0, 0, 0, 0, 0], [2000, 0, 0, 0, 0, 0, 1]])
    teacher_TV = torch.tensor([[2000.0, 0, 0, 0, 0, 0, 0], [2000, 0, 0, 0, 0, 0, 2]])
    value, grad_TV = loss_and_grads(lambda s: logits_distillation(s, teacher_TV, loss=loss), student_TV)
    assert value.isfinite()
    assert grad_TV.isfinite().all()
    size = {
        LogitLossKind.forward_kl: loss.temperature**2 * math.log(5) if renormalized(loss) else 2000 * loss.temperature,
        LogitLossKind.reverse_kl: 2000 * loss.temperature,
        LogitLossKind.jensen_shannon: loss.temperature**2
        * -(loss.beta * math.log(loss.beta) + (1 - loss.beta) * math.log(1 - loss.beta)),
        LogitLossKind.mse: loss.temperature**2 * 2 / 7,
        LogitLossKind.cosine: loss.temperature**2,
    }[loss.kind]
    assert value.item() == pytest.approx(size, rel=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in LogitLossKind if kind is not LogitLossKind.forward_kl])
def test_a_small_loss_keeps_its_digits_in_fp32(kind: LogitLossKind) -> None:
    """Values of 1e-5 and less; taken as the difference of two large numbers, they would be off by percents."""
    loss = LogitLossConfig(kind=kind)
    generator = torch.Generator().manual_seed(1)
    teacher_TV = 3 * torch.randn(4, 1000, generator=generator) + 10
    student_TV = teacher_TV + 5e-3 * torch.randn(4, 1000, generator=generator)
    want = dense_loss(loss, student_TV, teacher_TV, 1000, torch.ones(4))
    assert want < 1e-3
    assert_close(logits_distillation(student_TV, teacher_TV, loss=loss).double(), want, rtol=5e-3, atol=0)


def test_jensen_shannon_by_hand() -> None:
    """p = [1/4, 3/4], q = [1/2, 1/2], beta = 1/4: m = [7/16, 9/16]."""
    loss = LogitLossConfig(kind=LogitLossKind.jensen_shannon, beta=0.25)
    student_TV = torch.zeros(1, 2, dtype=torch.float64)
    value, grad_TV = loss_and_grads(
        lambda s: logits_distillation(s, torch.tensor([[0.25, 0.75]]).double().log(), loss=loss), student_TV
    )
    log = torch.tensor([4 / 7, 4 / 3, 8 / 7, 8 / 9]).double().log()  # p/m, then q/m
    want = 0.25 * (0.25 * log[0] + 0.75 * log[1]) + 0.75 * (0.5 * log[2] + 0.5 * log[3])
    assert_close(value, want)
    assert_close(grad_TV, 0.75 * 0.25 * torch.stack([log[2] - log[3], log[3] - log[2]])[None])


@pytest.mark.parametrize("rest", TopKRest)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_k_of_the_whole_vocabulary_is_the_full_divergence(
    rest: TopKRest, temperature: float, dtype: torch.dtype
) -> None:
    case = make_case(dtype=dtype)
    student = (case.student_hidden_TH, case.student_weight_VH)
    top_k = LogitLossConfig(top_k=37, top_k_rest=rest, temperature=temperature)
    have = loss_and_grads(ours(case, top_k), *student)
    want = loss_and_grads(ours(case, LogitLossConfig(temperature=temperature)), *student)
    assert_close(
        have, want, **({"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5})
    )


def test_the_papers_scale_of_gradients() -> None:
    """At high temperature T^2 KL tends to half the variance of the logits' differences (uniform over the tokens)."""
    case = make_case()
    loss = LogitLossConfig(temperature=1e4)
    value = ours(case, loss, weighted=False)(case.student_hidden_TH, case.student_weight_VH)
    diff_TV = (case.student_logits_TV - case.teacher_logits_TV)[:, :37]
    assert_close(value, diff_TV.var(1, correction=0).sum() / 2, rtol=1e-3, atol=0)
