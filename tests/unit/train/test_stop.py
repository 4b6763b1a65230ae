"""One rank is asked to stop: all stop after the same step, saved, and the next run goes on as if nothing had been."""

from pathlib import Path

import pytest

from minitron.config.parallel import ParallelConfig
from minitron.train.state import saved_steps
from tests.helpers.pool import WorkerPool
from tests.unit.train import stop_workers

LAYOUTS = [ParallelConfig(pipeline_model_parallel_size=2), ParallelConfig(data_parallel_size=2)]


@pytest.mark.parametrize("parallel", LAYOUTS, ids=["pp2", "dp2"])
@pytest.mark.parametrize("asked_rank", [0, 1])
def test_all_ranks_stop_saved_and_go_on(
    pool: WorkerPool, tmp_path: Path, parallel: ParallelConfig, asked_rank: int
) -> None:
    run = stop_workers.stopped_loop
    (unbroken, nothing), *_ = pool.run(run, 2, parallel, tmp_path / "unbroken", num_steps=7)
    assert nothing == ""
    assert [record["step"] for record in unbroken] == [1, 2, 3, 4, 5, 6, 7]

    asked = {"asked_rank": asked_rank, "asked_step": 3}
    results = pool.run(run, 2, parallel, tmp_path / "broken", num_steps=7, **asked)
    # Asked during step 3, told to the others at its end, known to all at the end of step 4.
    message = "stopped after step 4 of 7, saved; the same command goes on from there"
    assert [stopped for _, stopped in results] == [message] * 2
    assert saved_steps(tmp_path / "broken" / "states") == [4]
    assert [record["step"] for record in results[0][0]] == [1, 2, 3, 4]

    (resumed, nothing), *_ = pool.run(run, 2, parallel, tmp_path / "broken", num_steps=7)
    assert nothing == ""
    for name in ("step", "loss", "grad_norm", "lr"):
        assert [record[name] for record in resumed] == [record[name] for record in unbroken]


def test_asked_in_the_last_step_but_one_the_run_is_finished(pool: WorkerPool, tmp_path: Path) -> None:
    asked = {"asked_rank": 1, "asked_step": 6}
    for records, stopped in pool.run(stop_workers.stopped_loop, 2, LAYOUTS[1], tmp_path, num_steps=7, **asked):
        assert stopped == ""
        assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6, 7]
    assert saved_steps(tmp_path / "states") == []


@pytest.mark.parametrize("asked_rank", [0, 1])
def test_rank_0_that_works_alone_hears_of_a_stop(pool: WorkerPool, asked_rank: int) -> None:
    assert pool.run(stop_workers.stopped_work, 2, asked_rank=asked_rank) == [
        "stopped: saved",
        "stopped: stopped with rank 0",
    ]


def test_work_of_rank_0_that_nobody_stops(pool: WorkerPool) -> None:
    assert pool.run(stop_workers.done_work, 2) == [7, None]
