"""The losses as a tensor-parallel model uses them. Sequence parallelism needs a GPU in Megatron: not here."""

import torch
from torch.testing import assert_close

from minitron.losses import linear_kl
from tests.helpers.pool import WorkerPool
from tests.unit.losses import workers
from tests.unit.losses.reference import loss_and_grads, make_case


def test_megatrons_mapping_completes_the_gradient(pool: WorkerPool) -> None:
    case = make_case()
    loss, grad_TH, grad_VH = loss_and_grads(
        lambda h, w: linear_kl(h, w, case.teacher_hidden_TH, case.teacher_weight_VH, vocab_size=case.vocab_size),
        case.student_hidden_TH,
        case.student_weight_VH,
    )
    by_rank = pool.run(workers.kl_through_megatrons_mapping, 2, case)
    for part in by_rank:
        assert_close(part[:2], (loss, grad_TH), rtol=1e-12, atol=1e-13)
    assert_close(torch.cat([part[2] for part in by_rank]), grad_VH, rtol=1e-12, atol=1e-13)


def test_one_collective_per_chunk(pool: WorkerPool) -> None:
    assert pool.run(workers.collectives_of_one_chunk, 2, make_case()) == [["c10d::_allgather_base_"]] * 2
