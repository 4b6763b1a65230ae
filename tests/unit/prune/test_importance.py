"""Hooks on plain modules that are shaped like a Megatron layer, against the formulas."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from minitron.config.score import Aggregation, FfnActivation, HeadNorm
from minitron.errors import DataError, NumericsError, PlatformError
from minitron.prune.importance import ImportanceCollector
from minitron.prune.scores import Scores
from tests.unit.prune.reference import shape

MODEL = shape(num_layers=2, hidden_size=6, ffn_hidden_size=5, num_attention_heads=4, kv_channels=3)
S = 7


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(6, 12)
        self.linear_proj = nn.Linear(12, 6)

    def forward(self, x_SBH: Tensor) -> Tensor:
        return self.linear_proj(self.mix(x_SBH.cumsum(0)))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear_fc1 = nn.Linear(6, 5)
        self.linear_fc2 = nn.Linear(5, 6)

    def forward(self, x_SBH: Tensor) -> Tensor:
        return self.linear_fc2(self.linear_fc1(x_SBH).tanh())


class GatedMlp(nn.Module):
    """As Megatron's: gate rows precede up rows, and the first linear leaves its bias to its caller."""

    def __init__(self) -> None:
        super().__init__()
        self.linear_fc1 = TupleLinear(6, 10)
        self.linear_fc2 = nn.Linear(5, 6)

    def forward(self, x_SBH: Tensor) -> Tensor:
        values, bias = self.linear_fc1(x_SBH)
        gate, up = (values + bias).chunk(2, dim=-1)
        return self.linear_fc2(gate.sigmoid() * up)


