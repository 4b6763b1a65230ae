"""Losses of hidden states and relations against their definitions, gradients included."""

import math

import pytest
import torch

from minitron.config.intermediate import HiddenLoss
from minitron.distill.hidden_losses import hidden_loss, relation_loss


def states(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


WEIGHTS_SB = torch.rand(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("kind", list(HiddenLoss))
def test_hidden_loss_token_by_token(kind: HiddenLoss) -> None:
    teacher, student = states(5, 2, 6, seed=1), states(5, 2, 6, seed=2)
    want = 0.0
    for s in range(5):
        for b in range(2):
            t, u = teacher[s, b], student[s, b]
            one = 1 - float(t @ u) / math.sqrt(float(t @ t) * float(u @ u))
            if kind is HiddenLoss.mse:
                one = float((t - u) @ (t - u)) / 6
            want += one * float(WEIGHTS_SB[s, b])
    assert float(hidden_loss(kind, teacher, student, WEIGHTS_SB)) == pytest.approx(want, rel=1e-12)


def test_relations_position_by_position() -> None:
    """Two heads; the teacher's have 4 channels, the student's 3."""
    teacher, student = states(5, 2, 8, seed=1), states(5, 2, 6, seed=2)
    want = 0.0
    for b in range(2):
        for head in range(2):
            t, u = teacher[:, b, head * 4 : head * 4 + 4], student[:, b, head * 3 : head * 3 + 3]
            for s in range(5):
                p = torch.softmax(t[: s + 1] @ t[s] / 2, 0)
                q = torch.softmax(u[: s + 1] @ u[s] / math.sqrt(3), 0)
                want += float((p * (p / q).log()).sum()) * float(WEIGHTS_SB[s, b])
    assert float(relation_loss(teacher, student, WEIGHTS_SB, heads=2)) == pytest.approx(want, rel=1e-12)


def test_gradient_of_relations() -> None:
    teacher, student = states(5, 2, 8, seed=1), states(5, 2, 6, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: 0.7 * relation_loss(teacher, x, WEIGHTS_SB, heads=2), student)


def test_equal_states_have_no_loss_and_no_gradient() -> None:
    student = states(5, 2, 8, seed=1).requires_grad_()
    loss = relation_loss(student.detach(), student, WEIGHTS_SB, heads=2)
    (gradient,) = torch.autograd.grad(loss, student)
    assert float(loss.detach()) == 0
    assert float(gradient.abs().max()) == 0
