"""The vocabulary split over ranks gives one rank's losses and gradients."""

import pytest
import torch
from torch.testing import assert_close

from minitron.config.logit_loss import LogitLossConfig, TopKRest
from tests.helpers.pool import PoolError, WorkerPool
from tests.unit.losses import workers
from tests.unit.losses.reference import ALL_LOSSES, make_case, make_target


@pytest.mark.parametrize(
    ("ranks", "vocab_size"),
    [(2, 48), (2, 37), (3, 37), pytest.param(3, 30, id="3-30-last_rank_is_padding")],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_ranks_agree_with_one(pool: WorkerPool, ranks: int, vocab_size: int, dtype: torch.dtype) -> None:
    case = make_case(vocab_size=vocab_size, num_rows=48, dtype=dtype)
    case.student_weight_VH[vocab_size:] = 1e6  # padding that would show
    more_than_a_shard = [LogitLossConfig(top_k=20, top_k_rest=rest) for rest in TopKRest]
    losses = [*ALL_LOSSES, *more_than_a_shard]
    target = make_target(case)
    (one,) = pool.run(workers.losses, 1, case, losses, target)
    by_rank = pool.run(workers.losses, ranks, case, losses, target)
    tolerance = {"rtol": 1e-12, "atol": 1e-13} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 2e-6}
    for name, (loss, grad_TH, grad_VH) in one.items():
        parts = [result[name] for result in by_rank]
        assert all(torch.equal(part[0], parts[0][0]) for part in parts)
        assert_close(parts[0][0], loss, **tolerance)
        if dtype == torch.float32:  # losses differ in the size of their gradients
            tolerance["atol"] = 2e-6 * max(1.0, grad_TH.abs().max().item() if grad_TH.numel() else 0.0)
        for part in parts:
            assert_close(part[1], grad_TH, **tolerance)
        joined_VH = torch.cat([part[2] for part in parts])
        assert_close(joined_VH, grad_VH, **tolerance)
        assert joined_VH[vocab_size:].count_nonzero() == 0


def test_too_few_rows_over_all_ranks(pool: WorkerPool) -> None:
    case = make_case(vocab_size=49, num_rows=48)
    with pytest.raises(PoolError, match=r"LayoutError: vocab_size 49 .* 24 per rank \* 2 ranks = 48"):
        pool.run(workers.losses, 2, case, [], make_target(case))
