"""A step whose sequences are split over ranks is the step of one rank, for every loss and through the whole model."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from minitron.config.parallel import ParallelConfig
from tests.helpers.pool import WorkerPool
from tests.parallel import workers
from tests.parallel.reference import assert_gradients, dense_kl, dense_logits, layout, norm_of, random_tokens

TOKENS_NGT = random_tokens(3, 4, 17)
LAYOUTS = {
    "sequence TP2": layout(2, sp=True),
    "sequence TP2 x PP2": layout(2, 2, sp=True),
    "sequence TP2 x DP2": layout(2, 1, 2, sp=True),
    "CP2": layout(cp=2),
    "CP4": layout(cp=4),
    "CP2 x TP2": layout(2, cp=2),
    "CP2 x PP2": layout(1, 2, cp=2),
    "CP2 x DP2": layout(1, 1, 2, cp=2),
    "CP2 x sequence TP2": layout(2, cp=2, sp=True),
}
every_layout = pytest.mark.parametrize("parallel", LAYOUTS.values(), ids=LAYOUTS.keys())


def work(teacher: Path, student: Path, parallel: ParallelConfig, *, cross_entropy: bool = False) -> workers.Work:
    return workers.Work.between(teacher, student, parallel, TOKENS_NGT, cross_entropy=cross_entropy)


@every_layout
def test_first_gradients_are_those_of_the_dense_formula(
    pool: WorkerPool, teacher: Path, student: Path, tmp_path: Path, parallel: ParallelConfig
) -> None:
    loss, gradients = dense_kl(teacher / "hf", student / "hf", TOKENS_NGT[0, :, :-1])
    job = work(teacher, student, parallel)
    results = pool.run(workers.first_gradients, parallel.num_ranks, job, tmp_path)
    norm = norm_of(gradients)
    for result in results:
        assert result.step.loss == pytest.approx(loss, rel=1e-6)
        assert result.step.grad_norm == pytest.approx(norm, rel=1e-5)
    assert_gradients(tmp_path, job.student, gradients, rel=1e-5)


@pytest.fixture(scope="module", params=[False, True], ids=["distill", "train"])
def one_rank(
    request: pytest.FixtureRequest, pool: WorkerPool, teacher: Path, student: Path
) -> tuple[bool, list[workers.Step]]:
    steps = pool.run(workers.distill, 1, work(teacher, student, layout(), cross_entropy=request.param))[0]
    assert steps[0].loss != steps[1].loss != steps[2].loss
    return request.param, steps


@pytest.mark.parametrize("name", ["sequence TP2 x PP2", "CP2 x TP2", "CP2 x PP2", "CP2 x DP2", "CP2 x sequence TP2"])
def test_steps_are_those_of_one_rank(
    pool: WorkerPool, teacher: Path, student: Path, one_rank: tuple[bool, list[workers.Step]], name: str
) -> None:
    cross_entropy, wanted = one_rank
    parallel = LAYOUTS[name]
    job = work(teacher, student, parallel, cross_entropy=cross_entropy)
    for steps in pool.run(workers.distill, parallel.num_ranks, job):
        assert len(steps) == 3
        for have, want in zip(steps, wanted, strict=True):
            assert have.loss == pytest.approx(want.loss, rel=1e-5)
            assert have.grad_norm == pytest.approx(want.grad_norm, rel=1e-5)


@every_layout
def test_heldout_loss_is_transformers_cross_entropy(pool: WorkerPool, teacher: Path, parallel: ParallelConfig) -> None:
    tokens_BT = random_tokens(5, 25, seed=6)
    logits_BSV = dense_logits(teacher / "hf", tokens_BT[:, :-1])
    want = float(F.cross_entropy(logits_BSV.flatten(0, 1), tokens_BT[:, 1:].flatten()))
    job = (teacher / "checkpoint", parallel, tokens_BT)
    for result in pool.run(workers.heldout, parallel.num_ranks, *job, micro_batch_size=2):
        assert result.num_tokens == 5 * 24
        assert result.loss == pytest.approx(want, rel=1e-6)


@every_layout
def test_logits_of_a_length_that_does_not_divide(pool: WorkerPool, teacher: Path, parallel: ParallelConfig) -> None:
    tokens_BS = random_tokens(2, 7, seed=3)
    want = dense_logits(teacher / "hf", tokens_BS)
    for logits, _ in pool.run(workers.logits, parallel.num_ranks, teacher / "checkpoint", parallel, tokens_BS):
        torch.testing.assert_close(logits.double(), want, rtol=0, atol=1e-4)
