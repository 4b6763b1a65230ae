"""What the engine does around a loss, tried with the default one: forward KL, temperature 1."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from minitron.losses import linear_distillation, logits_distillation
from tests.unit.losses.reference import (
    FORWARD_KL,
    Case,
    assert_as_exact_as,
    dense,
    dense_from_logits,
    dense_loss,
    from_logits,
    loss_and_grads,
    make_case,
    ours,
)


def test_by_hand() -> None:
    """Teacher [1/4, 3/4], student [1/2, 1/2]: log 2 - H(teacher), and gradient q - p."""
    student_TV = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    loss = logits_distillation(student_TV, torch.tensor([[0.25, 0.75]]).double().log(), loss=FORWARD_KL)
    loss.backward()
    assert loss.item() == pytest.approx(0.25 * torch.tensor(0.5).log().item() + 0.75 * torch.tensor(1.5).log().item())
    assert_close(student_TV.grad, torch.tensor([[0.25, -0.25]]).double())


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("chunk_tokens", [None, 1, 5, 13, 100])
def test_is_the_dense_formula(chunk_tokens: int | None, weighted: bool) -> None:
    case = make_case()
    student = (case.student_hidden_TH, case.student_weight_VH)
    have = loss_and_grads(ours(case, chunk_tokens=chunk_tokens, weighted=weighted), *student)
    want = loss_and_grads(dense(case, weighted=weighted), *student)
    assert_close(have, want, rtol=1e-12, atol=1e-13)


def test_no_vocab_size_means_no_padding() -> None:
    case = make_case(vocab_size=40)
    have = loss_and_grads(
        lambda s: logits_distillation(s, case.teacher_logits_TV, loss=FORWARD_KL), case.student_logits_TV
    )
    ones_T = torch.ones(13)
    want = loss_and_grads(
        lambda s: dense_loss(FORWARD_KL, s, case.teacher_logits_TV, 40, ones_T), case.student_logits_TV
    )
    assert_close(have, want, rtol=1e-12, atol=1e-13)


def plain(case: Case) -> Callable[[Tensor, Tensor], Tensor]:
    """torch's own functions on full logits, in the case's dtype."""

    def loss(hidden_TH: Tensor, weight_VH: Tensor) -> Tensor:
        student_TV, teacher_TV = hidden_TH @ weight_VH.T, case.teacher_logits_TV
        log_q_TV, log_p_TV = (x[:, : case.vocab_size].log_softmax(-1) for x in (student_TV, teacher_TV))
        loss_T = F.kl_div(log_q_TV, log_p_TV, reduction="none", log_target=True).sum(-1)
        return (loss_T * case.token_weights_T).sum()

    return loss


def test_fp32_across_many_blocks() -> None:
    """8 tokens of this vocabulary fill a block of the CPU's; 70 tokens need nine."""
    case = make_case(num_tokens=70, vocab_size=49_000, num_rows=49_152, dtype=torch.float32)
    student = (case.student_hidden_TH, case.student_weight_VH)
    have = loss_and_grads(ours(case, chunk_tokens=32), *student)
    assert_as_exact_as(loss_and_grads(plain(case), *student), have, loss_and_grads(dense(case), *student))
    logits_TV = case.student_logits_TV
    have = loss_and_grads(from_logits(case), logits_TV)
    want = loss_and_grads(dense_from_logits(case), logits_TV)
    assert_close(have, want, rtol=1e-5, atol=1e-7, check_dtype=False)


def test_padding_does_not_matter_and_gets_no_gradient() -> None:
    case, padded = make_case(), make_case()
    for weight_VH in (padded.student_weight_VH, padded.teacher_weight_VH):
        weight_VH[37:] = 1e6
    have = loss_and_grads(ours(padded, chunk_tokens=4), padded.student_hidden_TH, padded.student_weight_VH)
    want = loss_and_grads(ours(case, chunk_tokens=4), case.student_hidden_TH, case.student_weight_VH)
    assert_close(have, want, rtol=0, atol=0)
    assert have[2][37:].count_nonzero() == 0
    assert have[2][:37].count_nonzero() == 37 * 8
    _, grad_TV = loss_and_grads(from_logits(padded), padded.student_logits_TV)
    assert grad_TV[:, 37:].count_nonzero() == 0


