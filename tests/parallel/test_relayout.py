"""A teacher in a layout of its own says the same as in the student's."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minitron.config.parallel import ParallelConfig, RecomputeGranularity, RecomputeMethod
from minitron.config.precision import Dtype
from minitron.distill.relayout import Dealing, Move, plan_moves
from tests.helpers.pool import WorkerPool
from tests.parallel import relayout_workers as workers
from tests.parallel.reference import dense_kl, layout, make_model, random_tokens
from tests.parallel.relayout_workers import Own

TOKENS_GT = random_tokens(1, 8, 17)[0]


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("untied"), seed=2, tie_word_embeddings=False)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("axes", "size", "owns"),
    [
        ((2, 1, 1), 1, [Own(tp=1, pp=2), Own(tp=1, micro_batch_size=2), Own(micro_batch_size=4)]),
        ((1, 2, 1), 2, [Own(tp=2, pp=1, group_size=1), Own(tp=1, pp=1, micro_batch_size=1)]),
        ((1, 1, 2), 1, [Own(tp=2, group_size=3, micro_batch_size=2), Own(pp=2)]),
        ((2, 2, 1), 1, [Own(tp=1, pp=2), Own(tp=1, pp=1, group_size=4, micro_batch_size=1)]),
        ((1, 1, 4), 1, [Own(tp=2, pp=2, micro_batch_size=8), Own(tp=4, micro_batch_size=2), Own(tp=2, pp=1)]),
    ],
)
def test_losses_and_gradients_are_those_of_the_students_layout(
    pool: WorkerPool,
    teacher: Path,
    untied: Path,
    student: Path,
    axes: tuple[int, int, int],
    size: int,
    owns: list[Own],
    tied: bool,
) -> None:
    folder = teacher if tied else untied
    want, _ = dense_kl(folder / "hf", student / "hf", TOKENS_GT[:, :-1])
    args = (folder / "checkpoint", student / "checkpoint", layout(*axes), TOKENS_GT, [Own(), *owns])
    for same, *others in pool.run(workers.outcomes, math.prod(axes), *args, micro_batch_size=size):
        assert not same.own
        assert same.loss == pytest.approx(want, rel=1e-6)
        for other in others:
            assert other.own
            assert other.loss == pytest.approx(same.loss, rel=1e-6)
            assert other.grad_norm == pytest.approx(same.grad_norm, rel=1e-6)


@pytest.fixture(scope="module")
def four_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of 4 layers: 2 stages of 2 chunks, or of 1 and 3 layers."""
    shape = {"num_hidden_layers": 4, "hidden_size": 48, "intermediate_size": 96}
    return make_model(tmp_path_factory.mktemp("four_layers"), seed=4, **shape)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True}
    return make_model(tmp_path_factory.mktemp("experts"), seed=5, std=0.15, model_type="qwen3_moe", **shape)


@pytest.fixture(scope="module")
def dense_of_experts(experts: Path, four_layers: Path) -> tuple[float, float]:
    """Loss and gradient norm."""
    loss, gradients = dense_kl(experts / "hf", four_layers / "hf", TOKENS_GT[:, :-1])
    return loss, math.sqrt(sum(float(g.norm()) ** 2 for g in gradients.values()))


@pytest.fixture(scope="module")
def dense_of_four_layers(teacher: Path, four_layers: Path) -> tuple[float, float]:
    """Loss and gradient norm."""
    loss, gradients = dense_kl(teacher / "hf", four_layers / "hf", TOKENS_GT[:, :-1])
    return loss, math.sqrt(sum(float(g.norm()) ** 2 for g in gradients.values()))


FULL = {"recompute_granularity": RecomputeGranularity.full, "recompute_num_layers": 1}


