"""Number formats."""

from dataclasses import dataclass
from enum import StrEnum


class Dtype(StrEnum):
    """Number format of weights and activations in training and evaluation."""

    fp32 = "fp32"
    bf16 = "bf16"


@dataclass(kw_only=True)
class PrecisionConfig:
    """Number formats."""

    dtype: Dtype = Dtype.fp32
    """Weights and activations in training and scoring; the optimizer's copy is always fp32."""
