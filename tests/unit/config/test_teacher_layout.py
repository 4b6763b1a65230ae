"""A teacher's own layout: what it comes to, and the arithmetic that is refused."""

import pytest

from minitron.config.compose import compose_run
from minitron.config.parallel import ParallelConfig
from minitron.config.run import RunConfig
from minitron.config.teacher_layout import TeacherLayout, own_layout
from minitron.errors import ConfigError, LayoutError

STUDENT = [
    "source.kind=random",
    "parallel.tensor_model_parallel_size=2",
    "parallel.data_parallel_size=3",
    "distill.train.global_batch_size=24",
    "distill.train.micro_batch_size=2",
]
"""4 micro-batches of 2 sequences on each of 3 ranks, on 6 ranks in all."""


def _own(run: RunConfig) -> TeacherLayout | None:
    return own_layout(run.distill, run.parallel)


def test_the_students_layout_is_no_own_layout() -> None:
    assert _own(compose_run(STUDENT)) is None
    same = ["distill.teacher.parallel.tensor_model_parallel_size=2", "distill.teacher.micro_batch_size=2"]
    assert _own(compose_run([*STUDENT, *same])) is None


@pytest.mark.parametrize(
    ("overrides", "sizes", "micro_batch_size"),
    [
        (["parallel.tensor_model_parallel_size=1"], (1, 1, 6), 2),
        (["parallel.pipeline_model_parallel_size=3"], (2, 3, 1), 2),
        (["parallel.tensor_model_parallel_size=1", "parallel.pipeline_model_parallel_size=2"], (1, 2, 3), 2),
        (["micro_batch_size=8"], (2, 1, 3), 8),
    ],
)
def test_what_is_not_given_is_the_students(
    overrides: list[str], sizes: tuple[int, int, int], micro_batch_size: int
) -> None:
    tp, pp, dp = sizes
    parallel = ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, data_parallel_size=dp)
    run = compose_run([*STUDENT, *(f"distill.teacher.{override}" for override in overrides)])
    assert _own(run) == TeacherLayout(parallel, micro_batch_size)


@pytest.mark.parametrize(
    ("tp", "student", "own", "want"),
    [(2, "true", "null", True), (1, "true", "null", False), (2, "false", "true", True), (2, "true", "false", False)],
)
def test_sequence_parallelism_is_the_students_where_it_can_be(tp: int, student: str, own: str, want: bool) -> None:
    given = [f"tensor_model_parallel_size={tp}", "pipeline_model_parallel_size=3", f"sequence_parallel={own}"]
    overrides = [f"distill.teacher.parallel.{value}" for value in given]
    layout = _own(compose_run([*STUDENT, f"parallel.sequence_parallel={student}", *overrides]))
    assert layout is not None
    assert layout.parallel.sequence_parallel is want


def test_sequence_parallelism_alone_makes_an_own_layout() -> None:
    layout = _own(compose_run([*STUDENT, "distill.teacher.parallel.sequence_parallel=true"]))
    sizes = {"tensor_model_parallel_size": 2, "data_parallel_size": 3}
    assert layout == TeacherLayout(ParallelConfig(**sizes, sequence_parallel=True), 2)


def test_a_sequence_that_the_teachers_ranks_cannot_share() -> None:
    own = "distill.teacher.parallel"
    with pytest.raises(LayoutError, match=rf"{own}.sequence_parallel=true needs a tensor-parallel size > 1"):
        compose_run([*STUDENT, f"{own}.tensor_model_parallel_size=1", f"{own}.sequence_parallel=true"])
    with pytest.raises(ConfigError, match=rf"seq_length=33 does not divide over {own}.tensor_model_parallel_size=2,"):
        compose_run([*STUDENT, f"{own}.sequence_parallel=true", "data.seq_length=33"])


@pytest.mark.parametrize(
    ("overrides", "arithmetic"),
    [
        (["micro_batch_size=3"], ["4 micro-batches (of 4 a step, in groups of 4)", "= 24 seq", "size=3 x", "3 = 9;"]),
        (  # whole groups come out, the last one does not
            ["micro_batch_size=6", "microbatches=3"],
            [
                "1 micro-batches (of 4 a step, in groups of 3) x micro_batch_size=2 x",
                "3 = 6 seq",
                "size=6 x",
                "3 = 18;",
            ],
        ),
        (
            ["parallel.tensor_model_parallel_size=4"],
            ["tensor 4 x pipeline 1 = 4 does not divide", "6 ranks (tensor 2 x pipeline 1 x data 3 = 6)"],
        ),
    ],
)
def test_arithmetic_that_does_not_come_out(overrides: list[str], arithmetic: list[str]) -> None:
    names = [f"distill.teacher{'_' if name.startswith('microbatches') else '.'}{name}" for name in overrides]
    with pytest.raises(LayoutError) as caught:
        compose_run([*STUDENT, *names])
    for part in arithmetic:
        assert part in str(caught.value)


def test_sizes_below_one() -> None:
    with pytest.raises(ConfigError, match=r"distill\.teacher\.micro_batch_size=0 must be at least 1"):
        compose_run([*STUDENT, "distill.teacher.micro_batch_size=0"])
