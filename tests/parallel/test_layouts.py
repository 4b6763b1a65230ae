"""Every way to run the layers in parallel takes the steps of one rank; and each does what it is for."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from minitron.config.parallel import ParallelConfig, RecomputeGranularity, RecomputeMethod, layers_per_stage
from tests.helpers.pool import WorkerPool
from tests.parallel import layout_workers, workers
from tests.parallel.reference import assert_gradients, dense_kl, make_model, random_tokens

TOKENS_NGT = random_tokens(2, 4, 17, seed=3)
LAYERS = 6

FULL = {"recompute_granularity": RecomputeGranularity.full}
UNIFORM = {**FULL, "recompute_method": RecomputeMethod.uniform}
BLOCK = {**FULL, "recompute_method": RecomputeMethod.block}
SELECTIVE = {"recompute_granularity": RecomputeGranularity.selective}


@dataclass(frozen=True)
class Case:
    """A layout, the most micro-batches whose signals are held, and the layers of each stage."""

    parallel: ParallelConfig
    group_size: int
    stages: list[int]


def case(
    *,
    tp: int = 1,
    pp: int = 1,
    vp: int | None = None,
    dp: int = 1,
    cp: int = 1,
    sp: bool = False,
    first: int | None = None,
    last: int | None = None,
    group: int = 0,
    stages: list[int] | None = None,
    overlap: bool = True,
    **recompute: object,
) -> Case:
    parallel = ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vp,
        context_parallel_size=cp,
        data_parallel_size=dp,
        sequence_parallel=sp,
        num_layers_in_first_pipeline_stage=first,
        num_layers_in_last_pipeline_stage=last,
        overlap_grad_reduce=overlap,
        **recompute,  # type: ignore[arg-type]
    )
    return Case(parallel, group, stages or [LAYERS // pp] * pp)


CASES = {
    "recompute": [
        case(**UNIFORM, recompute_num_layers=1),
        case(**UNIFORM, recompute_num_layers=4, group=3),
        case(**BLOCK, recompute_num_layers=2),
        case(**SELECTIVE),
    ],
    "recompute on 2": [
        case(pp=2, **UNIFORM, recompute_num_layers=1),
        case(tp=2, **UNIFORM, recompute_num_layers=2),
        case(tp=2, **SELECTIVE),
        case(pp=2, vp=2, **BLOCK, recompute_num_layers=1, stages=[4, 2]),
    ],
    "interleaved": [
        case(pp=2, vp=3),  # the teacher's 4 layers do not divide: it runs 1F1B
        case(pp=2, vp=2, stages=[4, 2]),
        case(pp=2, vp=2, stages=[4, 2], group=2),
        case(pp=2, vp=2, first=2, stages=[2, 4]),
        case(pp=2, vp=2, last=2, first=4, stages=[4, 2], group=4),
    ],
    "uneven": [
        case(pp=2, first=5, stages=[5, 1]),
        case(pp=2, last=4, stages=[2, 4], group=1),
    ],
    "uneven on 3": [
        case(pp=3, first=1, last=1, stages=[1, 4, 1]),
        case(pp=3, last=4, stages=[1, 1, 4], group=3),
    ],
    "overlap": [case(dp=2, group=group, overlap=overlap) for group in (0, 1, 2) for overlap in (True, False)],
    "interleaved on 4": [
        case(pp=2, vp=2, tp=2, stages=[4, 2]),
        case(pp=2, vp=2, dp=2, stages=[4, 2], group=2),
        case(pp=2, vp=3, dp=2, **UNIFORM, recompute_num_layers=1),
    ],
    "the rest on 4": [
        case(pp=2, dp=2, first=2, stages=[2, 4], group=1, **SELECTIVE),
        case(tp=2, dp=2, **UNIFORM, recompute_num_layers=3, group=1),
        case(pp=2, vp=2, dp=2, first=2, stages=[2, 4], overlap=False, **SELECTIVE),
    ],
    "split sequences on 4": [
        case(tp=2, sp=True, pp=2, vp=2, stages=[4, 2]),
        case(cp=2, pp=2, vp=2, stages=[4, 2]),
        case(cp=2, pp=2, vp=3, **UNIFORM, recompute_num_layers=1),
        case(cp=2, pp=2, first=2, stages=[2, 4], group=1, **SELECTIVE),
        case(cp=2, tp=2, sp=True, **UNIFORM, recompute_num_layers=2),
    ],
}


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6 layers on a hidden size of 48."""
    shape = {"num_hidden_layers": LAYERS, "hidden_size": 48, "intermediate_size": 96}
    return make_model(tmp_path_factory.mktemp("deep"), seed=4, **shape)


