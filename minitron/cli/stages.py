"""The line: every stage and what its result depends on. Light: what the stages do is in `actions`."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron.cli.outside import cache_outside, checkpoint_outside, model_outside, teacher_outside, text_outside
from minitron.cli.scoring import (
    prune_needs,
    prune_outside,
    prune_values,
    questions_outside,
    score_values,
    sequences,
    verify_values,
)
from minitron.config.compose import flat_values
from minitron.config.distill import TeacherSource
from minitron.config.line import Ancestor
from minitron.config.run import RunConfig, SourceKind
from minitron.config.trainings import ABLATION, TRAININGS, in_step, settings_of
from minitron.data.summary import Split, require_tokens
from minitron.distill.cache_format import LogitCache
from minitron.distill.cache_plan import lacking
from minitron.pipeline import Stage, nothing_outside
from minitron.prune.given import at_random
from minitron.runtime.artefact import RunFolder

if TYPE_CHECKING:
    from minitron.runtime.session import Session

Values = dict[str, Any]

_LOGGING_ONLY = ("log_interval_steps", "save_interval_steps", "eval_interval_steps", "eval_tokens")
"""Training settings that do not change the weights."""

_NOT_TEXT = ("num_workers", "seq_length", "paths")
"""Of ``data``: what the tokens do not depend on. Length counts for who reads sequences, the content of paths for all,
see `text_outside`."""

_TEACHERS_PLACE = (
    "distill.teacher.parallel.",
    "distill.teacher.micro_batch_size",
    "distill.teacher.path",  # what counts is the content, see teacher_outside and cache_outside
    "distill.teacher.fp8_recipe",  # it counts with the dtype, see _recipe_values
    "distill.teacher.cache",
)
"""Where the teacher is and how it is laid out does not change what it says."""

CHECKPOINT_OF = {
    "teacher": "import",
    "corrected": "correct",
    "pruned": "prune",
    "distilled": "distill",
    **{name: name for name in TRAININGS if name not in ("correct", "distill")},
}
"""Stage that leaves the checkpoint of each evaluated model."""


_SHARED = ("import", "data", "eval_teacher", "correct", "eval_corrected", "eval_checkpoint")
"""Stages that all steps of a chain read."""


@dataclass(frozen=True)
class Line:
    """One way down from a source to a smaller model; a chain has one for each step.

    Attributes:
        config: The run's configuration, as this step has it.
        step: Name of the step; empty in a run of one step.
        source: The step whose model is scored and pruned; None for the original.
        teacher: The step whose student teaches; None for the original, corrected or not.
        candidate: It is one of a search: it lies in ``search/`` and reads the scores of the whole run.
    """

    config: RunConfig
    step: str = ""
    source: "Line | None" = None
    teacher: "Line | None" = None
    candidate: bool = False

    @property
    def distills(self) -> bool:
        """Whether the step is more than pruning."""
        return self.config.distill.train.num_tokens > 0

    def place(self, stage: str) -> str:
        """Where a stage lies in the run folder; ``source`` and ``teacher`` are names of roles."""
        if stage == "source":
            left = "distill" if self.source and self.source.distills else "prune"
            return self.source.place(left) if self.source else "import"
        if stage == "teacher":
            original = "correct" if self.config.correction.enabled else "import"
            return self.teacher.place("distill") if self.teacher else original
        shared = stage in _SHARED or (stage == "teacher_logits" and self.teacher is None)
        shared = shared or (self.candidate and stage == "score")
        folder = "search" if self.candidate else "steps"
        return stage if shared or not self.step else f"{folder}/{self.step}/{stage}"

    def stage(self, stage: Stage) -> Stage:
        """A stage as it is in this line."""

        def run(session: "Session", out: Path) -> Values:
            told = {name: session.digests[self.place(name)] for name in (*stage.needs, *stage.mentions)}
            digests = {**session.digests, **told}
            return stage.run(replace(session, config=self.config, run=placed(session.run), digests=digests), out)

        def placed(run: RunFolder) -> RunFolder:
            return RunFolder(run.path, self.place)

        return replace(
            stage,
            name=self.place(stage.name),
            needs=tuple(dict.fromkeys(map(self.place, stage.needs))),
            mentions=tuple(map(self.place, stage.mentions)),
            waits_for=tuple(map(self.place, stage.waits_for)),
            values=lambda _: stage.values(self.config),
            outside=lambda _: stage.outside(self.config),
            lacks=lambda _, run: stage.lacks(self.config, placed(run)),
            check=lambda _, run: stage.check(self.config, placed(run)),
            run=run,
        )


def lines_of(config: RunConfig) -> list[Line]:
    """The steps of a run: one, or those of its chain."""
    if not config.chain:
        return [Line(config)]
    lines: list[Line] = []
    for step in config.chain:
        previous = lines[-1] if lines else None
        source = previous if step.source is Ancestor.previous else None
        teacher = previous if step.teacher is Ancestor.previous else None
        lines.append(Line(in_step(config, step), step.name, source, teacher))
    return lines


def stages_of(config: RunConfig) -> list[Stage]:
    """Every stage of a run, each after those it needs; a verb runs some of them."""
    shared = [
        Stage("import", (), _source_values, _action("import"), outside=model_outside, alone=True),
        Stage(
            "data",
            ("import",),
            lambda c: _section(c, "data", drop=_NOT_TEXT),
            _action("data"),
            outside=text_outside,
            resumable=True,
            check=_check_text,
            alone=True,
        ),
        _eval_stage("teacher"),
        *(_training_stages("correct", config) if config.correction.enabled else []),
        Stage("eval_checkpoint", ("data",), _eval_values, _action("eval_checkpoint"), outside=checkpoint_outside),
    ]
    whole = Line(config)
    stages = [whole.stage(stage) for stage in shared]
    stages += _stages_of_lines(lines_of(config))
    return stages if config.chain else stages + [whole.stage(stage) for stage in _ablation_stages(config)]


def _stages_of_lines(lines: list[Line]) -> list[Stage]:
    """The stages of every step. Steps that learn from one model share its cache, which has what the longest needs."""
    stages: dict[str, Stage] = {}
    for line in lines:
        for stage in line_stages(line.config):
            place = line.place(stage.name)
            sharing = [other for other in lines if other.place(stage.name) == place]
            longest = max(sharing, key=lambda other: other.config.distill.train.num_tokens)
            stages.setdefault(place, longest.stage(stage))
    return list(stages.values())


def line_stages(config: RunConfig) -> list[Stage]:
    """The stages of one step."""
    evaluations = ["eval_teacher", "eval_pruned", "eval_distilled"]
    if config.baseline.enabled:
        evaluations.append("eval_baseline")
    scores = [] if config.prune.scores else ["score"]
    score = Stage("score", ("source", "data"), score_values, _action("score"), outside=questions_outside)
    pruning = [
        *([score] if scores else []),
        Stage(
            "prune",
            prune_needs(config),
            prune_values,
            _action("prune"),
            outside=prune_outside,
            alone=_prunes_alone(config),
        ),
        Stage("verify", ("source", "prune", "data"), verify_values, _action("verify")),
        _eval_stage("pruned"),
    ]
    if not Line(config).distills:
        return pruning
    return [
        *pruning,
        Stage(
            "teacher_logits",
            (*_teachers_stage(config), "import", "data"),
            _teacher_logits_values,
            _action("teacher_logits"),
            outside=teacher_outside,
            resumable=True,
            waits_for=("eval_teacher",),
            lacks=_lacking_logits,
        ),
        *_training_stages("distill", config),
        *(_training_stages("baseline", config) if config.baseline.enabled else []),
        Stage("export", ("distill", "data"), lambda c: _section(c, "export"), _action("export"), alone=True),
        Stage(
            "report",
            (*scores, "prune", "verify", *evaluations, "export"),
            lambda c: {},
            _action("report"),
            alone=True,
        ),
    ]


def _ablation_stages(config: RunConfig) -> list[Stage]:
    """The recipes beside the line's own, and their comparison."""
    if not config.baseline.enabled:
        return []
    others = [name for name in ABLATION if name not in ("distill", "baseline")]
    teacher, given = "eval_corrected" if config.correction.enabled else "eval_teacher", []
    if config.distill.teacher.path:
        teacher = "eval_given_teacher"
        given = [Stage(teacher, ("data",), _eval_values, _action(teacher), outside=teacher_outside)]
    return [
        *given,
        Stage(
            "prune_random",
            prune_needs(random_ranking(config)),
            lambda c: prune_values(random_ranking(c)),
            _action("prune_random"),
            alone=_prunes_alone(config),
        ),
        *(stage for name in others for stage in _training_stages(name, config)),
        Stage(
            "ablation",
            (teacher, "eval_pruned", *(f"eval_{_evaluated(name)}" for name in ABLATION)),
            lambda c: _section(c, "ablation"),
            _action("ablation"),
            alone=True,
        ),
    ]


