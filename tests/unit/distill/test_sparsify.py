"""What is kept of a distribution, against the dense softmax in fp64, at TP1 and over ranks."""

import numpy as np
import pytest
import torch

from minitron.config.teacher_logits import CacheMethod, TeacherLogitsConfig
from minitron.distill.cache_format import Entries
from minitron.distill.sparsify import sparse_entries, stratified_draws
from minitron.losses import SparseTarget, linear_sparse_kl
from minitron.losses.vocab import VocabShard
from tests.helpers.pool import WorkerPool
from tests.unit.distill.workers import dense_softmax, entries_of_shard

S, H, PADDED = 12, 6, 64
DRAWS = TeacherLogitsConfig(num_draws=20)
TOP_K = TeacherLogitsConfig(method=CacheMethod.top_k, top_k=7)
TOP_P = TeacherLogitsConfig(method=CacheMethod.top_p, top_p=0.6, top_k=6)


def model(dtype: torch.dtype = torch.float64, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden_SH = torch.randn(S, H, generator=generator, dtype=torch.float64)
    weight_VH = torch.randn(PADDED, H, generator=generator, dtype=torch.float64) * scale / H**0.5
    return hidden_SH.to(dtype), weight_VH.to(dtype)


def entries(settings: TeacherLogitsConfig, vocab_size: int, sample: int = 0, **kind: torch.dtype) -> Entries:
    hidden_SH, weight_VH = model(**kind)
    return sparse_entries(hidden_SH, weight_VH, sample, settings, VocabShard.build(vocab_size, PADDED, None))


@pytest.mark.parametrize("vocab_size", [PADDED, 50, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_top_k_and_entropy_equal_the_dense_softmax(vocab_size: int, dtype: torch.dtype) -> None:
    found = entries(TOP_K, vocab_size, dtype=dtype)
    hidden_SH, weight_VH = model(dtype)
    # As the online teacher: the product in the model's dtype, the softmax in a wider one.
    logits_SV = (hidden_SH @ weight_VH.t()).double()
    p_SV = dense_softmax(logits_SV, torch.eye(PADDED), vocab_size)
    k = min(TOP_K.top_k, vocab_size)
    assert found.number_S.tolist() == [k] * S
    ids_SK, weights_SK = found.padded(k)
    tolerance = 1e-7 if dtype is torch.float64 else 1e-6  # padded() is fp32
    expected_SK = -np.sort(-p_SV, axis=-1)[:, :k]
    np.testing.assert_allclose(weights_SK, expected_SK, rtol=tolerance)
    np.testing.assert_allclose(np.take_along_axis(p_SV, ids_SK, -1), expected_SK, rtol=tolerance)
    np.testing.assert_allclose(found.entropy_S, -(p_SV * np.log(p_SV)).sum(-1), rtol=tolerance, atol=1e-7)


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    found = entries(TOP_P, 50)
    p_SV = dense_softmax(*model(), 50)
    mass_SV = np.cumsum(-np.sort(-p_SV, axis=-1), axis=-1)
    needed_S = (mass_SV < TOP_P.top_p).sum(-1) + 1
    assert needed_S.max() > TOP_P.top_k > needed_S.min(), "some tokens should meet the limit, others not"
    assert found.number_S.tolist() == np.minimum(needed_S, TOP_P.top_k).tolist()
    for token, weights in enumerate(np.split(found.weights, np.cumsum(found.number_S)[:-1])):
        np.testing.assert_allclose(weights.sum(), mass_SV[token, found.number_S[token] - 1], rtol=1e-12)


def test_draws_fill_equal_parts_and_depend_on_the_sample_alone() -> None:
    draws_SN = stratified_draws(7, S, 20)
    assert np.array_equal(np.floor(draws_SN * 20), np.tile(np.arange(20), (S, 1)))
    assert np.array_equal(stratified_draws(7, S, 20), draws_SN)
    assert not np.array_equal(stratified_draws(8, S, 20), draws_SN)


def test_counts_are_unbiased_and_vary_less_than_independent_draws() -> None:
    """Mean of counts / N over many tokens of one distribution is p, within 5 standard errors of independent draws."""
    copies, n, vocab_size = 1500, DRAWS.num_draws, 50
    hidden_SH, weight_VH = model()
    vocab = VocabShard.build(vocab_size, PADDED, None)
    for token in (1, 3, 5):
        p_V = dense_softmax(hidden_SH[token : token + 1], weight_VH, vocab_size)[0]
        found = sparse_entries(hidden_SH[token].expand(copies, H), weight_VH, token, DRAWS, vocab)
        ids_SK, counts_SK = found.padded(n)
        assert counts_SK.sum(-1).tolist() == [n] * copies
        q_SV = np.zeros((copies, vocab_size + 1))
        np.put_along_axis(q_SV, ids_SK, counts_SK / n, -1)  # unused slots, id -1, go to the last column
        q_SV = q_SV[:, :vocab_size]
        independent_V = p_V * (1 - p_V) / n  # variance of counts / N
        often = p_V * n * copies > 20  # rarer ids are hit too few times for a normal bound
        assert often.sum() > 20
        assert q_SV[:, ~often].sum() * n <= 5 * (1 + n * copies * p_V[~often].sum())
        error_V = np.abs(q_SV.mean(0) - p_V)
        assert (error_V <= 5 * np.sqrt(independent_V / copies))[often].all()
        likely = p_V > 0.1
        assert likely.any()
        assert (q_SV.var(0) < 0.5 * independent_V)[likely].all()


def test_loss_and_gradient_of_draws_are_unbiased() -> None:
    """Means over many tokens of one distribution against KL(p || q) and q - p, within 5 standard errors."""
    copies, n, vocab_size, token = 4000, DRAWS.num_draws, 50, 3
    teacher_SH, teacher_VH = model()
    found = sparse_entries(
        teacher_SH[token].expand(copies, H), teacher_VH, 1, DRAWS, VocabShard.build(vocab_size, PADDED, None)
    )
    ids_TK, counts_TK = (torch.from_numpy(part) for part in found.padded(n))
    entropy_T = torch.from_numpy(found.entropy_S)
    target = SparseTarget(ids_TK, counts_TK.double() / n, entropy_T)

    generator = torch.Generator().manual_seed(5)
    hidden_TH = torch.randn(1, 4, generator=generator, dtype=torch.float64).repeat(copies, 1).requires_grad_()
    weight_VH = torch.randn(PADDED, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    token_weights_T = torch.full((copies,), 1 / copies, dtype=torch.float64)
    loss = linear_sparse_kl(
        hidden_TH, weight_VH, target, rest=None, vocab_size=vocab_size, token_weights_T=token_weights_T
    )
    (gradient_TH,) = torch.autograd.grad(loss, hidden_TH)
    loss = loss.detach()

    p_V = torch.from_numpy(dense_softmax(teacher_SH[token : token + 1], teacher_VH, vocab_size)[0])
    rows_VH = weight_VH.detach()[:vocab_size]
    log_q_V = (hidden_TH.detach()[0] @ rows_VH.t()).log_softmax(-1)
    kl = (p_V * (p_V.log() - log_q_V)).sum()
    variance = (p_V * log_q_V**2).sum() - (p_V * log_q_V).sum() ** 2  # of one independent draw
    assert abs(float(loss - kl)) <= 5 * float(variance / n / copies) ** 0.5
    assert float(variance / n / copies) ** 0.5 < 0.01 * float(kl), "the bound should mean something"
    expected_H = (log_q_V.exp() - p_V) @ rows_VH
    variance_H = p_V @ rows_VH**2 - (p_V @ rows_VH) ** 2
    assert ((gradient_TH.sum(0) - expected_H).abs() <= 5 * (variance_H / n / copies).sqrt()).all()


@pytest.mark.parametrize("settings", [DRAWS, TOP_K, TOP_P], ids=lambda settings: settings.method)
def test_chunks_change_nothing(settings: TeacherLogitsConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = entries(settings, 50, sample=3)
    monkeypatch.setattr("minitron.distill.sparsify._CHUNK_BYTES", 8 * PADDED * 5)
    found = entries(settings, 50, sample=3)
    np.testing.assert_array_equal(found.number_S, whole.number_S)
    np.testing.assert_array_equal(found.ids, whole.ids)
    for name in ("weights", "entropy_S"):
        np.testing.assert_allclose(getattr(found, name), getattr(whole, name), rtol=1e-12)


@pytest.mark.parametrize("vocab_size", [PADDED, 50, 5])  # 5: all but one rank hold padding only
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_find_the_same(pool: WorkerPool, ranks: int, vocab_size: int) -> None:
    """Equal ids in fp64, where no draw comes within rounding of a boundary here; values to rounding."""
    hidden_SH, weight_VH = model()
    for settings in (DRAWS, TOP_K, TOP_P):
        alone = entries(settings, vocab_size, sample=9)
        for found in pool.run(entries_of_shard, ranks, hidden_SH, weight_VH, vocab_size, settings, 9):
            np.testing.assert_array_equal(found.number_S, alone.number_S)
            np.testing.assert_array_equal(found.ids, alone.ids)
            np.testing.assert_allclose(found.weights, alone.weights, rtol=1e-12)
            np.testing.assert_allclose(found.entropy_S, alone.entropy_S, rtol=1e-12)


def test_ranks_mostly_draw_the_same_in_bf16(pool: WorkerPool) -> None:
    """The logits' products round differently in slices; few draws move, and only to a neighbour in probability."""
    hidden_SH, weight_VH = model(torch.bfloat16)
    alone = entries(DRAWS, 50, dtype=torch.bfloat16)
    (found, _) = pool.run(entries_of_shard, 2, hidden_SH, weight_VH, 50, DRAWS, 0)
    dense = np.zeros((2, S, 51))
    for part, each in zip(dense, (alone, found), strict=True):
        ids_SK, counts_SK = each.padded(DRAWS.num_draws)
        np.put_along_axis(part, ids_SK, counts_SK, -1)
    moved = np.abs(dense[0] - dense[1])[:, :50].sum() / 2
    assert moved <= 0.05 * S * DRAWS.num_draws