def work(teacher: Path, deep: Path, of: Case) -> workers.Work:
    return workers.Work.between(teacher, deep, of.parallel, TOKENS_NGT, group_size=of.group_size)


@pytest.fixture(scope="module")
def one_rank(pool: WorkerPool, teacher: Path, deep: Path) -> list[workers.Step]:
    steps = pool.run(workers.distill, 1, work(teacher, deep, case()))[0]
    assert steps[0].loss != steps[1].loss
    return steps


@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_of_one_rank(
    pool: WorkerPool, teacher: Path, deep: Path, one_rank: list[workers.Step], name: str
) -> None:
    cases = CASES[name]
    (ranks,) = {of.parallel.num_ranks for of in cases}
    for of in cases:
        assert layers_per_stage(LAYERS, of.parallel) == of.stages
    for rank in pool.run(layout_workers.distill_each, ranks, [work(teacher, deep, of) for of in cases]):
        for of, steps in zip(cases, rank, strict=True):
            for have, want in zip(steps, one_rank, strict=True):
                assert have.loss == pytest.approx(want.loss, rel=1e-5), of
                assert have.grad_norm == pytest.approx(want.grad_norm, rel=1e-5), of


@pytest.mark.parametrize("of", [case(pp=2, vp=2, dp=2, group=2), case(tp=2, pp=2, vp=3, **SELECTIVE)])
def test_gradients_of_chunks_are_those_of_the_dense_formula(
    pool: WorkerPool, teacher: Path, deep: Path, tmp_path: Path, of: Case
) -> None:
    loss, gradients = dense_kl(teacher / "hf", deep / "hf", TOKENS_NGT[0, :, :-1])
    results = pool.run(workers.first_gradients, 4, work(teacher, deep, of), tmp_path)
    assert [result.step.loss for result in results] == [pytest.approx(loss, rel=1e-6)] * 4
    assert_gradients(tmp_path, deep / "checkpoint", gradients)


@pytest.mark.parametrize(
    ("of", "layer", "attention"),
    [
        (case(), 4, 4),  # 4 micro-batches
        (case(**UNIFORM, recompute_num_layers=2), 8, 8),
        (case(**BLOCK, recompute_num_layers=1), 8, 8),
        (case(**SELECTIVE), 4, 8),
    ],
)
def test_what_is_computed_again(
    pool: WorkerPool, teacher: Path, deep: Path, of: Case, layer: int, attention: int
) -> None:
    (counts,) = pool.run(layout_workers.observed, 1, work(teacher, deep, of))
    assert (counts["layer"], counts["attention"]) == (layer, attention)


@pytest.mark.parametrize(("axis", "group"), [("dp", 0), ("dp", 1), ("cp", 0)])
def test_reduction_starts_in_the_backward_pass(
    pool: WorkerPool, teacher: Path, deep: Path, axis: str, group: int
) -> None:
    two = {axis: 2}
    for counts in pool.run(layout_workers.observed, 2, work(teacher, deep, case(**two, group=group))):
        assert counts["under_way"] == counts["blocks"] >= 1
        assert counts["announced"] == 1  # only by the last micro-batch of the last group
    off = case(**two, group=group, overlap=False)
    assert [counts["under_way"] for counts in pool.run(layout_workers.observed, 2, work(teacher, deep, off))] == [0, 0]


def test_reduction_of_every_chunk_overlaps(pool: WorkerPool, teacher: Path, deep: Path) -> None:
    for counts in pool.run(layout_workers.observed, 4, work(teacher, deep, case(pp=2, vp=3, dp=2, group=2))):
        assert (counts["chunks"], counts["announced"]) == (3, 1)
        assert counts["under_way"] == counts["blocks"] >= 3


