"""KL from a few of the teacher's probabilities."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from minitron.config.logit_loss import LogitLossConfig, TopKRest
from minitron.losses import SparseTarget, linear_sparse_kl
from tests.unit.losses.reference import Case, dense, loss_and_grads, make_case, make_target, ours, softmax, sparse_kl


def on_logits(target: SparseTarget, rest: TopKRest | None) -> Callable[[Tensor], Tensor]:
    """The loss as a function of the logits [1, V] of one token: a hidden state of 1 and logits for weights."""
    return lambda logits_1V: linear_sparse_kl(
        torch.ones(1, 1, dtype=logits_1V.dtype), logits_1V.T, target, rest=rest, vocab_size=logits_1V.shape[1]
    )


def sparse(
    case: Case, target: SparseTarget, rest: TopKRest | None, chunk_tokens: int | None = None
) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda hidden_TH, weight_VH: linear_sparse_kl(
        hidden_TH,
        weight_VH,
        target,
        rest=rest,
        vocab_size=case.vocab_size,
        token_weights_T=case.token_weights_T,
        chunk_tokens=chunk_tokens,
    )


def dense_sparse(case: Case, target: SparseTarget, rest: TopKRest | None) -> Callable[[Tensor, Tensor], Tensor]:
    """Token by token, on its used slots."""

    def loss(hidden_TH: Tensor, weight_VH: Tensor) -> Tensor:
        q_TV = softmax((hidden_TH.double() @ weight_VH.double().T)[:, : case.vocab_size])
        total = torch.zeros((), dtype=torch.float64)
        for t in range(len(q_TV)):
            used_K = target.ids_TK[t] >= 0
            p_1K, ids_1K, q_1V = (
                target.probs_TK[t, used_K][None].double(),
                target.ids_TK[t, used_K][None],
                q_TV[t][None],
            )
            if rest is None:
                value = -(p_1K * q_1V.gather(1, ids_1K).log()).sum() - target.entropy_T[t]
            elif used_K.any():
                value = sparse_kl(p_1K, q_1V, ids_1K, rest).sum()
            else:
                continue
            total = total + case.token_weights_T[t].double() * value
        return total

    return loss


@pytest.mark.parametrize("chunk_tokens", [None, 5])
@pytest.mark.parametrize("rest", [*TopKRest, None])
def test_is_the_dense_formula(rest: TopKRest | None, chunk_tokens: int | None) -> None:
    case = make_case()
    target = make_target(case)
    student = (case.student_hidden_TH, case.student_weight_VH)
    have = loss_and_grads(sparse(case, target, rest, chunk_tokens), *student)
    want = loss_and_grads(dense_sparse(case, target, rest), *student)
    assert_close(have, want, rtol=1e-12, atol=1e-13)
    assert have[2][case.vocab_size :].count_nonzero() == 0


@pytest.mark.parametrize("rest", [*TopKRest, None])
def test_gradcheck(rest: TopKRest | None) -> None:
    case = make_case(num_tokens=3, vocab_size=7, num_rows=8)
    target = make_target(case, num_slots=3)
    student = (case.student_hidden_TH.requires_grad_(), case.student_weight_VH.requires_grad_())
    assert torch.autograd.gradcheck(sparse(case, target, rest, 2), student)


@pytest.mark.parametrize("rest", [*TopKRest, None])
def test_bf16_student(rest: TopKRest | None) -> None:
    """fp32 inside, whatever the probabilities' dtype: value to 1e-5 where bf16 holds the logits exactly."""
    case = make_case(dtype=torch.bfloat16)
    case.student_hidden_TH = torch.eye(13, 40).bfloat16() * 2
    case.student_weight_VH = torch.randint(-8, 9, (40, 40), generator=torch.Generator().manual_seed(4)).bfloat16() / 8
    target = make_target(case)
    target = SparseTarget(target.ids_TK, target.probs_TK.bfloat16(), target.entropy_T)
    student = (case.student_hidden_TH, case.student_weight_VH)
    have = loss_and_grads(sparse(case, target, rest), *student)
    want = loss_and_grads(dense_sparse(case, target, rest), *(x.double() for x in student))
    assert [x.dtype for x in have] == [torch.float32, torch.bfloat16, torch.bfloat16]
    assert_close(have[0].double(), want[0], rtol=1e-5, atol=0)
    assert_close(have[1].double(), want[1], rtol=0.02, atol=0.02)
    assert_close(have[2].double(), want[2], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("rest", TopKRest)
@pytest.mark.parametrize("top_k", [1, 5])
def test_the_teachers_largest_are_the_online_top_k(rest: TopKRest, top_k: int) -> None:
    case = make_case()
    student = (case.student_hidden_TH, case.student_weight_VH)
    p_TV = softmax(case.teacher_logits_TV[:, : case.vocab_size])
    probs_TK, ids_TK = p_TV.topk(top_k)
    have = loss_and_grads(sparse(case, SparseTarget(ids_TK, probs_TK), rest), *student)
    want = loss_and_grads(ours(case, LogitLossConfig(top_k=top_k, top_k_rest=rest)), *student)
    assert_close(have, want, rtol=1e-12, atol=1e-13)


def test_ghost_by_hand() -> None:
    """Teacher: 1/2 on token 2, 1/2 elsewhere. Student [1/8, 1/8, 1/4, 1/2]: the ghost has 3/4.

    KL = 1/2 log 2 + 1/2 log 2/3. Gradient: q - p on token 2; the others share q_ghost - p_ghost = 1/4 as
    they share q, 1 : 1 : 4.
    """
    logits_1V = torch.tensor([[1 / 8, 1 / 8, 1 / 4, 1 / 2]], dtype=torch.float64).log()
    target = SparseTarget(torch.tensor([[2, -1]]), torch.tensor([[0.5, 0.0]]))
    loss, grad_1V = loss_and_grads(on_logits(target, TopKRest.ghost), logits_1V)
    assert loss.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-12)
    want_1V = torch.tensor([[1 / 24, 1 / 24, -1 / 4, 1 / 6]], dtype=torch.float64)
    assert_close(grad_1V, want_1V, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [20.0, 200.0, 2000.0])