class TupleLinear(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return x @ self.weight.t(), self.bias


class Layer(nn.Module):
    """Called by keyword, answers with a tuple, as Megatron's does."""

    def __init__(self, layer_number: int) -> None:
        super().__init__()
        self.layer_number = layer_number
        self.input_layernorm = nn.RMSNorm(6)
        self.self_attention = Attention()
        self.pre_mlp_layernorm = nn.RMSNorm(6)
        self.mlp = Mlp()

    def forward(self, *, hidden_states: Tensor) -> tuple[Tensor, None]:
        x = hidden_states + self.self_attention(self.input_layernorm(hidden_states))
        return x + self.mlp(self.pre_mlp_layernorm(x)), None


def layers() -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(Layer(number) for number in (1, 2)).double()


FINAL = nn.RMSNorm(6).double()
nn.init.normal_(FINAL.weight, mean=1.0)


def run(stack: nn.ModuleList, hidden_SBH: Tensor) -> list[Tensor]:
    """All layers; gives every layer's input and the last output."""
    states = [hidden_SBH]
    for layer in stack:
        states.append(layer(hidden_states=states[-1])[0])
    FINAL(states[-1])
    return states


def samples(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(S, count, 6, generator=generator, dtype=torch.float64)


def collect(hidden_SBH: Tensor, *, micro_batch_size: int, head_norm: HeadNorm) -> Scores:
    stack = layers()
    collector = ImportanceCollector(
        stack, FINAL, MODEL, seq_length=S, aggregations=list(Aggregation), head_norm=head_norm
    )
    with collector:
        for part in hidden_SBH.split(micro_batch_size, dim=1):
            run(stack, part)
    return collector.reduce(source_id="w")


@pytest.mark.parametrize("head_norm", list(HeadNorm))
def test_l2_mean_and_block_importance_by_formula(head_norm: HeadNorm) -> None:
    hidden_SBH = samples(8)
    scores = collect(hidden_SBH, micro_batch_size=3, head_norm=head_norm)
    stack = layers()
    states = run(stack, hidden_SBH)
    assert (scores.num_samples, scores.seq_length) == (8, S)
    check(scores.width[Aggregation.l2_mean].final, FINAL(states[-1]).abs().mean(0).norm(dim=0))
    for i, layer in enumerate(stack):
        attended = states[i] + layer.self_attention(layer.input_layernorm(states[i]))
        normed = [layer.input_layernorm(states[i]), layer.pre_mlp_layernorm(attended)]
        heads = layer.self_attention.mix(normed[0].cumsum(0))
        ffn = layer.mlp.linear_fc1(normed[1]).tanh()
        width = scores.width[Aggregation.l2_mean]
        check(width.hidden[2 * i], normed[0].abs().mean(0).norm(dim=0))
        check(width.hidden[2 * i + 1], normed[1].abs().mean(0).norm(dim=0))
        check(width.ffn[i], ffn.abs().mean(0).norm(dim=0))
        if head_norm is HeadNorm.token:
            check(width.head[i], heads.unflatten(2, (4, 3)).norm(dim=3).mean(0).norm(dim=0))
        else:
            check(width.head[i], heads.abs().mean(0).norm(dim=0).unflatten(0, (4, 3)).norm(dim=1))
        dots = (states[i] * states[i + 1]).sum(-1)
        cosine = dots / states[i].norm(dim=-1) / states[i + 1].norm(dim=-1)
        check(scores.layer[i], 1 - cosine.mean())


def check(have: np.ndarray, want: Tensor) -> None:
    np.testing.assert_allclose(have, want.detach().numpy(), rtol=1e-12)


@pytest.mark.parametrize("gated", [False, True])
def test_ffn_before_the_activation(gated: bool) -> None:
    stack = layers()
    if gated:
        for layer in stack:
            layer.mlp = GatedMlp().double()
    hidden_SBH = samples(8)
    collector = ImportanceCollector(stack, FINAL, MODEL, seq_length=S, ffn_activation=FfnActivation.before)
    with collector:
        states = run(stack, hidden_SBH)
    scores = collector.reduce(source_id="w")
    for i, layer in enumerate(stack):
        attended = states[i] + layer.self_attention(layer.input_layernorm(states[i]))
        first = layer.mlp.linear_fc1
        before = (layer.pre_mlp_layernorm(attended) @ first.weight.t() + first.bias)[..., :5]
        check(scores.width[Aggregation.l2_mean].ffn[i], before.abs().mean(0).norm(dim=0))
    assert scores.ffn_activation is FfnActivation.before


@pytest.mark.parametrize("aggregation", list(Aggregation))
def test_the_grouping_into_batches_does_not_matter(aggregation: Aggregation) -> None:
    one, many = (collect(samples(8), micro_batch_size=n, head_norm=HeadNorm.token) for n in (8, 3))
    np.testing.assert_allclose(many.layer, one.layer, rtol=1e-12)
    for axis in ("ffn", "head", "hidden"):
        have, want = (getattr(s.width[aggregation], axis) for s in (many, one))
        np.testing.assert_allclose(have, want, rtol=1e-9)


def test_samples_of_weight_zero_do_not_count() -> None:
    stack = layers()
    hidden_SBH = samples(8)
    collector = ImportanceCollector(stack, FINAL, MODEL, seq_length=S)
    with collector:
        for part, weights_B in zip(
            hidden_SBH.split(4, dim=1),
            (torch.tensor([1.0, 1.0, 1.0, 1.0]), torch.tensor([1.0, 0.0, 1.0, 0.0])),
            strict=True,
        ):
            collector.observe(weights_B)
            run(stack, part)
    have = collector.reduce(source_id="w")
    want = collect(hidden_SBH[:, [0, 1, 2, 3, 4, 6]], micro_batch_size=6, head_norm=HeadNorm.token)
    assert have.num_samples == 6
    np.testing.assert_allclose(have.layer, want.layer, rtol=1e-12)
    np.testing.assert_allclose(have.width[Aggregation.l2_mean].ffn, want.width[Aggregation.l2_mean].ffn, rtol=1e-12)


def test_hooks_are_removed_when_the_pass_fails() -> None:
    stack = layers()
    collector = ImportanceCollector(stack, FINAL, MODEL, seq_length=S)
    with pytest.raises(RuntimeError, match="stop"):
        fail_inside(collector, stack)
    assert not any(module._forward_hooks for module in stack.modules())


def fail_inside(collector: ImportanceCollector, stack: nn.ModuleList) -> None:
    with collector:
        assert any(module._forward_hooks for module in stack.modules())
        raise RuntimeError("stop")


def test_passes_that_cannot_be_scored() -> None:
    stack = layers()
    collector = ImportanceCollector(stack, FINAL, MODEL, seq_length=S)
    with pytest.raises(DataError, match="no calibration sample"):
        collector.reduce(source_id="w")
    with collector, pytest.raises(DataError, match="6 tokens long instead of 7"):
        run(stack, samples(2)[:6])
    with collector:
        run(stack, samples(2).fill_(torch.nan))
    with pytest.raises(NumericsError, match="not finite"):
        collector.reduce(source_id="w")
    stack[1].pre_mlp_layernorm = nn.Identity()
    with pytest.raises(PlatformError, match=r"layer 1 has no pre_mlp_layernorm.*local_spec=True"):
        ImportanceCollector(stack, FINAL, MODEL, seq_length=S)
