"""A cache written at one layout serves every other, and gives what the online teacher gives."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from minitron.config.distill import TeacherSource
from minitron.config.logit_loss import TopKRest
from minitron.config.teacher_logits import CacheMethod
from minitron.data.build import build_dataset
from minitron.data.loader import TrainBatches
from minitron.distill.cache_format import LogitCache
from minitron.distill.cache_write import planned_size, write_teacher_logits
from minitron.distill.cached import CachedTeacher
from minitron.errors import ArtefactError, ModelError
from minitron.losses import SparseTarget, linear_sparse_kl
from tests.helpers.pool import PoolError, WorkerPool
from tests.parallel.cached_workers import Job, distill_steps, write_cache
from tests.parallel.jobs import GLOBAL_BATCH, STEPS, S, make_job, with_settings
from tests.parallel.reference import VOCAB_SIZE, dense, dense_logits, layout, make_model, norm_of

WRITTEN = {
    "1x1x1": layout(),
    "tp2": layout(tp=2),
    "tp2 sp": layout(tp=2, sp=True),
    "pp2": layout(pp=2),
    "dp2": layout(dp=2),
    "cp2": layout(cp=2),  # as data-parallel ranks: distributions are kept by whole sequences
}
READ = {
    "tp2": layout(tp=2),
    "pp2": layout(pp=2),
    "dp2": layout(dp=2),
    "cp2": layout(cp=2),
    "tp2 sp": layout(tp=2, sp=True),
    "tp2 pp2": layout(tp=2, pp=2),
}
MORE_ROWS = VOCAB_SIZE + 7


def assert_same_numbers(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    """What two trainings logged, but for the fp16 of a cache's probabilities."""
    for key in ("loss", "grad_norm", "heldout_loss"):
        numbers = [r[key] for r in found if key in r]
        assert numbers
        assert numbers == pytest.approx([r[key] for r in expected if key in r], rel=1e-3), key


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, teacher: Path, student: Path) -> Job:
    return make_job(tmp_path_factory.mktemp("cached"), teacher, student)


@pytest.fixture(scope="module")
def caches(pool: WorkerPool, job: Job, tmp_path_factory: pytest.TempPathFactory) -> dict[str, LogitCache]:
    """The same samples, written at each layout."""
    root = tmp_path_factory.mktemp("caches")
    for name, parallel in WRITTEN.items():
        pool.run(write_cache, parallel.num_ranks, job, parallel, root / name)
    return {name: LogitCache(root / name) for name in WRITTEN}


