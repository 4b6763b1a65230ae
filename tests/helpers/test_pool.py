import os
import time

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from tests.helpers.pool import PoolError, WorkerPool


def _sum_of_ranks(scale: int, *, offset: int = 0) -> tuple[int, float]:
    total = torch.tensor([float(dist.get_rank() * scale + offset)])
    dist.all_reduce(total)
    return os.getpid(), total.item()


def _tensor_parallel_rank(size: int) -> int:
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=size)
    return parallel_state.get_tensor_model_parallel_rank()


def _fail_on(ranks: list[int]) -> None:
    if dist.get_rank() in ranks:
        raise ValueError(f"wrong on rank {dist.get_rank()}")


def _misbehave(how: str) -> None:
    if dist.get_rank() == 1:
        time.sleep(60) if how == "hang" else os._exit(1)


def test_results_come_by_rank_from_workers_that_stay(pool: WorkerPool) -> None:
    first = pool.run(_sum_of_ranks, 2, 10, offset=1)
    second = pool.run(_sum_of_ranks, 2, 10)
    assert [value for _, value in first] == [12.0, 12.0]
    assert [value for _, value in second] == [10.0, 10.0]
    assert [pid for pid, _ in first] == [pid for pid, _ in second]


def test_model_parallel_state_does_not_leak(pool: WorkerPool) -> None:
    assert pool.run(_tensor_parallel_rank, 2, 2) == [0, 1]
    assert pool.run(_tensor_parallel_rank, 2, 1) == [0, 0]


def test_every_failing_rank_is_reported_and_the_pool_lives_on(pool: WorkerPool) -> None:
    with pytest.raises(PoolError, match=r"(?s)rank 0 of 2.*wrong on rank 0.*rank 1 of 2.*wrong on rank 1"):
        pool.run(_fail_on, 2, [0, 1])
    with pytest.raises(PoolError) as caught:
        pool.run(_fail_on, 2, [1])
    assert "rank 0 of 2" not in str(caught.value)
    assert pool.run(_sum_of_ranks, 2, 1)[0][1] == 1.0


@pytest.mark.parametrize(("how", "message"), [("hang", "no answer"), ("die", "the process died")])
def test_a_lost_worker_is_replaced(pool: WorkerPool, how: str, message: str) -> None:
    before = pool.run(_sum_of_ranks, 2, 1)
    with pytest.raises(PoolError, match=f"rank 1 of 2:\n{message}"):
        pool.run(_misbehave, 2, how, timeout_s=20)
    after = pool.run(_sum_of_ranks, 2, 1)
    assert after[0] == before[0]
    assert after[1][0] != before[1][0]
