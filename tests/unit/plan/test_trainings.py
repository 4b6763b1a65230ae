"""The papers' experiments come out with their published steps, tokens and shapes."""

import pytest

from minitron.cli.planning import source_shape
from minitron.cli.stages import stages_of
from minitron.config.compose import compose_run
from minitron.config.distill import TeacherSource
from minitron.models.axes import num_embedding_parameters, num_parameters
from minitron.plan.trainings import Plan, PlannedPass, plan_run

STEPS = {
    "nemotron4_15b-to-8b": (20_000, 94.37e9, 1152 * 4096),
    "nemotron4_8b-to-4b": (20_000, 94.37e9, 1152 * 4096),
    "llama31_8b-to-4b_width": (10_000, 94.37e9, 1152 * 8192),
    "llama31_8b-to-4b_depth": (10_000, 94.37e9, 1152 * 8192),
    "mistral_nemo_12b-to-8b": (60_400, 380e9, 768 * 8192),
}
"""Steps, tokens, tokens of a step (arXiv 2407.14679, section 4; arXiv 2408.11796, Table 4)."""

SIZES = {
    "nemotron4_15b-to-8b": (8.272, 6.175),
    "nemotron4_8b-to-4b": (4.191, 2.618),
    "llama31_8b-to-4b_width": (4.513, 3.725),
    "llama31_8b-to-4b_depth": (4.540, 3.490),
    "mistral_nemo_12b-to-8b": (8.414, 7.340),
}
"""Parameters and those outside the embeddings, 10^9."""


def _plan(*overrides: str) -> Plan:
    config = compose_run(list(overrides))
    return plan_run(config, source_shape(config)[0])


def _pass(plan: Plan, stage: str) -> PlannedPass:
    [found] = [item for item in plan.passes if item.stage == stage]
    return found


@pytest.mark.parametrize("experiment", STEPS)
def test_published_steps_and_sizes(experiment: str) -> None:
    plan = _plan(f"experiment={experiment}")
    distill = _pass(plan, "distill")
    steps, tokens, per_step = STEPS[experiment]
    assert distill.steps == steps
    assert distill.tokens == steps * per_step == pytest.approx(tokens, rel=1e-4)
    student = plan.models[-1].model
    total = num_parameters(student)
    assert (total / 1e9, (total - num_embedding_parameters(student)) / 1e9) == pytest.approx(
        SIZES[experiment], abs=0.0006
    )


def test_correction_has_its_own_tokens() -> None:
    plan = _plan("experiment=llama31_8b-to-4b_width")
    correct = _pass(plan, "correct")
    assert correct.steps == 10_597  # 100e9 / (1152 x 8192), rounded up
    assert correct.teacher_flops == 0
    assert correct.memory[0].teacher == 0
    assert "correct" not in [
        p.stage for p in _plan("experiment=llama31_8b-to-4b_width", "correction.enabled=false").passes
    ]


def test_the_papers_chain() -> None:
    plan = _plan("experiment=nemotron4_15b-to-8b-to-4b")
    assert [round(num_parameters(item.model) / 1e9, 3) for item in plan.models] == [15.629, 8.272, 4.191]
    first, second = _pass(plan, "8b/distill"), _pass(plan, "4b/distill")
    assert first.steps == second.steps == 20_000
    assert first.teacher_flops == second.teacher_flops  # the 15B teaches both


def test_a_chain_goes_down_step_by_step() -> None:
    steps = "{name: a, prune: {num_layers: 3}}, {name: b, prune: {num_layers: 2}, num_tokens: 768, teacher: previous}"
    plan = _plan("experiment=tiny", f"chain=[{steps}]", "baseline.enabled=false")
    assert [(item.role, item.layers) for item in plan.models] == [
        ("source", [4]),
        ("student a", [3]),
        ("student b", [2]),
    ]
    assert [(item.stage, item.steps) for item in plan.passes] == [
        ("a/score", 0),
        ("a/distill", 20),
        ("b/score", 0),
        ("b/distill", 3),
    ]
    first, second = _pass(plan, "a/distill"), _pass(plan, "b/distill")
    # The original teaches the first step, the first step's student the second.
    assert first.teacher_flops / first.tokens > second.teacher_flops / second.tokens


def test_a_cached_teacher_runs_before() -> None:
    online = _plan("experiment=tiny")
    cached = _plan("experiment=tiny", "distill.teacher.source=cached")
    assert _pass(cached, "teacher_logits").flops == _pass(online, "distill").teacher_flops
    assert _pass(cached, "distill").teacher_flops == 0
    assert _pass(cached, "distill").memory[0].teacher == 0
    # 20 steps' 4 micro-batches of 2 x 32 tokens wait: 50 entries of 12 bytes, and an entropy of 4.
    assert _pass(cached, "distill").memory[0].stash == 4 * 64 * (50 * 12 + 4)
    assert _pass(online, "distill").memory[0].stash == 4 * 64 * 64 * 4


def test_intermediate_states_wait_on_the_stage_that_reads_them() -> None:
    layout = ["experiment=tiny", "parallel.pipeline_model_parallel_size=2"]
    plain = _pass(_plan(*layout), "distill")
    inner = _pass(_plan(*layout, "distill.intermediate.block_output=['0:0']"), "distill")
    assert inner.memory[0].stash - plain.memory[0].stash == 4 * 64 * 64 * 4
    assert inner.memory[1] == plain.memory[1]
    fewer = _pass(_plan(*layout, "distill.teacher_microbatches=1"), "distill")
    assert fewer.memory[1].stash == plain.memory[1].stash / 4
    assert (plain.bubble, fewer.bubble) == (1 / 5, 1 / 2)


CHAIN = "{name: a, prune: {num_layers: 3}, num_tokens: 0}, {name: b, prune: {num_layers: 2}, num_tokens: 768}"


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["prune.scores=elsewhere"],
        ["correction.enabled=true", "distill.teacher.source=cached"],
        [f"chain=[{CHAIN}]"],
        [f"chain=[{CHAIN.replace('num_tokens: 0', 'num_tokens: 1024')}]", "distill.teacher.source=cached"],
    ],
)
def test_what_is_planned_is_what_runs(overrides: list[str]) -> None:
    config = compose_run(["experiment=tiny", *overrides])
    costly = ("correct", "score", "teacher_logits", "distill", "baseline")
    run = [stage.name.removeprefix("steps/") for stage in stages_of(config)]
    run = [name for name in run if name.rsplit("/", 1)[-1] in costly]
    if config.distill.teacher.source is TeacherSource.online:
        run = [name for name in run if not name.endswith("teacher_logits")]
    assert sorted(item.stage for item in _plan("experiment=tiny", *overrides).passes) == sorted(run)