def test_a_token_of_weight_zero_is_left_out() -> None:
    case = make_case()
    out = case.token_weights_T == 0
    assert out.sum() == 1
    loss, grad_TH, grad_VH = loss_and_grads(ours(case), case.student_hidden_TH, case.student_weight_VH)
    assert grad_TH[out].count_nonzero() == 0
    case.student_hidden_TH[out] *= -3
    assert_close(loss_and_grads(ours(case), case.student_hidden_TH, case.student_weight_VH), (loss, grad_TH, grad_VH))


def test_teacher_and_token_weights_get_no_gradient() -> None:
    case = make_case()
    fixed = (case.teacher_hidden_TH, case.teacher_weight_VH, case.token_weights_T)
    for tensor in fixed:
        tensor.requires_grad_()
    ours(case)(case.student_hidden_TH.requires_grad_(), case.student_weight_VH).backward()
    from_logits(case)(case.student_logits_TV).backward()
    assert case.student_hidden_TH.grad is not None
    assert all(tensor.grad is None for tensor in fixed)
    assert not ours(case)(case.student_hidden_TH.detach(), case.student_weight_VH).requires_grad


@pytest.mark.parametrize("which", ["hidden", "weight"])
def test_gradient_of_one_of_the_two_only(which: str) -> None:
    case = make_case()
    _, *both = loss_and_grads(ours(case), case.student_hidden_TH, case.student_weight_VH)
    leaf = case.student_hidden_TH if which == "hidden" else case.student_weight_VH
    leaf.requires_grad_()
    ours(case)(case.student_hidden_TH, case.student_weight_VH).backward()
    assert_close(leaf.grad, both[which == "weight"])


def test_no_grad_gives_the_same_loss() -> None:
    case = make_case()
    want, *_ = loss_and_grads(ours(case), case.student_hidden_TH, case.student_weight_VH)
    with torch.no_grad():
        loss = ours(case)(case.student_hidden_TH.requires_grad_(), case.student_weight_VH)
        from_full = from_logits(case)(case.student_logits_TV)
    assert not loss.requires_grad
    assert_close([loss, from_full], [want, want])


@pytest.mark.parametrize("retain_graph", [False, True])
def test_incoming_gradient_scales_and_the_graph_can_be_kept(retain_graph: bool) -> None:
    case = make_case()
    _, *want = loss_and_grads(ours(case), case.student_hidden_TH, case.student_weight_VH)
    leaves = (case.student_hidden_TH.requires_grad_(), case.student_weight_VH.requires_grad_())
    loss = ours(case)(*leaves)
    for _ in range(2 if retain_graph else 1):
        grads = torch.autograd.grad(3 * loss, leaves, retain_graph=retain_graph)
        assert_close(grads, tuple(3 * grad for grad in want))


def test_huge_logits_stay_finite() -> None:
    """Logits of 1e4: exp overflows in fp64 too, unless the maximum is taken out."""
    student_TV = torch.tensor([[1e4, 0.0], [0.0, -1e4]], dtype=torch.float64)
    teacher_TV = torch.tensor([[0.0, 0.0], [-1e4, 0.0]], dtype=torch.float64)
    loss, grad_TV = loss_and_grads(lambda s: logits_distillation(s, teacher_TV, loss=FORWARD_KL), student_TV)
    assert loss.item() == pytest.approx((0.5 * 1e4 - torch.tensor(2.0).log().item()) + 1e4, rel=1e-12)
    assert_close(grad_TV, torch.tensor([[0.5, -0.5], [1.0, -1.0]]).double())


