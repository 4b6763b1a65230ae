"""States whose norm Transformer Engine fuses into the linear behind it: seen as torch's own norm makes them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from minitron.config.intermediate import State, StateKind
from minitron.distill.states import see_state

HIDDEN, EPSILON = 6, 0.1  # large enough to be missed
NORMS = [("RMSNorm", False), ("RMSNorm", True), ("LayerNorm", False), ("LayerNorm", True)]


class FusedLinear(nn.Module):
    """As far as Transformer Engine's ``LayerNormLinear`` is looked at: the norm's parameters under its names."""

    def __init__(self, normalization: str, *, zero_centered: bool, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        stored_H = 0.3 * torch.randn(HIDDEN, generator=generator) + (0 if zero_centered else 1)
        self.layer_norm_weight = nn.Parameter(stored_H)
        if normalization == "LayerNorm":
            self.layer_norm_bias = nn.Parameter(torch.randn(HIDDEN, generator=generator))


def model(normalization: str, *, zero_centered: bool) -> Any:
    """Two blocks, each of two norms that do nothing and the linears that do their work."""
    linears = [FusedLinear(normalization, zero_centered=zero_centered, seed=seed) for seed in range(4)]
    layers = [
        SimpleNamespace(
            layer_number=number + 1,
            input_layernorm=IdentityOp(),
            self_attention=SimpleNamespace(linear_qkv=linears[2 * number]),
            pre_mlp_layernorm=IdentityOp(),
            mlp=SimpleNamespace(linear_fc1=linears[2 * number + 1]),
        )
        for number in range(2)
    ]
    config = TransformerConfig(
        num_layers=2,
        hidden_size=HIDDEN,
        num_attention_heads=2,
        normalization=normalization,
        layernorm_epsilon=EPSILON,
        layernorm_zero_centered_gamma=zero_centered,
    )
    return SimpleNamespace(decoder=SimpleNamespace(layers=layers), config=config)


def torchs_norm(linear: FusedLinear, normalization: str, *, zero_centered: bool) -> Any:
    """In fp64."""
    norm = getattr(nn, normalization)(HIDDEN, eps=EPSILON, dtype=torch.float64)
    with torch.no_grad():
        norm.weight.copy_(linear.layer_norm_weight.double() + (1 if zero_centered else 0))
        if normalization == "LayerNorm":
            norm.bias.copy_(linear.layer_norm_bias)
    return norm


def states(*, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    return (0.5 + torch.randn(5, 2, HIDDEN, generator=generator)).to(dtype).requires_grad_()


@pytest.mark.parametrize(("normalization", "zero_centered"), NORMS)
@pytest.mark.parametrize(
    ("state", "norm", "linear"),
    [
        (State(StateKind.embedding, 0), "input_layernorm", 0),
        (State(StateKind.mlp_input, 0), "pre_mlp_layernorm", 1),
        (State(StateKind.block_output, 0), "input_layernorm", 2),
        (State(StateKind.mlp_input, 1), "pre_mlp_layernorm", 3),
    ],
)
def test_a_fused_norm_is_seen_as_torchs(
    normalization: str, zero_centered: bool, state: State, norm: str, linear: int
) -> None:
    gpt, seen = model(normalization, zero_centered=zero_centered), []

    def see(carrier_SBH: Tensor, state_SBH: Tensor) -> Tensor:
        seen.append(state_SBH)
        return carrier_SBH + 100

    handle = see_state(gpt, state, see)
    layer = gpt.decoder.layers[linear // 2]
    fused = (layer.self_attention.linear_qkv, layer.mlp.linear_fc1)[linear % 2]
    mine_SBH, exact_SBH = states(dtype=torch.float32), states(dtype=torch.float64)
    handed_on = getattr(layer, norm)(mine_SBH)
    assert torch.equal(handed_on, mine_SBH + 100)  # the linear behind still gets the state without the norm
    [state_SBH] = seen
    want_SBH = torchs_norm(fused, normalization, zero_centered=zero_centered)(exact_SBH)
    torch.testing.assert_close(state_SBH.double(), want_SBH, rtol=1e-5, atol=1e-6)

    weights_SBH = states(dtype=torch.float64).detach().roll(1, 0)
    (have,) = torch.autograd.grad((state_SBH * weights_SBH).sum(), mine_SBH)
    (want,) = torch.autograd.grad((want_SBH * weights_SBH).sum(), exact_SBH)
    torch.testing.assert_close(have.double(), want, rtol=1e-5, atol=1e-5)

    handle.remove()
    assert torch.equal(getattr(layer, norm)(mine_SBH), mine_SBH)
    assert len(seen) == 1


@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
def test_a_small_zero_centred_weight_is_not_lost_in_bf16(normalization: str) -> None:
    """1 + 2^-9 is 1 in bf16; the state is rounded once, at the end."""
    gpt, seen = model(normalization, zero_centered=True), []

    def see(carrier_SBH: Tensor, state_SBH: Tensor) -> Tensor:
        seen.append(state_SBH)
        return carrier_SBH

    see_state(gpt, State(StateKind.embedding, 0), see)
    layer = gpt.decoder.layers[0]
    linear = layer.self_attention.linear_qkv.bfloat16()
    with torch.no_grad():
        linear.layer_norm_weight.fill_(2.0**-9)
    mine_SBH = states(dtype=torch.bfloat16)
    layer.input_layernorm(mine_SBH)
    [state_SBH] = seen
    norm = torchs_norm(linear, normalization, zero_centered=True)
    assert state_SBH.dtype == torch.bfloat16
    assert torch.equal(state_SBH, norm(mine_SBH.double()).bfloat16())
    with torch.no_grad():
        norm.weight.fill_(1)
    assert not torch.equal(state_SBH, norm(mine_SBH.double()).bfloat16())
