"""Wrong inputs are refused, by error class and by the values in the message."""

from typing import Any

import pytest
import torch

from minitron.config.logit_loss import LogitLossConfig, LogitLossKind, TopKRest
from minitron.errors import ConfigError, DataError, LayoutError, MinitronError
from minitron.losses import (
    SparseTarget,
    linear_cross_entropy,
    linear_distillation,
    linear_sparse_kl,
    logits_distillation,
)

H4, H8 = torch.zeros(3, 4), torch.zeros(3, 8)
W4, W8 = torch.zeros(10, 4), torch.zeros(10, 8)
LABELS = torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("tensors", "options", "error", "message"),
    [
        ((H4[None], W4, H8, W8), {}, LayoutError, r"student's hidden state: shape \[1, 3, 4\]"),
        ((H4, W8, H8, W8), {}, LayoutError, "student's hidden state has 4 channels, its output layer takes 8"),
        ((H4, W4, H8, W4), {}, LayoutError, "teacher's hidden state has 8 channels"),
        ((H4, W4, H8[:2], W8), {}, LayoutError, "student has 3 tokens, teacher 2"),
        ((H4, W4, H8, W8[:9]), {}, LayoutError, "student's output layer has 10 rows on this rank, the teacher's 9"),
        ((H4, W4, H8, W8), {"vocab_size": 11}, LayoutError, "vocab_size 11 must be between 1 and"),
        ((H4, W4, H8, W8), {"vocab_size": 0}, LayoutError, "vocab_size 0 must be between 1 and"),
        ((H4, W4, H8, W8), {"token_weights_T": torch.ones(2)}, LayoutError, r"shape \[2\], expected \[3\]"),
        ((H4, W4, H8, W8), {"chunk_tokens": 0}, ConfigError, "chunk_tokens is 0"),
        (
            (H4, W4, H8, W8),
            {"loss": LogitLossConfig(top_k=10), "vocab_size": 9},
            ConfigError,
            "distill.logit_loss.top_k=10 is more than the 9 tokens",
        ),
        ((H4.int(), W4, H8, W8), {}, ConfigError, "torch.int32, expected bf16"),
        ((H4, W4.bfloat16(), H8, W8), {}, ConfigError, "torch.float32 on cpu, its output layer torch.bfloat16"),
        ((H4, W4, H8.to("meta"), W8.to("meta")), {}, ConfigError, "student is on cpu, teacher on meta"),
    ],
)
def test_linear_distillation(
    tensors: tuple[torch.Tensor, ...], options: dict[str, Any], error: type[MinitronError], message: str
) -> None:
    with pytest.raises(error, match=message):
        linear_distillation(*tensors, **{"vocab_size": 10, "loss": LogitLossConfig()} | options)


@pytest.mark.parametrize(
    ("labels_T", "error", "message"),
    [
        (LABELS[:2], LayoutError, r"labels have shape \[2\], expected \[3\]"),
        (LABELS.int(), ConfigError, "labels are torch.int32 on cpu, expected int64"),
        (LABELS - 100, DataError, r"labels run from -100 to -100, outside \[0, 9\)"),
        (LABELS + 9, DataError, r"labels run from 9 to 9, outside \[0, 9\)"),
    ],
)
def test_labels(labels_T: torch.Tensor, error: type[MinitronError], message: str) -> None:
    with pytest.raises(error, match=message):
        linear_cross_entropy(H4, W4, labels_T, vocab_size=9)


@pytest.mark.parametrize(
    ("student", "teacher", "vocab_size", "message"),
    [
        (H4[None], H4, None, "student's logits: shape"),
        (H4, H4[0], None, "teacher's logits: shape"),
        (H4, H8, None, "student's logits have 4 columns on this rank, the teacher's 8"),
        (H4, H4[:1], None, "student has 3 tokens, teacher 1"),
        (H4, H4, 5, "vocab_size 5 must be between 1 and"),
    ],
)
def test_logits_distillation(
    student: torch.Tensor, teacher: torch.Tensor, vocab_size: int | None, message: str
) -> None:
    with pytest.raises(LayoutError, match=message):
        logits_distillation(student, teacher, loss=LogitLossConfig(), vocab_size=vocab_size)


IDS, PROBS, ENTROPY = (
    torch.tensor([[0, 8], [1, -1], [2, 0]]),
    torch.tensor([[0.5, 0.2], [0.5, 0], [1, 0]]),
    torch.ones(3),
)


@pytest.mark.parametrize(
    ("target", "rest", "error", "message"),
    [
        (SparseTarget(IDS[:2], PROBS), TopKRest.drop, LayoutError, r"ids have shape \[2, 2\], expected \[3, K\]"),
        (
            SparseTarget(IDS[:, :0], PROBS),
            TopKRest.drop,
            LayoutError,
            r"shape \[3, 0\], expected .* K at least 1",
        ),
        (
            SparseTarget(IDS, PROBS[:, :1]),
            TopKRest.drop,
            LayoutError,
            r"probabilities have shape \[3, 1\], its ids",
        ),
        (SparseTarget(IDS, PROBS, ENTROPY[:2]), None, LayoutError, r"entropies have shape \[2\], expected \[3\]"),
        (SparseTarget(IDS.int(), PROBS), TopKRest.drop, ConfigError, "ids in torch.int32"),
        (SparseTarget(IDS, PROBS.int()), TopKRest.drop, ConfigError, "probabilities in torch.int32"),
        (SparseTarget(IDS, PROBS), None, ConfigError, "without entropy_T"),
        (SparseTarget(IDS.to("meta"), PROBS), TopKRest.drop, ConfigError, r"are on \['cpu', 'meta'\]"),
        (SparseTarget(IDS + 1, PROBS), TopKRest.drop, DataError, r"ids run from 0 to 9, outside \[0, 9\)"),
        (SparseTarget(IDS - 1, PROBS), TopKRest.drop, DataError, "ids run from -2 to 7"),
        (SparseTarget(IDS.clamp(max=0), PROBS), TopKRest.drop, DataError, "target of token 0 holds an id twice"),
        (SparseTarget(IDS, PROBS - 0.1), TopKRest.drop, DataError, "probabilities go down to -0.1"),
        (SparseTarget(IDS, PROBS * torch.nan), TopKRest.drop, DataError, "probabilities go down to nan"),
        (SparseTarget(IDS, PROBS + 0.1), TopKRest.drop, DataError, "a probability in a slot with id -1"),
    ],
)
def test_linear_sparse_kl(
    target: SparseTarget, rest: TopKRest | None, error: type[MinitronError], message: str
) -> None:
    with pytest.raises(error, match=message):
        linear_sparse_kl(H4, W4, target, rest=rest, vocab_size=9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0 must be"),
        ({"temperature": float("nan")}, "temperature=nan must be"),
        ({"temperature": float("inf")}, "temperature=inf must be"),
        ({"kind": LogitLossKind.jensen_shannon, "beta": 0.0}, "beta=0.0 must lie"),
        ({"kind": LogitLossKind.jensen_shannon, "beta": 1.0}, "beta=1.0 must lie"),
        ({"kind": LogitLossKind.jensen_shannon, "beta": float("nan")}, "beta=nan must lie"),
        ({"kind": LogitLossKind.mse, "beta": 0.4}, "beta=0.4 has no meaning for distill.logit_loss.kind=mse"),
        ({"top_k": -1}, "top_k=-1 must be"),
        ({"kind": LogitLossKind.cosine, "top_k": 5}, "top_k=5 goes with distill.logit_loss.kind=forward_kl only"),
    ],
)
def test_config(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^distill.logit_loss.{message}"):
        LogitLossConfig(**options)
