import numpy as np
import pytest
import torch

from minitron.config.score import Aggregation, Reduction
from minitron.prune import statistics
from minitron.prune.statistics import cosine_distance, reduce_batch, reduce_sequence


def formula(kind: Reduction, values: np.ndarray, axis: int) -> np.ndarray:
    """The paper's definitions, word for word."""
    if kind is Reduction.mean:
        return np.abs(values).mean(axis)
    if kind is Reduction.l2:
        return np.sqrt((values**2).sum(axis))
    return ((values - values.mean(axis, keepdims=True)) ** 2).mean(axis)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-11), (torch.float32, 1e-11), (torch.bfloat16, 5e-7)])
@pytest.mark.parametrize("aggregation", list(Aggregation), ids=lambda a: a.value)
def test_aggregations_match_the_formula(aggregation: Aggregation, dtype: torch.dtype, rtol: float) -> None:
    activation_SBX = (torch.randn(53, 5, 6, generator=torch.Generator().manual_seed(0)) + 0.3).to(dtype)
    value_BX = reduce_sequence(activation_SBX, [aggregation.seq])[aggregation.seq]
    sums = torch.stack([value_BX.sum(0), value_BX.square().sum(0)]).numpy()
    per_sample = formula(aggregation.seq, activation_SBX.double().numpy(), 0)
    want = formula(aggregation.batch, per_sample, 0)
    np.testing.assert_allclose(reduce_batch(sums, 5, aggregation.batch), want, rtol=rtol)


@pytest.mark.parametrize("wanted", [[Reduction.mean], [Reduction.var], [Reduction.l2], list(Reduction)])
def test_a_reduction_does_not_depend_on_the_others(wanted: list[Reduction]) -> None:
    activation_SBX = torch.randn(7, 5, 6, generator=torch.Generator().manual_seed(0))
    for reduction, value_BX in reduce_sequence(activation_SBX, wanted).items():
        want = formula(reduction, activation_SBX.double().numpy(), 0)
        np.testing.assert_allclose(value_BX.numpy(), want, rtol=1e-12)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-13), (torch.bfloat16, 1e-7)])
def test_heads_are_normed_token_by_token(dtype: torch.dtype, rtol: float) -> None:
    activation_SBX = torch.randn(37, 2, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    have = reduce_sequence(activation_SBX, [Reduction.mean], per_head=3)[Reduction.mean]
    want = activation_SBX.double().unflatten(-1, (2, 3)).square().sum(-1).sqrt().mean(0)
    torch.testing.assert_close(have, want, rtol=rtol, atol=0)


@pytest.mark.parametrize("reduction", list(Reduction))
def test_chunks_of_tokens_change_nothing(reduction: Reduction, monkeypatch: pytest.MonkeyPatch) -> None:
    activation_SBX = torch.randn(71, 2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = reduce_sequence(activation_SBX, [reduction], per_head=3)[reduction]
    distance = cosine_distance(activation_SBX, activation_SBX**2)
    monkeypatch.setitem(statistics._CHUNK_ELEMENTS, "cpu", 200)
    assert len(list(statistics._chunks(activation_SBX))) == 5  # of 16 tokens
    parts = reduce_sequence(activation_SBX, [reduction], per_head=3)[reduction]
    torch.testing.assert_close(parts, whole, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(cosine_distance(activation_SBX, activation_SBX**2), distance)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-6)])
def test_cosine_distance_keeps_its_digits_near_zero(dtype: torch.dtype, rtol: float) -> None:
    generator = torch.Generator().manual_seed(0)
    before_SBH = torch.randn(30, 3, 64, generator=generator, dtype=dtype)
    after_SBH = before_SBH + 0.02 * torch.randn(30, 3, 64, generator=generator, dtype=dtype)
    directions = [state.double() / state.double().norm(dim=-1, keepdim=True) for state in (before_SBH, after_SBH)]
    want = 0.5 * (directions[1] - directions[0]).square().sum(-1).sum(0)
    torch.testing.assert_close(cosine_distance(before_SBH, after_SBH), want, rtol=rtol, atol=0)
    assert want.max() / 30 < 3e-4  # a cosine in fp32 would leave it three digits


def test_the_activation_is_left_alone() -> None:
    activation_SBX = torch.randn(3, 2, 4, dtype=torch.float64)
    before = activation_SBX.clone()
    reduce_sequence(activation_SBX, list(Reduction))
    assert torch.equal(activation_SBX, before)


def test_cosine_distance_by_hand() -> None:
    before_SBH = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]], [[3.0, 4.0]]])
    after_SBH = torch.tensor([[[0.0, 2.0]], [[5.0, 0.0]], [[-3.0, -4.0]]])
    assert cosine_distance(before_SBH, after_SBH).tolist() == pytest.approx([1 + 0 + 2])