def assert_own_and_dense(found: list[list[workers.Outcome]], dense: tuple[float, float]) -> None:
    """On every rank the teacher ran in its own layout, and loss and gradient norm are the dense formula's."""
    loss, norm = dense
    for outcome in (outcome for of_rank in found for outcome in of_rank):
        assert outcome.own
        assert outcome.loss == pytest.approx(loss, rel=1e-6)
        assert outcome.grad_norm == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize(
    ("parallel", "owns"),
    [
        (layout(2, sp=True), [Own(tp=1, pp=2), Own(tp=1, micro_batch_size=2), Own(micro_batch_size=4, group_size=4)]),
        (layout(1, 2, vp=2), [Own(tp=2, pp=1), Own(micro_batch_size=2, group_size=4), Own(tp=1, pp=1)]),
        (replace(layout(1, 2), num_layers_in_first_pipeline_stage=1), [Own(tp=2, pp=1), Own(micro_batch_size=2)]),
        (replace(layout(2), recompute_method=RecomputeMethod.uniform, **FULL), [Own(tp=1, pp=2)]),
        (replace(layout(1, 2, vp=2), recompute_method=RecomputeMethod.block, **FULL), [Own(tp=2, pp=1)]),
    ],
    ids=["sequence TP2", "interleaved PP2", "uneven PP2", "recompute TP2", "recompute interleaved PP2"],
)
def test_every_way_to_run_the_student_beside_a_teacher_in_its_own_layout(
    pool: WorkerPool,
    teacher: Path,
    four_layers: Path,
    dense_of_four_layers: tuple[float, float],
    parallel: ParallelConfig,
    owns: list[Own],
) -> None:
    args = (teacher / "checkpoint", four_layers / "checkpoint", parallel, TOKENS_GT, owns)
    assert_own_and_dense(pool.run(workers.outcomes, 2, *args), dense_of_four_layers)


@pytest.mark.parametrize(
    ("parallel", "owns"),
    [
        (layout(2, sp=True), [Own(tp=1, pp=2), Own(tp=1), Own(micro_batch_size=4)]),
        (layout(1, 2), [Own(tp=2, pp=1, sp=True), Own(micro_batch_size=2)]),
        (layout(1, 1, 2), [Own(tp=2, sp=True, group_size=4, micro_batch_size=2)]),
        (layout(2, 2, sp=True), [Own(tp=4, pp=1), Own(pp=1, micro_batch_size=2)]),
    ],
    ids=["sequence TP2", "PP2", "DP2", "sequence TP2 x PP2"],
)
def test_experts_over_tensor_parallel_ranks_of_their_own_layout(
    pool: WorkerPool,
    experts: Path,
    four_layers: Path,
    dense_of_experts: tuple[float, float],
    parallel: ParallelConfig,
    owns: list[Own],
) -> None:
    args = (experts / "checkpoint", four_layers / "checkpoint", parallel, TOKENS_GT, owns)
    assert_own_and_dense(pool.run(workers.outcomes, parallel.num_ranks, *args), dense_of_experts)


def test_a_bf16_teacher_of_an_fp32_student(pool: WorkerPool, teacher: Path, student: Path) -> None:
    folders = (teacher / "checkpoint", student / "checkpoint")
    exact, _ = dense_kl(teacher / "hf", student / "hf", TOKENS_GT[:, :-1])
    # Neither stages nor micro-batches change a bf16 rounding of the teacher, so one rank is a sharp reference.
    [want] = pool.run(workers.outcomes, 1, *folders, layout(1, 1, 1), TOKENS_GT, [Own(dtype=Dtype.bf16)])[0]
    assert want.loss != pytest.approx(exact, rel=1e-5)
    assert want.loss == pytest.approx(exact, rel=2e-2)
    own = Own(tp=1, pp=2, dtype=Dtype.bf16, micro_batch_size=2)
    for [have] in pool.run(workers.outcomes, 2, *folders, layout(2, 1, 1), TOKENS_GT, [own]):
        assert have.loss == pytest.approx(want.loss, rel=1e-6)
        assert have.grad_norm == pytest.approx(want.grad_norm, rel=1e-6)


