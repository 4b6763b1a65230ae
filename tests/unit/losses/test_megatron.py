"""The losses as a tensor-parallel model uses them. Sequence parallelism needs a GPU in Megatron: not here."""

import pytest
import torch
from torch.testing import assert_close

from minitron.config.logit_loss import LogitLossConfig, LogitLossKind
from tests.helpers.pool import WorkerPool
from tests.unit.losses import workers
from tests.unit.losses.reference import FORWARD_KL, dense, loss_and_grads, make_case


def test_megatrons_mapping_completes_the_gradient(pool: WorkerPool) -> None:
    """The gradient is the dense one, not that times the number of ranks (which a peer's top K gives)."""
    case = make_case()
    losses = [FORWARD_KL, LogitLossConfig(top_k=5), LogitLossConfig(kind=LogitLossKind.jensen_shannon)]
    by_rank = pool.run(workers.through_megatrons_mapping, 2, case, losses)
    for i, loss in enumerate(losses):
        value, grad_TH, grad_VH = loss_and_grads(
            dense(case, loss, weighted=False), case.student_hidden_TH, case.student_weight_VH
        )
        for parts in by_rank:
            assert_close(parts[i][:2], (value, grad_TH), rtol=1e-11, atol=1e-12)
        assert_close(torch.cat([parts[i][2] for parts in by_rank]), grad_VH, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("loss", "number"),
    [
        pytest.param(FORWARD_KL, 1, id="forward_kl"),
        pytest.param(LogitLossConfig(kind=LogitLossKind.reverse_kl), 1, id="reverse_kl"),
        pytest.param(LogitLossConfig(kind=LogitLossKind.mse), 2, id="mse"),
        pytest.param(LogitLossConfig(top_k=5), 3, id="top_k"),
    ],
)
def test_collectives_per_chunk(pool: WorkerPool, loss: LogitLossConfig, number: int) -> None:
    have = pool.run(workers.collectives_of_one_chunk, 2, make_case(), loss)
    assert have == [["c10d::_allgather_base_"] * number] * 2