@pytest.fixture(scope="module")
def top_k_cache(pool: WorkerPool, job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("top_k") / "cache"
    pool.run(write_cache, 1, with_settings(job, logits={"method": CacheMethod.top_k, "top_k": 6}), layout(), out)
    return out


def first_batches(job: Job) -> TrainBatches:
    train = job.config.distill.train
    return TrainBatches(
        job.data,
        seq_length=S,
        micro_batch_size=4,
        global_batch_size=train.global_batch_size,
        dp_rank=0,
        dp_size=1,
        seed=job.config.seed,
        num_steps=STEPS,
    )


@pytest.mark.parametrize("name", [name for name in WRITTEN if name != "1x1x1"])
def test_every_layout_writes_the_same(caches: dict[str, LogitCache], name: str) -> None:
    alone, other = caches["1x1x1"], caches[name]
    assert other.identity == alone.identity
    assert len(alone.samples) == STEPS * GLOBAL_BATCH
    np.testing.assert_array_equal(other.samples, alone.samples)
    moved = draws = 0
    for sample in alone.samples.tolist():
        ours, theirs = alone.read(sample), other.read(sample)
        np.testing.assert_allclose(theirs.entropy_S, ours.entropy_S, rtol=1e-4, atol=1e-5)
        dense = np.zeros((2, S, VOCAB_SIZE + 1))
        for part, entries in zip(dense, (ours, theirs), strict=True):
            np.put_along_axis(part, *entries.padded(50), -1)
        moved += int(np.abs(dense[0] - dense[1])[:, :VOCAB_SIZE].sum()) // 2
        draws += 50 * S
    assert moved <= 0.001 * draws  # a draw moves where rounding moves a boundary over it


def test_size_is_what_is_said(pool: WorkerPool, job: Job, caches: dict[str, LogitCache], top_k_cache: Path) -> None:
    (summary,) = pool.run(write_cache, 1, job, layout(), caches["1x1x1"].folder)  # nothing is missing
    tokens = STEPS * GLOBAL_BATCH * S
    on_disk = sum(path.stat().st_size for path in caches["1x1x1"].folder.glob("*.shard"))
    assert summary == {"samples": 24, "bytes": on_disk, "bytes_per_token": on_disk / tokens}
    table = 32 + 32 * 24
    assert on_disk - table <= tokens * job.config.teacher_logits.max_bytes_per_token(VOCAB_SIZE)
    assert LogitCache(top_k_cache).num_bytes - table == tokens * (4 + 1 + 6 * (2 + 2))


def assert_same_steps(found: list[dict[str, float]], expected: list[dict[str, float]], *, later: float = 2e-5) -> None:
    """``later``: tolerance once Adam has divided small gradients, rounding included, by their own size."""
    assert [record["step"] for record in found] == [1, 2, 3]
    for key in ("loss", "forward_kl", "grad_norm"):
        assert found[0][key] == pytest.approx(expected[0][key], rel=2e-6), key
        assert [r[key] for r in found] == pytest.approx([r[key] for r in expected], rel=later), key


@pytest.fixture(scope="module")
def alone(
    pool: WorkerPool, job: Job, caches: dict[str, LogitCache], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, float]]:
    """The steps of one rank, from what two tensor-parallel ranks wrote."""
    return pool.run(distill_steps, 1, job, layout(), caches["tp2"].folder, tmp_path_factory.mktemp("alone"))[0]


@pytest.mark.parametrize(("name", "micro_batch_size"), zip(READ, (1, 2, 4, 2, 4, 1), strict=True))
def test_every_layout_reads_it(
    pool: WorkerPool,
    job: Job,
    caches: dict[str, LogitCache],
    alone: list[dict[str, float]],
    tmp_path: Path,
    name: str,
    micro_batch_size: int,
) -> None:
    other, parallel = with_settings(job, train={"micro_batch_size": micro_batch_size}), READ[name]
    found = pool.run(distill_steps, parallel.num_ranks, other, parallel, caches["tp2"].folder, tmp_path)[0]
    assert_same_steps(found, alone)


