"""Every training of a run: how long it is, what it costs, what each rank holds."""

from collections.abc import Callable
from dataclasses import dataclass

from minitron.config.distill import TeacherSource
from minitron.config.fp8 import check_fp8_model
from minitron.config.intermediate import StateKind, find_matches, relation_widths
from minitron.config.line import Ancestor, ChainStepConfig
from minitron.config.model import ModelConfig
from minitron.config.parallel import ParallelConfig, check_layout, layers_per_stage
from minitron.config.precision import Dtype
from minitron.config.prune import PruneConfig, check_target
from minitron.config.run import RunConfig
from minitron.config.teacher_layout import own_layout
from minitron.config.train import num_microbatches
from minitron.config.trainings import TRAININGS, in_step, settings_of
from minitron.plan.flops import forward_flops, training_flops
from minitron.plan.memory import (
    DTYPE_BYTES,
    Batches,
    BesideTeacher,
    StageMemory,
    sequence_parts,
    training_memory,
)

_SAMPLED_ENTRY_BYTES = 8 + 4
"""Bytes of one cached entry on the device: an int64 id and an fp32 weight."""


@dataclass(frozen=True)
class PlannedModel:
    """A model of the run.

    Attributes:
        role: ``teacher``, or ``student`` and the step of the chain.
        model: Its architecture.
        layers: Layers of each pipeline stage.
    """

    role: str
    model: ModelConfig
    layers: list[int]


@dataclass(frozen=True)
class PlannedPass:
    """Work that the GPUs do over tokens.

    Attributes:
        stage: The run's stage, with its step of a chain.
        tokens: Tokens it goes over.
        steps: Optimizer steps; 0 for a forward pass alone.
        flops: FLOPs of the model that is trained or run, over all tokens.
        teacher_flops: FLOPs of the teacher beside it.
        microbatches: Micro-batches of a step on one rank.
        bubble: Part of a step that a pipeline stage waits, for stages that are equally long.
        memory: What a rank of each pipeline stage holds; empty for a forward pass alone.
    """

    stage: str
    tokens: int
    steps: int
    flops: float
    teacher_flops: float = 0.0
    microbatches: int = 0
    bubble: float = 0.0
    memory: tuple[StageMemory, ...] = ()


@dataclass(frozen=True)
class Plan:
    """A whole run."""

    models: list[PlannedModel]
    passes: list[PlannedPass]


def plan_run(
    config: RunConfig,
    source: ModelConfig,
    given_teacher: ModelConfig | None = None,
    *,
    target_of: Callable[[ModelConfig, PruneConfig], ModelConfig] = check_target,
) -> Plan:
    """Plan every step of a run.

    Args:
        config: The run.
        source: Architecture of the model to compress.
        given_teacher: Architecture of the teacher that ``distill.teacher.path`` names; None for the source.
        target_of: Gives the architecture that a step prunes a model to.

    Raises:
        PruneError: A target does not fit its source.
        LayoutError: The layout cannot split a model, or FP8 cannot multiply its widths.
    """
    own = own_layout(config.distill, config.parallel)
    check_layout(source, config.parallel.plain(), who="source")
    models = [PlannedModel("source", source, layers_per_stage(source.num_layers, config.parallel.plain()))]
    passes: list[PlannedPass] = []
    if config.correction.enabled:
        who = "teacher to correct (correction.enabled=true)"
        check_layout(source, config.parallel, who=who)
        check_fp8_model(source, config.precision, config.parallel, who=who)
        passes.append(_training(config, "correct", "correct", source, None))
    students: list[ModelConfig] = []
    steps: list[ChainStepConfig | None] = [*config.chain] or [None]
    for step in steps:
        line = config if step is None else in_step(config, step)
        name = "" if step is None else step.name
        before = students[-1] if step and students and step.source is Ancestor.previous else source
        teacher, own_teacher = given_teacher or source, False
        if step and students and step.teacher is Ancestor.previous:
            teacher, own_teacher = students[-1], True
        student = target_of(before, line.prune)
        students.append(student)
        who = f"student {name}".rstrip()
        check_layout(student, config.parallel, who=who)
        check_fp8_model(student, config.precision, config.parallel, who=who)
        beside = own.parallel if own else config.parallel.for_teacher(teacher.num_layers)
        section = "distill.teacher.parallel" if own else "parallel"
        check_layout(teacher, beside, who=f"teacher {name}".rstrip(), section=section)
        check_fp8_model(teacher, config.distill.teacher.precision(config.precision), beside, who=f"teacher of {who}")
        if given_teacher is not None and len(models) == 1:
            models.append(PlannedModel("teacher", teacher, layers_per_stage(teacher.num_layers, beside)))
        models.append(PlannedModel(who, student, layers_per_stage(student.num_layers, config.parallel)))
        passes += _line_passes(line, name, before, student, teacher, beside, own_teacher=own_teacher)
    longest: dict[str, PlannedPass] = {}
    for item in passes:
        if item.stage not in longest or item.tokens > longest[item.stage].tokens:
            longest[item.stage] = item
    return Plan(models, list(longest.values()))