def test_ghost_whose_student_probability_vanishes(gap: float, dtype: torch.dtype) -> None:
    """Student: 1 on token 0, e^-gap and 3 e^-gap on the others: 1 - q_0 is 0 in fp32 at once, e^-gap a little later.

    KL = 3/4 log 3/4 + 1/4 (log 1/4 - log 4 + gap); gradient 1/4 on token 0, -1/4 shared 1 : 3.
    """
    logits_1V = torch.tensor([[gap, 0.0, math.log(3)]], dtype=dtype)
    target = SparseTarget(torch.tensor([[0]]), torch.tensor([[0.75]]))
    loss, grad_1V = loss_and_grads(on_logits(target, TopKRest.ghost), logits_1V)
    want = 0.75 * math.log(0.75) + 0.25 * (math.log(0.25) - math.log(4) + gap)
    assert loss.item() == pytest.approx(want, rel=1e-6)
    assert_close(grad_1V, torch.tensor([[1 / 4, -1 / 16, -3 / 16]], dtype=dtype), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rest", [*TopKRest, None])
def test_no_column_is_left_for_the_rest(rest: TopKRest | None) -> None:
    """All ids given, with probabilities that rounding left at 0.999: the ghost is dropped, nothing is infinite."""
    logits_1V = torch.tensor([[0.0, 1.0, -1.0]])
    target = SparseTarget(torch.tensor([[1, 0, 2]]), torch.tensor([[0.5, 0.3, 0.199]]), torch.tensor([1.0]))
    loss, grad_1V = loss_and_grads(on_logits(target, rest), logits_1V)
    p_V, q_V = torch.tensor([0.3, 0.5, 0.199]), logits_1V[0].softmax(0)
    mass = 1.0 if rest is TopKRest.renormalize else 0.999
    p_V = p_V / 0.999 * mass
    entropy = 1.0 if rest is None else -(p_V * p_V.log()).sum()
    assert_close(loss, -(p_V * q_V.log()).sum() - entropy)
    assert_close(grad_1V[0], mass * q_V - p_V, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rest", [*TopKRest, None])
def test_a_token_without_entries(rest: TopKRest | None) -> None:
    """Nothing is known: nothing is asked for. A sample's value is then minus the entropy alone."""
    target = SparseTarget(torch.tensor([[-1, -1]]), torch.zeros(1, 2), torch.tensor([0.5]))
    loss, grad_1V = loss_and_grads(on_logits(target, rest), torch.tensor([[0.0, 3.0, -1.0]]))
    assert loss.item() == pytest.approx(-0.5 if rest is None else 0.0, abs=1e-6)
    assert_close(grad_1V, torch.zeros(1, 3), rtol=0, atol=1e-7)


@pytest.mark.parametrize("rest", [*TopKRest, None])
def test_an_entry_of_probability_zero(rest: TopKRest | None) -> None:
    """As a slot that is not used, but for what it takes from the student's rest under ghost and renormalize."""
    logits_1V = torch.tensor([[0.3, 3.0, -1.0]], dtype=torch.float64)
    target = SparseTarget(torch.tensor([[0, 2]]), torch.tensor([[0.25, 0.0]]).double(), torch.tensor([0.5]).double())
    loss, grad_1V = loss_and_grads(on_logits(target, rest), logits_1V)
    q_V = logits_1V[0].softmax(0)
    h = -0.25 * math.log(0.25)
    want, want_V = {
        None: (-0.25 * q_V[0].log() - 0.5, 0.25 * q_V - torch.tensor([0.25, 0, 0])),
        TopKRest.drop: (-0.25 * q_V[0].log() - h, 0.25 * q_V - torch.tensor([0.25, 0, 0])),
        TopKRest.renormalize: (
            -(q_V[0] / (q_V[0] + q_V[2])).log(),
            torch.stack([-q_V[2], torch.zeros(()).double(), q_V[2]]) / (q_V[0] + q_V[2]),
        ),
        TopKRest.ghost: (
            -0.25 * q_V[0].log() - h + 0.75 * (0.75 / q_V[1]).log(),
            q_V - torch.tensor([0.25, 0.75, 0]),
        ),
    }[rest]
    assert_close((loss, grad_1V[0]), (want, want_V), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("rest", [None, *TopKRest])
def test_an_id_that_nobody_looked_at_shows_in_the_gradient(
    monkeypatch: pytest.MonkeyPatch, rest: TopKRest | None
) -> None:
    monkeypatch.setattr("minitron.losses.fused.check_sparse", lambda *_args, **_kwargs: None)
    case = make_case()
    ids_TK = torch.arange(3).repeat(len(case.student_hidden_TH), 1)
    ids_TK[4, 1] = case.vocab_size
    probs_TK = torch.full(ids_TK.shape, 0.25, dtype=case.student_hidden_TH.dtype)
    target = SparseTarget(ids_TK, probs_TK, torch.zeros(len(ids_TK)))
    loss, hidden_TH, _ = loss_and_grads(sparse(case, target, rest), case.student_hidden_TH, case.student_weight_VH)
    assert loss.isnan()
    assert hidden_TH.isnan().any(-1).nonzero().flatten().tolist() == [4]


def test_random_samples_average_to_the_full_divergence() -> None:
    """Ids drawn from the teacher, probability = count / draws: value and gradient are unbiased.

    Both are linear in the drawn p, so their variance is that of x under p, over the number of draws: x = log q
    for the value, a column of the weight for the hidden state's gradient. Bound: 5 standard errors.
    """
    case = make_case(num_tokens=1)
    case.token_weights_T = torch.ones(1).double()
    (p_V,) = softmax(case.teacher_logits_TV[:, :37])
    (q_V,) = softmax(case.student_logits_TV[:, :37])
    entropy_T = -(p_V * p_V.log()).sum()[None]
    student = (case.student_hidden_TH, case.student_weight_VH)
    repeats, draws = 300, 8
    drawn_RN = p_V.multinomial(repeats * draws, replacement=True, generator=torch.Generator().manual_seed(5))
    values, hidden_grads = [], []
    for drawn_N in drawn_RN.view(repeats, draws):
        probs_TK, ids_TK = (drawn_N.bincount(minlength=37).double() / draws)[None].topk(draws)
        target = SparseTarget(ids_TK.masked_fill(probs_TK == 0, -1), probs_TK, entropy_T)
        value, grad_TH, _ = loss_and_grads(sparse(case, target, None), *student)
        values.append(value)
        hidden_grads.append(grad_TH[0])
    want, want_TH, _ = loss_and_grads(dense(case), *student)
    x_VN = torch.cat([q_V.log()[:, None], case.student_weight_VH[:37]], 1)
    variance_N = p_V @ x_VN**2 - (p_V @ x_VN) ** 2
    error_N = (variance_N / (repeats * draws)).sqrt()
    assert error_N[0] < 0.05 * want  # the bound says something
    assert (torch.stack(values).mean() - want).abs() <= 5 * error_N[0]
    assert ((torch.stack(hidden_grads).mean(0) - want_TH[0]).abs() <= 5 * error_N[1:]).all()
    assert torch.stack(values).std() > 10 * error_N[0]  # and single draws do differ
