"""The fused losses on CUDA against the dense formula in fp64, gradients too."""

import pytest
import torch
import torch.nn.functional as F

from minitron.config.logit_loss import LogitLossConfig
from minitron.losses import linear_cross_entropy, linear_distillation

VOCAB, ROWS, TOKENS = 5000, 5120, 1100


def _inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to("cuda", dtype)

    student, teacher = normal(TOKENS, 64), normal(TOKENS, 96)
    return student, 0.3 * normal(ROWS, 64), teacher, 0.3 * normal(ROWS, 96)


@pytest.mark.parametrize(
    ("dtype", "value", "gradient"), [(torch.float32, 1e-6, 1e-5), (torch.bfloat16, 2e-3, 2e-2)], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize("chunk_tokens", [None, 128])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_forward_kl(
    dtype: torch.dtype, value: float, gradient: float, chunk_tokens: int | None, temperature: float
) -> None:
    inputs = _inputs(dtype)
    weights_T = torch.rand(TOKENS, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    student, rows, teacher, teacher_rows = inputs
    for leaf in (student, rows):
        leaf.requires_grad_()
    loss = linear_distillation(
        student, rows, teacher, teacher_rows,
        loss=LogitLossConfig(temperature=temperature), vocab_size=VOCAB,
        token_weights_T=weights_T, chunk_tokens=chunk_tokens,
    )  # fmt: skip
    loss.backward()
    dense = [leaf.detach().double() for leaf in inputs]
    for leaf in dense[:2]:
        leaf.requires_grad_()
    log_q, log_p = ((h @ w[:VOCAB].T / temperature).log_softmax(-1) for h, w in (dense[:2], dense[2:]))
    wanted = (F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1) * weights_T.double()).sum()
    wanted = wanted * temperature**2
    wanted.backward()
    torch.testing.assert_close(loss.double(), wanted, rtol=value, atol=0)
    for have, want in ((student, dense[0]), (rows, dense[1])):
        assert have.grad is not None
        assert want.grad is not None
        assert float((have.grad.double() - want.grad).norm() / want.grad.norm()) < gradient


def test_cross_entropy() -> None:
    student, rows, _, _ = _inputs(torch.float32)
    labels_T = torch.randint(VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(1)).cuda()
    loss = linear_cross_entropy(student, rows, labels_T, vocab_size=VOCAB)
    wanted = F.cross_entropy((student.double() @ rows.double()[:VOCAB].T), labels_T, reduction="sum")
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=0)


def test_an_unknown_label_makes_the_loss_nan() -> None:
    """On a GPU nobody looks at the labels: that would wait for the device."""
    student, rows, _, _ = _inputs(torch.float32)
    labels_T = torch.full((TOKENS,), VOCAB, device="cuda")
    loss = linear_cross_entropy(student, rows, labels_T, vocab_size=VOCAB)
    loss.backward()
    assert loss.isnan()
    assert student.grad is not None
    assert student.grad.isnan().any(), "or the guard of updates would not see it"