def _line_passes(
    config: RunConfig,
    step: str,
    source: ModelConfig,
    student: ModelConfig,
    teacher: ModelConfig,
    teacher_parallel: ParallelConfig,
    *,
    own_teacher: bool,
) -> list[PlannedPass]:
    """One step: scores, its trainings, and the teacher's pass before a cached distillation.

    Steps that learn from the original share its cache; ``own_teacher`` is for one that learns from another student.
    """
    prefix = f"{step}/" if step else ""
    length = config.data.seq_length
    scored = config.score.seq_length or length
    tokens = config.score.num_samples * scored
    passes = [PlannedPass(f"{prefix}score", tokens, 0, tokens * forward_flops(source, scored).total)]
    if config.prune.scores:
        passes = []
    if config.distill.train.num_tokens == 0:
        return passes  # a step that only prunes
    distilled = settings_of(config, "distill")
    if config.distill.teacher.source is TeacherSource.cached and config.distill.teacher.cache is None:
        tokens = distilled.num_steps(length) * distilled.tokens_per_step(length)
        flops = tokens * forward_flops(teacher, length).total
        passes.append(PlannedPass(f"{prefix}teacher_logits" if own_teacher else "teacher_logits", tokens, 0, flops))
    beside = _beside(config, student, teacher, teacher_parallel)
    passes.append(_training(config, "distill", f"{prefix}distill", student, beside))
    if config.baseline.enabled:
        passes.append(_training(config, "baseline", f"{prefix}baseline", student, None))
    return passes


def _training(
    config: RunConfig, training: str, stage: str, model: ModelConfig, teacher: BesideTeacher | None
) -> PlannedPass:
    train, parallel, length = settings_of(config, training), config.parallel, config.data.seq_length
    steps = train.num_steps(length)
    tokens = steps * train.tokens_per_step(length)
    microbatches = num_microbatches(train.global_batch_size, train.micro_batch_size, parallel.data_parallel_size)
    group = microbatches
    if TRAININGS[training].distills:
        group = min(config.distill.teacher_microbatches or microbatches, microbatches)
    batches = Batches(train.micro_batch_size * length // parallel.context_parallel_size, group)
    idle = (parallel.pipeline_model_parallel_size - 1) / parallel.num_chunks
    return PlannedPass(
        stage,
        tokens,
        steps,
        flops=tokens * training_flops(model, length, parallel),
        teacher_flops=tokens * forward_flops(teacher.model, length).total if teacher and teacher.model else 0.0,
        microbatches=microbatches,
        bubble=idle / (idle + group),
        memory=tuple(training_memory(model, parallel, config.precision, batches, teacher)),
    )


def _beside(
    config: RunConfig, student: ModelConfig, teacher: ModelConfig, teacher_parallel: ParallelConfig
) -> BesideTeacher:
    """The teacher as the student's ranks have it."""
    parallel = config.parallel
    settings = config.distill.teacher
    precision = settings.precision(config.precision)
    dtype = precision.dtype
    nothing = (0.0,) * parallel.pipeline_model_parallel_size
    mixed = config.distill.cross_entropy.weight > 0
    if settings.source is TeacherSource.cached:
        entry = _SAMPLED_ENTRY_BYTES * config.teacher_logits.max_entries + 4
        return BesideTeacher(None, parallel, precision, False, entry, nothing, mixed)
    is_own = own_layout(config.distill, parallel) is not None
    inner = nothing if is_own else _inner_bytes(config, student, teacher, dtype)
    state = DTYPE_BYTES[dtype] * teacher.hidden_size / (1 if is_own else sequence_parts(parallel))
    return BesideTeacher(teacher, teacher_parallel, precision, is_own, state, inner, mixed)


def _inner_bytes(config: RunConfig, student: ModelConfig, teacher: ModelConfig, dtype: Dtype) -> tuple[float, ...]:
    """Bytes per token of the teacher's intermediate states on the student's stage that reads them."""
    parallel = config.parallel
    stages = layers_per_stage(student.num_layers, parallel)
    totals = [0.0] * len(stages)
    for match in find_matches(config.distill.intermediate, teacher, student, parallel):
        width = teacher.hidden_size / sequence_parts(parallel)
        if match.teacher.kind is StateKind.attention_relations:
            width = sum(relation_widths(teacher)) / parallel.tensor_model_parallel_size
        totals[match.student.stage(stages)] += DTYPE_BYTES[dtype] * width
    return tuple(totals)