@pytest.fixture(scope="module")
def more_rows(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The student has 7 rows beyond the teacher's vocabulary, as the data's summary says too, and 4 layers."""
    root = tmp_path_factory.mktemp("more")
    student = make_model(root, seed=3, vocab_size=MORE_ROWS, tie_word_embeddings=False)
    build_dataset(job.config.data, tokenizer_dir=student / "hf", vocab_size=MORE_ROWS, out_dir=root / "data")
    return replace(job, student=student / "checkpoint", data=root / "data")


def test_teacher_and_student_are_compared_on_the_ids_of_both(pool: WorkerPool, more_rows: Job, tmp_path: Path) -> None:
    """The steps are the online teacher's, alone and in an interleaved pipeline."""
    top_k = {"top_k": 6, "top_k_rest": TopKRest.ghost}
    online = with_settings(more_rows, source=TeacherSource.online, loss=top_k)
    expected = pool.run(distill_steps, 1, online, layout(), more_rows.teacher, tmp_path / "online")[0]
    writer = with_settings(more_rows, logits={"method": CacheMethod.top_k, "top_k": 6})
    pool.run(write_cache, 2, writer, layout(tp=2), tmp_path / "cache")
    assert LogitCache(tmp_path / "cache").identity.vocab_size == VOCAB_SIZE
    found = pool.run(distill_steps, 1, more_rows, layout(), tmp_path / "cache", tmp_path / "cached")[0]
    for key in ("loss", "grad_norm"):
        assert [r[key] for r in found] == pytest.approx([r[key] for r in expected], rel=1e-3), key
    for name, other in (("vp2", layout(pp=2, vp=2)), ("tp2", layout(tp=2))):  # a shard of TP2 ends past the common ids
        steps = pool.run(distill_steps, other.num_ranks, more_rows, other, tmp_path / "cache", tmp_path / name)[0]
        assert_same_steps(steps, found, later=1e-4)


def test_another_tokenizer_is_refused_before_the_teacher_runs(job: Job, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(job.teacher / "hf", other / "hf")
    shutil.copy(job.teacher / "model.json", other)  # and no weights
    file = other / "hf" / "tokenizer.json"
    swapped = json.loads(file.read_text())
    ids = swapped["model"]["vocab"]
    first, second = list(ids)[40:42]
    ids[first], ids[second] = ids[second], ids[first]
    file.write_text(json.dumps(swapped))
    session = job.session(None, layout())  # there is no job to run it in either
    arguments = {"teacher_id": "t", "imported": job.student, "data": job.data, "out": tmp_path / "cache"}
    with pytest.raises(ModelError, match=r"tokenizers of teacher .* and student .* differ: 2 of 257 ids"):
        write_teacher_logits(session, teacher=other, **arguments)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("rest", list(TopKRest))
def test_top_k_takes_the_online_steps(
    pool: WorkerPool, job: Job, top_k_cache: Path, tmp_path: Path, rest: TopKRest
) -> None:
    """The same top-K loss with the teacher in memory; the cache's probabilities are fp16."""
    online = with_settings(job, source=TeacherSource.online, loss={"top_k": 6, "top_k_rest": rest})
    cached = with_settings(job, loss={"top_k_rest": rest})
    expected = pool.run(distill_steps, 1, online, layout(), job.teacher, tmp_path / "online")[0]
    found = pool.run(distill_steps, 1, cached, layout(), top_k_cache, tmp_path / "cached")[0]
    assert_same_numbers(found, expected)


def test_top_k_equals_the_dense_formula(job: Job, top_k_cache: Path, teacher: Path) -> None:
    """Loss and gradients against fp64 on transformers' logits; tokens in the order of [S, B]."""
    batch = first_batches(job).microbatches(0)[0]
    reader = CachedTeacher(LogitCache(top_k_cache), is_last_stage=True, cp_rank=0, device=torch.device("cpu"))
    (signal,) = reader.signals([batch])
    target = signal.final
    assert isinstance(target, SparseTarget)
    assert target.entropy_T is None
    p_TV = dense_logits(teacher / "hf", batch.tokens_BS).softmax(-1).transpose(0, 1).reshape(-1, VOCAB_SIZE)
    p_TK, ids_TK = p_TV.topk(6)
    torch.testing.assert_close(target.probs_TK.double(), p_TK, rtol=1e-3, atol=1e-6)

    generator = torch.Generator().manual_seed(0)
    hidden_TH, weight_VH = (
        torch.randn(n, 8, generator=generator, dtype=torch.float64).requires_grad_() for n in (len(p_TV), VOCAB_SIZE)
    )
    log_q_TK = (hidden_TH @ weight_VH.t()).log_softmax(-1).gather(1, ids_TK)
    rest_p_T, rest_q_T = 1 - p_TK.sum(-1), 1 - log_q_TK.exp().sum(-1)
    dense = (p_TK * (p_TK.log() - log_q_TK)).sum() + (rest_p_T * (rest_p_T.log() - rest_q_T.log())).sum()
    expected = torch.autograd.grad(dense, (hidden_TH, weight_VH))
    loss = linear_sparse_kl(hidden_TH, weight_VH, target, rest=TopKRest.ghost, vocab_size=VOCAB_SIZE)
    torch.testing.assert_close(loss, dense, rtol=1e-3, atol=0)
    for found, gradient in zip(torch.autograd.grad(loss, (hidden_TH, weight_VH)), expected, strict=True):
        torch.testing.assert_close(found, gradient, rtol=0, atol=1e-3 * float(gradient.abs().max()))


TOP_P: dict[str, Any] = {"method": CacheMethod.top_p, "top_p": 0.7, "top_k": 40}


@pytest.fixture(scope="module")
def top_p_cache(pool: WorkerPool, job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("top_p") / "cache"
    pool.run(write_cache, 2, with_settings(job, logits=TOP_P), layout(tp=2), out)
    return out


def dense_of_kept(p_BSV: Tensor, log_q_BSV: Tensor, rest: TopKRest) -> Tensor:
    """Mean KL over the fewest tokens that hold TOP_P, their probabilities in the cache's fp16."""
    sorted_BSV, ids_BSV = p_BSV.sort(dim=-1, descending=True)
    sorted_BSV[sorted_BSV.cumsum(-1) - sorted_BSV >= TOP_P["top_p"]] = 0
    kept_BSK, log_q_BSK = (
        x[..., : TOP_P["top_k"]] for x in (sorted_BSV.half().double(), log_q_BSV.gather(-1, ids_BSV))
    )
    log_q_BSK = log_q_BSK.masked_fill(kept_BSK == 0, -torch.inf)
    q_BSK = log_q_BSK.exp()
    rest_p_BS, rest_q_BS = 1 - kept_BSK.sum(-1), 1 - q_BSK.sum(-1)
    if rest is TopKRest.renormalize:
        kept_BSK, q_BSK = (x / x.sum(-1, keepdim=True) for x in (kept_BSK, q_BSK))
    here = kept_BSK > 0
    loss = (kept_BSK[here] * (kept_BSK[here] / q_BSK[here]).log()).sum()
    if rest is TopKRest.ghost:
        loss = loss + (rest_p_BS * (rest_p_BS / rest_q_BS).log()).sum()
    return loss / rest_p_BS.numel()


@pytest.mark.parametrize("rest", list(TopKRest))
def test_a_step_from_a_top_p_cache_is_the_dense_formula(
    pool: WorkerPool, job: Job, top_p_cache: Path, teacher: Path, student: Path, tmp_path: Path, rest: TopKRest
) -> None:
    batches = first_batches(job).microbatches(0)
    tokens_BS = torch.cat([batch.tokens_BS for batch in batches])
    assert all(bool(batch.loss_mask_BS.all()) for batch in batches)
    numbers = [LogitCache(top_p_cache).read(n).number_S for b in batches for n in b.sample_index_B.tolist()]
    assert np.min(numbers) < TOP_P["top_k"] == np.max(numbers), "the limit should be met by some"
    model = dense(student / "hf")
    log_q_BSV = model(tokens_BS, use_cache=False).logits.log_softmax(-1)
    loss = dense_of_kept(dense_logits(teacher / "hf", tokens_BS).softmax(-1), log_q_BSV, rest)
    loss.backward()
    norm = norm_of({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    cached = with_settings(job, loss={"top_k_rest": rest})
    for name, parallel in (("one", layout()), ("tp2", layout(tp=2)), ("pp2", layout(pp=2))):
        found = pool.run(distill_steps, parallel.num_ranks, cached, parallel, top_p_cache, tmp_path / name)[0]
        assert found[0]["loss"] == pytest.approx(loss.item(), rel=1e-5), name
        assert found[0]["grad_norm"] == pytest.approx(norm, rel=1e-5), name


def test_another_seed_reads_its_own_sequences(pool: WorkerPool, job: Job, top_k_cache: Path, tmp_path: Path) -> None:
    """Refused while the cache lacks some, with the count; then its steps are the online teacher's."""
    other = replace(job, config=replace(job.config, seed=job.config.seed + 7))
    read = [batch for step in range(STEPS) for batch in first_batches(other).microbatches(step)]
    wanted, there = {n for b in read for n in b.sample_index_B.tolist()}, set(LogitCache(top_k_cache).samples.tolist())
    lacking = len(wanted - there)
    assert 0 < lacking < STEPS * GLOBAL_BATCH
    with pytest.raises(PoolError, match=rf"{lacking} of the 24 sequences .* and seed={other.config.seed} read are not"):
        pool.run(distill_steps, 1, other, layout(), top_k_cache, tmp_path / "refused")
    folder = tmp_path / "cache"
    shutil.copytree(top_k_cache, folder)
    pool.run(write_cache, 1, with_settings(other, logits={"method": CacheMethod.top_k, "top_k": 6}), layout(), folder)
    assert set(LogitCache(folder).samples.tolist()) == wanted | there
    online = with_settings(other, source=TeacherSource.online, loss={"top_k": 6})
    expected = pool.run(distill_steps, 1, online, layout(), job.teacher, tmp_path / "online")[0]
    found = pool.run(distill_steps, 1, other, layout(), folder, tmp_path / "cached")[0]
    assert_same_numbers(found, expected)


def test_rows_that_only_fill_up_and_stages_without_loss(job: Job, top_k_cache: Path) -> None:
    batch = first_batches(job).microbatches(0)[0]
    filled = replace(batch, sample_index_B=torch.tensor([-1, *batch.sample_index_B[1:].tolist()]))
    cache = LogitCache(top_k_cache)
    reader = CachedTeacher(cache, is_last_stage=True, cp_rank=0, device=torch.device("cpu"))
    whole, part = (signal.final for signal in reader.signals([batch, filled]))
    assert isinstance(whole, SparseTarget)
    assert isinstance(part, SparseTarget)
    ids_SBK, other_SBK = whole.ids_TK.view(S, 4, -1), part.ids_TK.view(S, 4, -1)
    assert torch.equal(ids_SBK[:, 1:], other_SBK[:, 1:])
    assert (other_SBK[:, 0] == -1).all()
    (signal,) = CachedTeacher(cache, is_last_stage=False, cp_rank=0, device=torch.device("cpu")).signals([batch])
    assert signal.final is None


def test_a_longer_run_adds_what_is_missing(pool: WorkerPool, job: Job, tmp_path: Path) -> None:
    """Refused before the first step, with the count; then only the missing samples are written."""
    folder = tmp_path / "cache"
    pool.run(write_cache, 1, job, layout(), folder)
    before = {path: path.read_bytes() for path in folder.glob("*.shard")}
    longer = with_settings(job, train={"num_tokens": 2 * STEPS * GLOBAL_BATCH * S})
    with pytest.raises(PoolError, match=r"ArtefactError: 24 of the 48 sequences .* not in .*; run `minitron teacher"):
        pool.run(distill_steps, 1, longer, layout(), folder, tmp_path / "refused")
    pool.run(write_cache, 2, longer, layout(dp=2), folder)
    cache = LogitCache(folder)
    assert len(cache.samples) == 48
    assert {path: path.read_bytes() for path in before} == before
    assert sum(len(LogitCache(folder).read(sample).number_S) for sample in cache.samples.tolist()) == 48 * S
    assert len(pool.run(distill_steps, 1, longer, layout(), folder, tmp_path / "longer")[0]) == 2 * STEPS
    everything = with_settings(job, train={"num_tokens": 10**6, "lr_warmup_steps": 0})
    pool.run(write_cache, 1, everything, layout(), folder)
    reader = first_batches(job)
    assert LogitCache(folder).samples.tolist() == list(range(reader.samples_per_epoch))


def test_a_killed_writer_goes_on(pool: WorkerPool, job: Job, caches: dict[str, LogitCache], tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    assert pool.run(write_cache, 1, job, layout(), folder, stop_after=1) == [{"shards": 1}]
    half = LogitCache(folder)
    assert 0 < len(half.samples) < STEPS * GLOBAL_BATCH
    assert list(folder.glob("*.partial"))
    kept = {path: path.read_bytes() for path in folder.glob("*.shard")}
    pool.run(write_cache, 2, job, WRITTEN["dp2"], folder)
    assert not list(folder.glob("*.partial"))
    assert {path: path.read_bytes() for path in kept} == kept
    whole, reference = LogitCache(folder), caches["1x1x1"]
    np.testing.assert_array_equal(whole.samples, reference.samples)
    for sample in reference.samples.tolist():
        np.testing.assert_allclose(whole.read(sample).entropy_S, reference.read(sample).entropy_S, rtol=1e-5, atol=1e-6)
        assert whole.read(sample).number_S.max() <= 50


def test_a_disk_too_small_is_refused_where_the_size_is_known(caches: dict[str, LogitCache]) -> None:
    folder, identity = caches["1x1x1"].folder, caches["1x1x1"].identity
    assert "at most 155 bytes/token, at most 0.00248 GB of" in planned_size(folder, identity, 1000)
    assert "GB free, which may not do" not in planned_size(folder, identity, 1000)
    assert "at most 2.48e+09 GB of" in planned_size(folder, identity, 10**15)
    assert planned_size(folder, identity, 10**15).endswith("GB free, which may not do")
    exact = replace(identity, parameters={"method": "top_k", "top_k": 6})
    assert ": 29 bytes/token, 0.000464 GB of" in planned_size(folder, exact, 1000)
    with pytest.raises(ArtefactError, match=r"would take 4.64e\+08 GB but .* GB are free; lower .*top_k=6"):
        planned_size(folder, exact, 10**15)


def test_a_cache_lands_where_the_online_teacher_does(pool: WorkerPool, job: Job, tmp_path: Path) -> None:
    """48 steps from a far student: within 2 % in the KL that is left, and 0.5 % in the held-out loss."""
    train = {"num_tokens": 48 * GLOBAL_BATCH * S, "micro_batch_size": 8, "lr": 3e-3}
    online = with_settings(job, source=TeacherSource.online, train=train)
    expected = pool.run(distill_steps, 1, online, layout(), job.teacher, tmp_path / "online")[0]
    kl = [record["forward_kl"] for record in expected]
    cached = with_settings(job, train=train)
    pool.run(write_cache, 1, cached, layout(), tmp_path / "cache")
    found = pool.run(distill_steps, 1, cached, layout(), tmp_path / "cache", tmp_path / "sampled")[0]
    got = [record["forward_kl"] for record in found]
    assert np.mean(kl[-8:]) < 0.6 * kl[0], "the student should have learnt"
    assert np.mean(got[-8:]) == pytest.approx(np.mean(kl[-8:]), rel=0.02)
    assert found[-1]["heldout_loss"] == pytest.approx(expected[-1]["heldout_loss"], rel=0.005)


def test_foreign_caches_are_refused(pool: WorkerPool, job: Job, caches: dict[str, LogitCache], tmp_path: Path) -> None:
    folder = caches["1x1x1"].folder
    with pytest.raises(PoolError, match=r"ArtefactError: .*teacher is the teacher of these tests there and another"):
        pool.run(distill_steps, 1, job, layout(), folder, tmp_path / "a", teacher_id="another here")
    fewer = replace(job, student=tmp_path / "fewer")
    shutil.copytree(job.student, fewer.student)
    smaller = json.loads((job.student / "model.json").read_text()) | {"vocab_size": 250}
    (fewer.student / "model.json").write_text(json.dumps(smaller))
    with pytest.raises(PoolError, match=r"ArtefactError: .*vocab_size is 257 there and 250 here"):
        pool.run(distill_steps, 1, fewer, layout(), folder, tmp_path / "c")
    longer = replace(job, config=replace(job.config, data=replace(job.config.data, seq_length=2 * S)))
    with pytest.raises(PoolError, match=r"ArtefactError: .*seq_length is 16 there and 32 here"):
        pool.run(distill_steps, 1, longer, layout(), folder, tmp_path / "b")
    other = with_settings(job, logits={"num_draws": 20})
    with pytest.raises(PoolError, match=r"ArtefactError: .*parameters is .*50.* there and .*20.* here"):
        pool.run(write_cache, 1, other, layout(), folder)
