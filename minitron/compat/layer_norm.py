"""Layer norm with a zero-centred weight, in plain torch: Megatron leaves it to apex and Transformer Engine."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class LayerNorm1P(torch.nn.LayerNorm):
    """Layer norm that multiplies by its stored weight plus one, as Nemotron's.

    Megatron calls it ``layernorm_zero_centered_gamma``; the stored weight is the same in transformers'
    ``NemotronLayerNorm1P`` and in Transformer Engine's norm.
    """

    def reset_parameters(self) -> None:
        """Start as a norm that scales by one and shifts by nothing."""
        torch.nn.init.zeros_(self.weight)
        torch.nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Norm over the last dimension, in the weight's type or the input's, whichever is wider."""
        wide = input.to(torch.promote_types(input.dtype, self.weight.dtype))  # CUDA takes no mixture
        return F.layer_norm(wide, self.normalized_shape, self.weight + 1, self.bias, self.eps).to(input.dtype)


def layer_norm_1p(config: Any, hidden_size: int, eps: float = 1e-5, **_kwargs: object) -> LayerNorm1P:
    """Build one where Megatron builds a norm (its ``LayerNormBuilder``)."""
    assert config.normalization == "LayerNorm", config.normalization
    assert config.layernorm_zero_centered_gamma
    return LayerNorm1P(hidden_size, eps=eps)