def test_small_divergence_keeps_its_digits_in_fp32() -> None:
    """KL of about 1e-5 at logits of about 10; the difference of two entropies in fp32 would be off by percents."""
    generator = torch.Generator().manual_seed(1)
    teacher_TV = 3 * torch.randn(4, 1000, generator=generator) + 10
    student_TV = teacher_TV + 5e-3 * torch.randn(4, 1000, generator=generator)
    want = dense_loss(FORWARD_KL, student_TV, teacher_TV, 1000, torch.ones(4))
    assert 1e-6 < want < 1e-3
    assert_close(logits_distillation(student_TV, teacher_TV, loss=FORWARD_KL).double(), want, rtol=5e-3, atol=0)


def exact_bf16_case() -> Case:
    """bf16 tensors whose logits bf16 holds exactly: sums of at most 16 multiples of 1/8, each at most 1."""
    generator = torch.Generator().manual_seed(2)
    case = make_case()

    def integers(limit: int, *shape: int) -> Tensor:
        return torch.randint(-limit, limit + 1, shape, generator=generator).bfloat16()

    case.student_hidden_TH, case.teacher_hidden_TH = integers(1, 13, 16), integers(1, 13, 16)
    case.student_weight_VH, case.teacher_weight_VH = integers(8, 40, 16) / 8, integers(8, 40, 16) / 8
    return case


@pytest.mark.parametrize("chunk_tokens", [None, 3])
def test_bf16_is_fp64_but_for_the_rounding_of_the_gradients(chunk_tokens: int | None) -> None:
    """Bounds from bf16's unit roundoff u: a product of a rounded factor, rounded, is off by 2u (|a| @ |b|).

    The weight's gradient has one more rounding: each chunk's product, then the sum.
    """
    case, u = exact_bf16_case(), 2.0**-8
    student = (case.student_hidden_TH, case.student_weight_VH)
    loss, grad_TH, grad_VH = loss_and_grads(ours(case, chunk_tokens=chunk_tokens), *student)
    wide = [tensor.double() for tensor in student]
    want, want_TH, want_VH = loss_and_grads(dense(case), *wide)
    _, logits_grad_TV = loss_and_grads(dense_from_logits(case), wide[0] @ wide[1].T)
    assert (loss.dtype, grad_TH.dtype, grad_VH.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    assert_close(loss.double(), want, rtol=1e-6, atol=0)
    size_TH = logits_grad_TV.abs() @ wide[1].abs()
    size_VH = logits_grad_TV.abs().T @ wide[0].abs()
    assert ((grad_TH.double() - want_TH).abs() <= 2.05 * u * size_TH + 1e-6).all()
    assert ((grad_VH.double() - want_VH).abs() <= 3.05 * u * size_VH + 1e-6).all()


def test_bf16_logits_are_computed_in_fp32() -> None:
    case = make_case(dtype=torch.bfloat16)
    student_TV = case.student_logits_TV
    loss, grad_TV = loss_and_grads(from_logits(case), student_TV)
    want, want_TV = loss_and_grads(dense_from_logits(case), student_TV.double())
    assert (loss.dtype, grad_TV.dtype) == (torch.float32, torch.bfloat16)
    assert_close(loss.double(), want, rtol=1e-6, atol=0)
    assert_close(grad_TV.double(), want_TV, rtol=2.0**-8, atol=1e-6)


def test_student_and_teacher_may_differ_in_dtype() -> None:
    case = make_case(dtype=torch.bfloat16)
    student = (case.student_hidden_TH.double(), case.student_weight_VH.double())
    case.teacher_hidden_TH, case.teacher_weight_VH = case.teacher_hidden_TH.float(), case.teacher_weight_VH.float()
    have = loss_and_grads(ours(case), *student)
    want = loss_and_grads(dense(case), *student)
    assert_close(have, want, rtol=1e-5, atol=1e-5)


def test_no_tokens() -> None:
    case = make_case()
    weight_VH = case.student_weight_VH.requires_grad_()
    none_TH, teacher_TH = case.student_hidden_TH[:0], case.teacher_hidden_TH[:0]
    loss = linear_distillation(none_TH, weight_VH, teacher_TH, case.teacher_weight_VH, loss=FORWARD_KL, vocab_size=37)
    loss.backward()
    assert loss == 0
    assert weight_VH.grad is not None
    assert weight_VH.grad.count_nonzero() == 0