def _prunes_alone(config: RunConfig) -> bool:
    """Slicing is one process's work; all ranks share that of fitting."""
    return not config.prune.reconstruct.enabled


def random_ranking(config: RunConfig) -> RunConfig:
    """The run with units kept at random: the control of importance."""
    return replace(config, prune=at_random(config.prune))


def needs_cache(config: RunConfig) -> bool:
    """Whether distillation reads the run's own cache of the teacher."""
    return config.distill.teacher.source is TeacherSource.cached and config.distill.teacher.cache is None


def _teachers_stage(config: RunConfig) -> tuple[str, ...]:
    """The stage that leaves the teacher, where `teacher_outside` has none: ``teacher`` names it in both."""
    return () if config.distill.teacher.path else ("teacher",)


def _training_stages(name: str, config: RunConfig) -> list[Stage]:
    """A training run and the evaluation of what it leaves."""
    training = TRAININGS[name]
    needs = [training.start or "prune", "data"]

    def values(config: RunConfig) -> Values:
        return _training_values(config, name) | (_recipe_values(config) if training.distills else {})

    outside: Callable[[RunConfig], dict[str, str]] = nothing_outside
    mentions: tuple[str, ...] = ()
    if training.distills:
        outside = teacher_outside
        if config.distill.teacher.source is TeacherSource.online:
            needs = [*_teachers_stage(config), *needs]
        else:  # it can be learnt from a cache when the teacher itself is gone
            mentions = _teachers_stage(config)
            if needs_cache(config):
                needs.insert(0, "teacher_logits")
            else:
                outside = cache_outside
    stage = Stage(
        name,
        tuple(needs),
        values,
        _action(name),
        outside=outside,
        resumable=True,
        mentions=mentions,
        waits_for=("eval_teacher", "verify") if training.distills else ("eval_teacher",),
    )
    return [stage, _eval_stage(_evaluated(name))]


