"""Losses between intermediate states against a dense fp64 formula, in every layout."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minitron.checkpoint.folder import WEIGHTS_DIR, read_model_config
from minitron.checkpoint.store import CheckpointReader
from minitron.config.distill import CrossEntropyMixConfig, DistillConfig
from minitron.config.intermediate import HiddenLoss, IntermediateConfig
from minitron.config.mixing import Mixing
from minitron.config.parallel import ParallelConfig
from tests.helpers.pool import WorkerPool
from tests.parallel import intermediate_workers as ours
from tests.parallel import workers
from tests.parallel.intermediate_reference import Dense, Pairs, dense_step
from tests.parallel.reference import assert_gradients, layout, make_model, norm_of, random_tokens

TOKENS_NGT = random_tokens(4, 4, 17, seed=3)

# With two stages the teacher has layers 0-1 and 2-3, the student 0-1 and 2; a block's output is seen by the next.
ALL = Pairs(
    embedding=True,
    block_output=((0, 1), (2, 0), (3, 2)),  # from the first stage to the last, back, and on the last
    mlp_input=((3, 1), (0, 0)),
    attention_relations=((0, 2), (2, 1)),
)
NAMES = {
    "embedding": True,
    "block_output": ["0:1", "2:0", "last"],
    "mlp_input": ["last:1", "0:0"],
    "attention_relations": ["0:2", "last-1"],
}
SCALED = IntermediateConfig(**NAMES, relation_heads=4)
FIXED = IntermediateConfig(**NAMES, relation_heads=4, loss=HiddenLoss.mse, mixing=Mixing.fixed, weight=0.3)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of fewer layers, channels and heads than the teacher."""
    shape = {"num_hidden_layers": 3, "hidden_size": 48, "intermediate_size": 96}
    return make_model(tmp_path_factory.mktemp("narrow"), seed=1, num_attention_heads=4, num_key_value_heads=2, **shape)


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of fewer layers than the teacher, and as wide."""
    return make_model(tmp_path_factory.mktemp("shallow"), seed=1, num_hidden_layers=3)


def initial_projection(student: Path) -> Tensor:
    generator = torch.Generator().manual_seed(ours.SEED)
    return torch.randn(64, 48, generator=generator) * read_model_config(student / "checkpoint").init_method_std


def work(teacher: Path, student: Path, *axes: int, group_size: int = 0) -> workers.Work:
    return workers.Work.between(teacher, student, layout(*axes), TOKENS_NGT, group_size=group_size)


def check(results: list[ours.Gradients], folder: Path, student: Path, want: Dense) -> None:
    projection = {} if want.projection is None else {"projection": want.projection}
    norm = norm_of({**want.gradients, **projection})
    for result in results:
        assert result.terms == pytest.approx(want.terms, rel=2e-6)
        assert result.grad_norm == pytest.approx(norm, rel=1e-5)
        if want.projection is None:
            assert result.projection is None
        else:
            assert result.projection is not None
            assert float((result.projection - want.projection).norm() / want.projection.norm()) < 1e-5
    assert not [key for key in CheckpointReader(folder / WEIGHTS_DIR).tensors if "training_only" in key]
    assert_gradients(folder, student / "checkpoint", want.gradients)


@pytest.mark.parametrize(
    ("pairs", "config"),
    [
        (Pairs(embedding=True), IntermediateConfig(embedding=True)),
        (Pairs(block_output=((2, 1),)), IntermediateConfig(block_output=["last-1"], loss=HiddenLoss.mse)),
        (Pairs(mlp_input=((1, 2),)), IntermediateConfig(mlp_input=["1:2"], mixing=Mixing.fixed, weight=2.0)),
        (
            Pairs(attention_relations=((3, 2),)),
            IntermediateConfig(attention_relations=["last"], relation_heads=2, weight=0.5),
        ),
    ],
    ids=["embedding", "block_output", "mlp_input", "attention_relations"],
)
def test_each_kind_is_the_dense_formula(
    pool: WorkerPool, teacher: Path, narrow: Path, tmp_path: Path, pairs: Pairs, config: IntermediateConfig
) -> None:
    projection = None if pairs.attention_relations else initial_projection(narrow)
    want = dense_step(teacher / "hf", narrow / "hf", TOKENS_NGT[0, :, :-1], pairs, config, projection)
    results = pool.run(ours.first_gradients, 1, work(teacher, narrow), config, tmp_path)
    check(results, tmp_path, narrow, want)


@pytest.fixture(scope="module")
def dense_scaled(teacher: Path, narrow: Path) -> Dense:
    tokens, projection = TOKENS_NGT[0, :, :-1], initial_projection(narrow)
    return dense_step(teacher / "hf", narrow / "hf", tokens, ALL, SCALED, projection)


@pytest.fixture(scope="module")
def dense_fixed(teacher: Path, narrow: Path) -> Dense:
    tokens, projection = TOKENS_NGT[0, :, :-1], initial_projection(narrow)
    return dense_step(teacher / "hf", narrow / "hf", tokens, ALL, FIXED, projection)


LAYOUTS = [
    ((2, 1, 1), 0),
    ((1, 2, 1), 0),
    ((1, 2, 1), 3),
    ((1, 3, 1), 0),  # the teacher has layers 0-1, 2 and 3, the student 0, 1 and 2
    ((1, 1, 2), 0),
    ((2, 2, 1), 1),
    ((1, 2, 2), 0),
    ((1, 3, 1), 3),
]


@pytest.mark.parametrize(("axes", "group_size"), LAYOUTS)
def test_scaled_losses_in_a_layout(
    pool: WorkerPool,
    teacher: Path,
    narrow: Path,
    tmp_path: Path,
    dense_scaled: Dense,
    axes: tuple[int, int, int],
    group_size: int,
) -> None:
    job = work(teacher, narrow, *axes, group_size=group_size)
    results = pool.run(ours.first_gradients, math.prod(axes), job, SCALED, tmp_path)
    check(results, tmp_path, narrow, dense_scaled)


@pytest.mark.parametrize(("axes", "group_size"), LAYOUTS[:5])
def test_fixed_losses_in_a_layout(
    pool: WorkerPool,
    teacher: Path,
    narrow: Path,
    tmp_path: Path,
    dense_fixed: Dense,
    axes: tuple[int, int, int],
    group_size: int,
) -> None:
    job = work(teacher, narrow, *axes, group_size=group_size)
    results = pool.run(ours.first_gradients, math.prod(axes), job, FIXED, tmp_path)
    check(results, tmp_path, narrow, dense_fixed)


@pytest.mark.parametrize(
    "parallel",
    [
        layout(2, sp=True),
        layout(2, 2, sp=True),
        # The student's layers 1 and 2 are on the last stage; the teacher is divided evenly, 0-1 and 2-3.
        replace(layout(1, 2), num_layers_in_first_pipeline_stage=1),
        replace(layout(2, 2, sp=True), num_layers_in_last_pipeline_stage=2),
    ],
    ids=["sequence TP2", "sequence TP2 x PP2", "uneven PP2", "uneven PP2 x sequence TP2"],
)
@pytest.mark.parametrize("config", [SCALED, FIXED], ids=["scaled", "fixed"])
def test_split_sequences_and_uneven_stages(
    pool: WorkerPool,
    teacher: Path,
    narrow: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    parallel: ParallelConfig,
    config: IntermediateConfig,
) -> None:
    want = request.getfixturevalue(f"dense_{config.mixing}")
    job = replace(work(teacher, narrow), parallel=parallel)
    results = pool.run(ours.first_gradients, parallel.num_ranks, job, config, tmp_path)
    check(results, tmp_path, narrow, want)


@pytest.mark.parametrize("axes", [(1, 1, 1), (1, 2, 1)])
@pytest.mark.parametrize("config", [SCALED, FIXED], ids=["scaled", "fixed"])
@pytest.mark.parametrize("mixing", list(Mixing))
def test_total_is_the_sum_of_the_weighted_parts(
    pool: WorkerPool,
    teacher: Path,
    narrow: Path,
    tmp_path: Path,
    axes: tuple[int, int, int],
    config: IntermediateConfig,
    mixing: Mixing,
) -> None:
    """With one micro-batch a step: a logged weight is the mean over micro-batches."""
    recipe = DistillConfig(cross_entropy=CrossEntropyMixConfig(weight=0.7, mixing=mixing))
    job = replace(work(teacher, narrow, *axes), recipe=recipe)
    for result in pool.run(ours.first_gradients, math.prod(axes), job, config, tmp_path, micro_batch_size=4):
        terms = dict(result.terms)
        total, logits, plain = (terms.pop(name) for name in ("loss", "forward_kl", "cross_entropy"))
        alpha = terms.pop("alpha") if config.mixing is Mixing.scaled else 0.3
        weight = terms.pop("cross_entropy_weight") if mixing is Mixing.scaled else 0.7
        assert set(terms) == {
            "embedding",
            *("block_output.0:1", "block_output.2:0", "block_output.3:2"),
            *("mlp_input.3:1", "mlp_input.0:0"),
            *("attention_relations.0:2", "attention_relations.2:1"),
        }
        assert total == pytest.approx(logits + weight * plain + alpha * sum(terms.values()), rel=1e-6)


def test_one_width_needs_no_projection(pool: WorkerPool, teacher: Path, shallow: Path, tmp_path: Path) -> None:
    # The teacher's layer 2 and the student's layer 1 are seen one later: on the last stage, which then sends nothing.
    config = IntermediateConfig(block_output=["last-1"])
    pairs = Pairs(block_output=((2, 1),))
    want = dense_step(teacher / "hf", shallow / "hf", TOKENS_NGT[0, :, :-1], pairs, config, None)
    results = pool.run(ours.first_gradients, 2, work(teacher, shallow, 1, 2), config, tmp_path)
    check(results, tmp_path, shallow, want)


@pytest.mark.parametrize("mixing", list(Mixing))
def test_the_middle_of_three_stages_sends_to_both_ends_and_has_no_loss(
    pool: WorkerPool, teacher: Path, narrow: Path, tmp_path: Path, mixing: Mixing
) -> None:
    # The teacher's block 2 is there alone: the output of block 1 is seen at it too.
    config = IntermediateConfig(
        block_output=["1:1"], mlp_input=["2:0"], attention_relations=["2:2"], relation_heads=4, mixing=mixing
    )
    pairs = Pairs(block_output=((1, 1),), mlp_input=((2, 0),), attention_relations=((2, 2),))
    tokens, projection = TOKENS_NGT[0, :, :-1], initial_projection(narrow)
    want = dense_step(teacher / "hf", narrow / "hf", tokens, pairs, config, projection)
    results = pool.run(ours.first_gradients, 3, work(teacher, narrow, 1, 3), config, tmp_path)
    check(results, tmp_path, narrow, want)


def test_a_projection_that_one_stage_alone_uses_stays_the_same_on_both(
    pool: WorkerPool, teacher: Path, narrow: Path
) -> None:
    config = IntermediateConfig(embedding=True)
    one = pool.run(ours.distill, 1, work(teacher, narrow), config)[0]
    first, last = pool.run(ours.distill, 2, work(teacher, narrow, 1, 2), config)
    assert first.projection is not None
    assert last.projection is not None
    assert one.projection is not None
    assert torch.equal(first.projection, last.projection)
    torch.testing.assert_close(first.projection, one.projection, rtol=1e-4, atol=1e-6)
    assert float((first.projection - initial_projection(narrow)).norm()) > 0.1
    for have, want in zip(first.terms, one.terms, strict=True):
        assert have == pytest.approx(want, rel=1e-5)


def test_rows_that_fill_up_a_batch_do_not_count(pool: WorkerPool, teacher: Path, narrow: Path, tmp_path: Path) -> None:
    three = work(teacher, narrow)
    three = workers.Work(teacher=three.teacher, student=three.student, parallel=layout(), tokens_NGT=TOKENS_NGT[:, :3])
    filled = pool.run(ours.first_gradients, 1, three, SCALED, tmp_path / "a", micro_batch_size=4)[0]
    whole = pool.run(ours.first_gradients, 1, three, SCALED, tmp_path / "b", micro_batch_size=3)[0]
    assert filled.terms == pytest.approx(whole.terms, rel=1e-6)
    assert filled.grad_norm == pytest.approx(whole.grad_norm, rel=1e-6)


@pytest.mark.parametrize("config", [SCALED, FIXED, IntermediateConfig()], ids=["scaled", "fixed", "logits alone"])
@pytest.mark.parametrize(("group_size", "sizes"), [(1, [1, 1, 1, 1]), (3, [3, 1])])
def test_no_stage_holds_more_teacher_states_than_those_of_a_group(
    pool: WorkerPool, teacher: Path, narrow: Path, config: IntermediateConfig, group_size: int, sizes: list[int]
) -> None:
    first, last = pool.run(ours.held_signals, 2, work(teacher, narrow, 1, 2, group_size=group_size), config)
    assert last == sizes * len(TOKENS_NGT)
    assert first == (sizes if config.enabled else [0] * len(sizes)) * len(TOKENS_NGT)


@pytest.mark.parametrize("axes", [(1, 2, 1), (1, 2, 2)])
def test_same_steps_as_the_unbroken_run(
    pool: WorkerPool, teacher: Path, narrow: Path, tmp_path: Path, axes: tuple[int, int, int]
) -> None:
    job, ranks = work(teacher, narrow, *axes), math.prod(axes)
    unbroken = pool.run(ours.distill, ranks, job, SCALED)
    first = pool.run(ours.distill, ranks, job, SCALED, stop=2, states=tmp_path, save=True)
    second = pool.run(ours.distill, ranks, job, SCALED, states=tmp_path)
    assert first[0].terms == unbroken[0].terms[:2]
    for have, want in zip(second, unbroken, strict=True):
        assert have.terms == want.terms[2:]
        assert have.projection is not None
        assert want.projection is not None
        assert torch.equal(have.projection, want.projection)
    assert "training_only.weight" in CheckpointReader(tmp_path / "step_00000002").tensors