@pytest.mark.parametrize(
    ("parallel", "reference", "beside"),
    [
        (layout(pp=2), layout(), Own(dtype=Dtype.bf16)),
        # Two tensor-parallel ranks round their sums in their own way: the same teacher beside a data-parallel student.
        (layout(tp=2), layout(dp=2), Own(tp=2, dtype=Dtype.bf16)),
        (layout(tp=2, sp=True), layout(dp=2), Own(tp=2, dtype=Dtype.bf16)),
    ],
    ids=["PP2", "TP2", "sequence TP2"],
)
def test_a_bf16_teacher_in_the_layout_of_an_fp32_student(
    pool: WorkerPool, teacher: Path, student: Path, parallel: ParallelConfig, reference: ParallelConfig, beside: Own
) -> None:
    folders = (teacher / "checkpoint", student / "checkpoint")
    exact, _ = dense_kl(teacher / "hf", student / "hf", TOKENS_GT[:, :-1])
    [want] = pool.run(workers.outcomes, reference.num_ranks, *folders, reference, TOKENS_GT, [beside])[0]
    assert want.loss != pytest.approx(exact, rel=1e-5)
    assert want.loss == pytest.approx(exact, rel=2e-2)
    for [have] in pool.run(workers.outcomes, 2, *folders, parallel, TOKENS_GT, [Own(dtype=Dtype.bf16)]):
        assert not have.own
        assert have.loss == pytest.approx(want.loss, rel=1e-6)
        assert have.grad_norm == pytest.approx(want.grad_norm, rel=1e-6)


def test_a_whole_state_beside_a_split_sequence(pool: WorkerPool) -> None:
    for (loss, gradient), (loss_whole, gradient_whole) in pool.run(workers.losses_of_split_and_whole_states, 2, 0):
        assert loss_whole == pytest.approx(loss, rel=1e-7)
        torch.testing.assert_close(gradient_whole, gradient, rtol=1e-6, atol=1e-9)


def test_moves_of_a_case_worked_by_hand() -> None:
    # Student: TP 1, PP 1, DP 4 (ranks 0-3). Teacher: TP 2, PP 2, DP 1: its last stage is ranks 2 and 3.
    student, teacher = Dealing(1, [[0], [1], [2], [3]]), Dealing(2, [[2, 3]])
    assert plan_moves(8, teacher, student) == [
        Move(2, 0, (0, 4)),
        Move(2, 2, (2, 6)),
        Move(3, 1, (1, 5)),
        Move(3, 3, (3, 7)),
    ]


@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        (Dealing(3, [[0, 1], [2, 3]]), Dealing(1, [[2, 3]])),
        (Dealing(1, [[1], [3]]), Dealing(2, [[0, 1], [2, 3]])),
        (Dealing(2, [[0], [1], [2], [3]]), Dealing(4, [[4, 5, 6, 7]])),
    ],
)
def test_every_reader_gets_each_of_its_sequences_once_from_a_rank_that_has_it(
    teacher: Dealing, student: Dealing
) -> None:
    moves = plan_moves(24, teacher, student)
    assert len({(move.source, move.target) for move in moves}) == len(moves)
    for dp_rank, readers in enumerate(student.last_stage_DT):
        wanted = [position for part in student.microbatches(dp_rank, 24) for position in part]
        for reader in readers:
            got = [position for move in moves if move.target == reader for position in move.positions]
            assert sorted(got) == wanted
    for move in moves:
        assert all(move.source in teacher.holders(position) for position in move.positions)
        local = [position for position in move.positions if move.target in teacher.holders(position)]
        assert not local or move.source == move.target
    sent = [sum(len(m.positions) for m in moves if m.source == rank != m.target) for rank in range(2)]
    if teacher.last_stage_DT[0] == [0, 1]:  # two ranks hold the same states, and neither is a reader
        assert sent[0] == sent[1] > 0