def _evaluated(training: str) -> str:
    """The name under which a training run's model is evaluated."""
    return next(which for which, stage in CHECKPOINT_OF.items() if stage == training)


def _eval_stage(which: str) -> Stage:
    name = f"eval_{which}"
    return Stage(name, (CHECKPOINT_OF[which], "data"), _eval_values, _action(name))


def _action(name: str) -> Callable[["Session", Path], Values]:
    """What a stage does, looked up when it runs: planning needs neither Megatron nor a device."""

    def run(session: "Session", out: Path) -> Values:
        from minitron.cli.actions import act

        return act(name, session, out)

    return run


def _values(section: Any, prefix: str, drop: tuple[str, ...]) -> Values:
    """A section's values, without those whose last name is in ``drop``."""
    values = flat_values(section, prefix)
    return {key: value for key, value in values.items() if key.rsplit(".", 1)[-1] not in drop}


def _section(config: RunConfig, name: str, *, drop: tuple[str, ...] = ()) -> Values:
    return _values(getattr(config, name), name, drop)


def _source_values(config: RunConfig) -> Values:
    values = {"source.dtype": config.source.dtype.value}
    if config.source.kind is SourceKind.random:
        return values | flat_values(config.source.random, "source.random")
    return values  # what counts besides is the content, see model_outside


def _training_values(config: RunConfig, training: str) -> Values:
    values = _values(settings_of(config, training), "distill.train", _LOGGING_ONLY)
    precision = {f"precision.{key}": value for key, value in config.precision.in_force().items()}
    return values | precision | sequences(config) | {"seed": config.seed}


def _recipe_values(config: RunConfig) -> Values:
    """What distillation has beyond any training: losses and teacher."""
    recipe = config.distill
    unread = ["distill.train.", *_TEACHERS_PLACE]  # the training's own are in _training_values
    if not recipe.cross_entropy.weight:
        unread.append("distill.cross_entropy.")
    if not recipe.intermediate.enabled:
        unread.append("distill.intermediate.")
    if not recipe.intermediate.attention_relations:
        unread.append("distill.intermediate.relation_heads")
    values = _section(config, "distill", drop=("teacher_microbatches",))
    values = {key: value for key, value in values.items() if not key.startswith(tuple(unread))}
    return values | {"distill.teacher.dtype": recipe.teacher.precision(config.precision).label}


def _teacher_logits_values(config: RunConfig) -> Values:
    """Not which samples: a cache only grows."""
    dtype = {"dtype": config.distill.teacher.precision(config.precision).label}
    return config.teacher_logits.parameters() | dtype | sequences(config)


def check_sequences(config: RunConfig, data: Path) -> None:
    """Check that a data folder has what any run needs to start: a global batch, the samples to score, one held out.

    Raises:
        DataError: With the arithmetic.
    """
    train, seq_length = config.least_train_sequences, config.data.seq_length
    require_tokens(data, Split.train, num_sequences=train, seq_length=seq_length)
    require_tokens(data, Split.heldout, num_sequences=1, seq_length=seq_length)


def _check_text(config: RunConfig, run: RunFolder) -> None:
    """A run may cut the text of an earlier one into longer sequences, or more of them: say so before any work."""
    check_sequences(config, run.stage("data"))


def _lacking_logits(config: RunConfig, run: RunFolder) -> str | None:
    return lacking(config, run.stage("data"), LogitCache(run.stage("teacher_logits")))


def _eval_values(config: RunConfig) -> Values:
    settings = _section(config, "eval", drop=("micro_batch_size", "checkpoint"))
    precision = {"precision.dtype": config.precision.dtype.value}
    return settings | precision | sequences(config) | _section(config, "report")