RESUMED_NGT = random_tokens(4, 4, 17, seed=5)
SIX_NGT = random_tokens(2, 6, 17, seed=6)


@pytest.mark.parametrize(
    "of",
    [
        case(pp=2, vp=2),  # stages of 4 and 2 layers
        case(pp=2, vp=3, dp=2, group=2),
        case(dp=2, **UNIFORM, recompute_num_layers=2),
    ],
)
def test_resumes_with_the_bits_of_the_unbroken_run(
    pool: WorkerPool, teacher: Path, deep: Path, tmp_path: Path, of: Case
) -> None:
    ranks, job = of.parallel.num_ranks, replace(work(teacher, deep, of), tokens_NGT=RESUMED_NGT)
    unbroken = pool.run(workers.distill, ranks, job)[0]
    assert len({step.loss for step in unbroken}) == 4
    pool.run(workers.distill, ranks, job, stop=2, states=tmp_path, save=True)
    for steps in pool.run(workers.distill, ranks, job, states=tmp_path):
        assert steps == unbroken[2:]


@pytest.mark.parametrize(("before", "after"), [(case(pp=2, vp=3), case(tp=2)), (case(), case(pp=2, vp=2, dp=2))])
def test_another_layout_goes_on_with_the_state(
    pool: WorkerPool, teacher: Path, deep: Path, tmp_path: Path, before: Case, after: Case
) -> None:
    saving, going_on = (replace(work(teacher, deep, of), tokens_NGT=RESUMED_NGT) for of in (before, after))
    unbroken = pool.run(workers.distill, before.parallel.num_ranks, saving)[0]
    pool.run(workers.distill, before.parallel.num_ranks, saving, stop=2, states=tmp_path, save=True)
    for steps in pool.run(workers.distill, after.parallel.num_ranks, going_on, states=tmp_path):
        for have, want in zip(steps, unbroken[2:], strict=True):
            assert have.loss == pytest.approx(want.loss, rel=1e-5)
            assert have.grad_norm == pytest.approx(want.grad_norm, rel=1e-5)


def test_gradients_in_many_blocks(pool: WorkerPool, teacher: Path, deep: Path, tmp_path: Path) -> None:
    """Models of more than 40M parameters have several; a saved state must put each one's moments where they belong."""
    of_one, of_two = (replace(work(teacher, deep, of), tokens_NGT=RESUMED_NGT) for of in (case(), case(dp=2, group=1)))
    unbroken = pool.run(workers.distill, 1, of_one)[0]
    for steps, blocks in pool.run(layout_workers.distill_in_small_blocks, 2, of_two, tmp_path, stop=2):
        assert blocks > 10
        assert [step.grad_norm for step in steps] == pytest.approx([step.grad_norm for step in unbroken[:2]], rel=1e-5)
    # The moments of steps 1 and 2 show in step 4.
    again = [steps for steps, _ in pool.run(layout_workers.distill_in_small_blocks, 2, of_two, tmp_path)]
    for steps in [*again, *pool.run(workers.distill, 1, of_one, states=tmp_path)]:
        assert [step.loss for step in steps] == pytest.approx([step.loss for step in unbroken[2:]], rel=1e-5)
        assert [step.grad_norm for step in steps] == pytest.approx([step.grad_norm for step in unbroken[2:]], rel=1e-5)


def test_interleaved_on_three_stages(pool: WorkerPool, teacher: Path, deep: Path) -> None:
    """More than two stages: neighbours differ, and 1F1B of the 4-layer teacher has 2, 1 and 1 layers."""
    one, three = (replace(work(teacher, deep, of), tokens_NGT=SIX_NGT) for of in (case(), case(pp=3, vp=2, group=3)))
    want = pool.run(workers.distill, 1, one)[0]
    for steps in pool.run(workers.distill, 3, three):
        assert [step.loss for step in steps] == pytest.approx([step.loss for step in want], rel=1e-5)
        assert [step.grad_norm for step in steps] == pytest.approx([step.grad_norm for step in want], rel=1e-5)
