"""A distillation step is the same function in every layout, and equals the dense fp64 formula."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from minitron.checkpoint.folder import WEIGHTS_DIR, read_model_config
from minitron.checkpoint.store import CheckpointReader
from tests.helpers.pool import WorkerPool
from tests.parallel import workers
from tests.parallel.reference import assert_gradients, dense_kl, layout, norm_of, random_tokens

TOKENS_NGT = random_tokens(3, 4, 17)


def work(teacher: Path, student: Path, *axes: int, group_size: int = 0) -> workers.Work:
    return workers.Work.between(teacher, student, layout(*axes), TOKENS_NGT, group_size=group_size)


@pytest.fixture(scope="module")
def one_rank(pool: WorkerPool, teacher: Path, student: Path) -> list[workers.Step]:
    steps = pool.run(workers.distill, 1, work(teacher, student))[0]
    assert steps[0].loss > 0.1
    assert steps[0].loss != steps[1].loss != steps[2].loss
    return steps


@pytest.mark.parametrize(
    ("axes", "group_size"),
    [((1, 1, 1), 1), ((2, 1, 1), 0), ((1, 2, 1), 0), ((1, 2, 1), 1), ((1, 1, 2), 0), ((2, 2, 1), 3), ((1, 2, 2), 1)],
)
def test_steps_are_those_of_one_rank(
    pool: WorkerPool,
    teacher: Path,
    student: Path,
    one_rank: list[workers.Step],
    axes: tuple[int, int, int],
    group_size: int,
) -> None:
    for steps in pool.run(workers.distill, math.prod(axes), work(teacher, student, *axes, group_size=group_size)):
        assert len(steps) == 3
        for have, want in zip(steps, one_rank, strict=True):
            assert have.loss == pytest.approx(want.loss, rel=1e-5)
            assert have.grad_norm == pytest.approx(want.grad_norm, rel=1e-5)


@pytest.mark.parametrize("axes", [(1, 1, 1), (2, 2, 1), (1, 2, 2)])
def test_loss_and_gradients_are_those_of_the_dense_formula(
    pool: WorkerPool, teacher: Path, student: Path, tmp_path: Path, axes: tuple[int, int, int]
) -> None:
    loss, gradients = dense_kl(teacher / "hf", student / "hf", TOKENS_NGT[0, :, :-1])
    job = work(teacher, student, *axes)
    results = pool.run(workers.first_gradients, math.prod(axes), job, tmp_path)
    norm = norm_of(gradients)
    for result in results:
        assert result.step.loss == pytest.approx(loss, rel=1e-6)
        assert result.step.grad_norm == pytest.approx(norm, rel=1e-5)
        assert not result.teacher_has_gradients
        assert not result.teacher_changed
    assert_gradients(tmp_path, job.student, gradients)
    embedding = CheckpointReader(tmp_path / WEIGHTS_DIR).read("embedding.word_embeddings.weight")
    padding = embedding[read_model_config(job.student).vocab_size :]
    assert torch.count_nonzero(padding) == 0


@pytest.mark.parametrize("axes", [(1, 1, 1), (2, 2, 1)])
def test_a_teacher_has_nothing_to_teach_itself(
    pool: WorkerPool, teacher: Path, tmp_path: Path, axes: tuple[int, int, int]
) -> None:
    job = work(teacher, teacher, *axes)
    for result in pool.run(workers.first_gradients, math.prod(axes), job, tmp_path):
        np.testing.assert_allclose(result.step.loss, 0, atol=1e-7)
        np.testing.assert_allclose(result.step.grad_norm, 0, atol=1e-4)  # the student's is 1.5
