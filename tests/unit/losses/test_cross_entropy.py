from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from minitron.losses import linear_cross_entropy
from tests.unit.losses.reference import Case, assert_as_exact_as, loss_and_grads, make_case


def ours(case: Case, *, chunk_tokens: int | None = None, weighted: bool = True) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda hidden_TH, weight_VH: linear_cross_entropy(
        hidden_TH,
        weight_VH,
        case.labels_T,
        vocab_size=case.vocab_size,
        token_weights_T=case.token_weights_T if weighted else None,
        chunk_tokens=chunk_tokens,
    )


def torchs(
    case: Case, *, weighted: bool = True, dtype: torch.dtype = torch.float64
) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(hidden_TH: Tensor, weight_VH: Tensor) -> Tensor:
        logits_TV = (hidden_TH.to(dtype) @ weight_VH.to(dtype).T)[:, : case.vocab_size]
        loss_T = F.cross_entropy(logits_TV, case.labels_T, reduction="none")
        return (loss_T * case.token_weights_T).sum() if weighted else loss_T.sum()

    return loss


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("chunk_tokens", [None, 1, 5, 13, 100])
def test_is_torchs(chunk_tokens: int | None, weighted: bool) -> None:
    case = make_case()
    student = (case.student_hidden_TH, case.student_weight_VH)
    have = loss_and_grads(ours(case, chunk_tokens=chunk_tokens, weighted=weighted), *student)
    want = loss_and_grads(torchs(case, weighted=weighted), *student)
    assert_close(have, want, rtol=1e-12, atol=1e-13)
    assert have[2][case.vocab_size :].count_nonzero() == 0


def test_fp32_across_many_blocks() -> None:
    case = make_case(num_tokens=70, vocab_size=49_000, num_rows=49_152, dtype=torch.float32)
    student = (case.student_hidden_TH, case.student_weight_VH)
    have = loss_and_grads(ours(case, chunk_tokens=32), *student)
    plain = loss_and_grads(torchs(case, dtype=torch.float32), *student)
    assert_as_exact_as(plain, have, loss_and_grads(torchs(case), *student))


@pytest.mark.parametrize("label", [-1, 11])
def test_a_label_that_nobody_looked_at_shows_in_the_gradient(monkeypatch: pytest.MonkeyPatch, label: int) -> None:
    """As on a GPU, where looking would wait: the guard of updates sees gradients alone."""
    monkeypatch.setattr("minitron.losses.fused.check_labels", lambda *_args: None)
    case = make_case(num_tokens=5, vocab_size=11, num_rows=16)
    case.labels_T[2] = label
    loss, hidden_TH, weight_VH = loss_and_grads(ours(case), case.student_hidden_TH, case.student_weight_VH)
    assert loss.isnan()
    assert hidden_TH.isnan().any(-1).tolist() == [token == 2 for token in range(5)]
    assert weight_VH[: case.vocab_size].isnan().all()


def test_gradcheck() -> None:
    case = make_case(num_tokens=5, vocab_size=7, num_rows=8)
    student = (case.student_hidden_TH.requires_grad_(), case.student_weight_VH.requires_grad_())
    assert torch.autograd.gradcheck(ours(case, chunk_tokens=2), student)


def test_bf16_is_fp64_but_for_the_rounding_of_the_gradients() -> None:
    """Logits that bf16 holds exactly; bounds as in test_kl."""
    case, u = make_case(), 2.0**-8
    generator = torch.Generator().manual_seed(2)
    hidden_TH = torch.randint(-1, 2, (13, 16), generator=generator).bfloat16()
    weight_VH = torch.randint(-8, 9, (40, 16), generator=generator).bfloat16() / 8
    loss, grad_TH, grad_VH = loss_and_grads(ours(case, chunk_tokens=5), hidden_TH, weight_VH)
    wide = (hidden_TH.double(), weight_VH.double())
    want, want_TH, want_VH = loss_and_grads(torchs(case), *wide)
    logits_TV = wide[0] @ wide[1].T
    q_TV = logits_TV[:, :37].softmax(1)
    logits_grad_TV = (q_TV - F.one_hot(case.labels_T, 37)) * case.token_weights_T[:, None]
    assert_close(loss.double(), want, rtol=1e-6, atol=0)
    size_TH = logits_grad_TV.abs() @ wide[1][:37].abs()
    size_VH = logits_grad_TV.abs().T @ wide[0].abs()
    assert ((grad_TH.double() - want_TH).abs() <= 2.05 * u * size_TH + 1e-6).all()
    assert ((grad_VH.double() - want_VH)[:37].abs() <= 3.05 * u * size_VH + 1e-6).all()


def test_huge_logits_stay_finite() -> None:
    weight_VH = torch.tensor([[1e4], [0.0]], dtype=torch.float64)
    hidden_TH = torch.ones(1, 1, dtype=torch.float64)
    loss = linear_cross_entropy(hidden_TH, weight_VH, torch.tensor([1]), vocab_size=2)
    assert loss.item() == 1e4
