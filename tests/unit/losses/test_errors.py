"""Wrong inputs are refused, by error class and by the values in the message."""

from typing import Any

import pytest
import torch

from minitron.errors import ConfigError, DataError, LayoutError, MinitronError
from minitron.losses import kl_from_logits, linear_cross_entropy, linear_kl

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
        ((H4.int(), W4, H8, W8), {}, ConfigError, "torch.int32, expected bf16"),
        ((H4, W4.bfloat16(), H8, W8), {}, ConfigError, "torch.float32 on cpu, its output layer torch.bfloat16"),
        ((H4, W4, H8.to("meta"), W8.to("meta")), {}, ConfigError, "student is on cpu, teacher on meta"),
    ],
)
def test_linear_kl(
    tensors: tuple[torch.Tensor, ...], options: dict[str, Any], error: type[MinitronError], message: str
) -> None:
    with pytest.raises(error, match=message):
        linear_kl(*tensors, **{"vocab_size": 10} | options)


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
def test_kl_from_logits(student: torch.Tensor, teacher: torch.Tensor, vocab_size: int | None, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        kl_from_logits(student, teacher, vocab_size=vocab_size)
