"""A run that stops and starts again takes the same steps as one that does not."""

import math
from pathlib import Path

import pytest

from minitron.train.state import saved_steps
from tests.helpers.pool import WorkerPool
from tests.parallel import workers
from tests.parallel.reference import layout, random_tokens

TOKENS_NGT = random_tokens(6, 4, 17, seed=2)


def work(teacher: Path, student: Path, *axes: int, cp: int = 1) -> workers.Work:
    return workers.Work.between(teacher, student, layout(*axes, cp=cp), TOKENS_NGT)


@pytest.mark.parametrize(
    ("axes", "cp"), [((1, 1, 2), 1), ((1, 2, 1), 1), ((2, 1, 2), 1), ((1, 1, 1), 2), ((1, 2, 1), 2), ((1, 1, 2), 2)]
)
def test_same_steps_as_the_unbroken_run(
    pool: WorkerPool, teacher: Path, student: Path, tmp_path: Path, axes: tuple[int, int, int], cp: int
) -> None:
    job, ranks = work(teacher, student, *axes, cp=cp), math.prod(axes) * cp
    unbroken = pool.run(workers.distill, ranks, job)[0]
    assert len({step.loss for step in unbroken}) == 6
    first = pool.run(workers.distill, ranks, job, stop=3, states=tmp_path, save=True)[0]
    assert saved_steps(tmp_path) == [3]
    written = [file.stat().st_size for file in (tmp_path / "step_00000003").glob("*.distcp")]
    assert len(written) == ranks
    assert ranks == 1 or max(written) < 0.75 * sum(written), "data-parallel ranks write a part each"
    second = pool.run(workers.distill, ranks, job, states=tmp_path)[0]
    assert first == unbroken[:3]
    assert second == unbroken[3:]


@pytest.mark.parametrize(
    ("before", "cp", "after"), [((1, 1, 2), 1, (1, 1, 1)), ((1, 2, 1), 1, (2, 1, 1)), ((1, 2, 1), 2, (1, 1, 2))]
)
def test_another_layout_goes_on_with_the_state(
    pool: WorkerPool,
    teacher: Path,
    student: Path,
    tmp_path: Path,
    before: tuple[int, int, int],
    cp: int,
    after: tuple[int, int, int],
) -> None:
    unbroken = pool.run(workers.distill, 1, work(teacher, student))[0]
    saving, going_on = work(teacher, student, *before, cp=cp), work(teacher, student, *after)
    pool.run(workers.distill, math.prod(before) * cp, saving, stop=3, states=tmp_path, save=True)
    for steps in pool.run(workers.distill, math.prod(after), going_on, states=tmp_path):
        for have, want in zip(steps, unbroken[3:], strict=True):
            assert have.loss == pytest.approx(want.loss, rel=1e-5)
            assert have.grad_norm == pytest.approx(want.grad_norm, rel=1e-5)


def test_what_a_killed_save_left_behind_is_not_a_state(
    pool: WorkerPool, teacher: Path, student: Path, tmp_path: Path
) -> None:
    job = work(teacher, student)
    unbroken = pool.run(workers.distill, 1, job)[0]
    (tmp_path / ".step_00000001.partial").mkdir()
    (tmp_path / ".step_00000001.partial" / "__0_0.distcp").write_bytes(b"cut sh")
    assert pool.run(workers.distill, 1, job, stop=2, states=tmp_path, save=True)[0] == unbroken[:2]
    # Cut while writing step 4: step 2 is still there, and the next save of step 4 takes the place.
    (tmp_path / ".step_00000004.partial").mkdir()
    (tmp_path / ".step_00000004.partial" / ".metadata").write_bytes(b"cut sh")
    assert saved_steps(tmp_path) == [2]
    assert pool.run(workers.distill, 1, job, stop=4, states=tmp_path, save=True)[0] == unbroken[2:4]
    assert saved_steps(tmp_path) == [4]
    assert not (tmp_path / ".step_00000004.partial").exists()
    assert pool.run(workers.distill, 1, job, states=tmp_path)[0] == unbroken[4:]
