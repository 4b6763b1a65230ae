"""The line: every stage and what its result depends on. Light: what the stages do is in `actions`."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron.checkpoint.folder import is_checkpoint_folder
from minitron.config.compose import flat_values
from minitron.config.distill import TeacherSource
from minitron.config.prune import Ranking
from minitron.config.run import RunConfig, SourceKind
from minitron.data.sources import source_fingerprint as text_fingerprint
from minitron.distill.cache_format import LogitCache, read_identity
from minitron.distill.cache_plan import lacking
from minitron.models.hf_import import source_fingerprint as model_fingerprint
from minitron.pipeline import Stage
from minitron.runtime.artefact import RunFolder, StageIdentity

if TYPE_CHECKING:
    from minitron.runtime.session import Session

Values = dict[str, Any]

_LOGGING_ONLY = ("log_interval_steps", "save_interval_steps", "eval_interval_steps", "eval_tokens")
"""Training settings that do not change the weights."""


def stages_of(config: RunConfig) -> list[Stage]:
    """The stages of a run, each after those it needs."""
    needs_scores = config.prune.ranking is Ranking.importance
    baseline = [
        Stage("baseline", ("prune", "data"), _training_values, _action("baseline"), resumable=True),
        _eval_stage("baseline"),
    ]
    evaluations = ["eval_teacher", "eval_pruned", "eval_distilled"]
    return [
        Stage("import", (), _source_values, _action("import"), outside=_model_outside),
        Stage(
            "data",
            ("import",),
            lambda c: _section(c, "data", drop=("num_workers",)),
            _action("data"),
            outside=_text_outside,
        ),
        _eval_stage("teacher"),
        Stage("score", ("import", "data"), _score_values, _action("score")),
        Stage(
            "prune", ("import", *(["score"] if needs_scores else [])), lambda c: _section(c, "prune"), _action("prune")
        ),
        _eval_stage("pruned"),
        Stage(
            "teacher_logits",
            ("import", "data"),
            _teacher_logits_values,
            _action("teacher_logits"),
            resumable=True,
            lacks=_lacking_logits,
        ),
        Stage(
            "distill",
            (*_teacher_stage(config), "prune", "data"),
            _distill_values,
            _action("distill"),
            outside=_cache_outside,
            resumable=True,
        ),
        _eval_stage("distilled"),
        *(baseline if config.baseline.enabled else []),
        Stage("export", ("distill", "data"), lambda c: _section(c, "export"), _action("export")),
        Stage(
            "report",
            ("score", "prune", *evaluations, *(["eval_baseline"] if config.baseline.enabled else []), "export"),
            lambda c: {},
            _action("report"),
        ),
        Stage("eval_checkpoint", ("data",), _eval_values, _action("eval_checkpoint"), outside=_checkpoint_outside),
    ]


def default_stages(config: RunConfig) -> list[str]:
    """The stages that make up the whole line."""
    leave_out = {"eval_checkpoint"} | ({"teacher_logits"} - set(_teacher_stage(config)))
    return [stage.name for stage in stages_of(config) if stage.name not in leave_out]


def teacher_digest(config: RunConfig) -> str:
    """Identity of the teacher's weights; its checkpoint need not be there."""
    return StageIdentity("import", _source_values(config), _model_outside(config)).digest


def _teacher_stage(config: RunConfig) -> tuple[str, ...]:
    """The stage that distillation has its teacher from; none for the cache of another run."""
    teacher = config.distill.teacher
    if teacher.source is TeacherSource.online:
        return ("import",)
    return () if teacher.cache else ("teacher_logits",)


CHECKPOINT_OF = {"teacher": "import", "pruned": "prune", "distilled": "distill", "baseline": "baseline"}
"""Stage that leaves the checkpoint of each evaluated model."""


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
    if config.source.kind is SourceKind.random:
        return flat_values(config.source.random, "source.random")
    return {}  # what counts is the content, see _model_outside


def _score_values(config: RunConfig) -> Values:
    return _section(config, "score", drop=("micro_batch_size",)) | _section(config, "precision") | {"seed": config.seed}


def _training_values(config: RunConfig) -> Values:
    values = _values(config.distill.train, "distill.train", _LOGGING_ONLY)
    return values | _section(config, "precision") | {"seed": config.seed}


def _distill_values(config: RunConfig) -> Values:
    drop = (*_LOGGING_ONLY, "teacher_microbatches", "cache")
    return _section(config, "distill", drop=drop) | _training_values(config)


def _teacher_logits_values(config: RunConfig) -> Values:
    """Not which samples: a cache only grows. ``data.seq_length`` is part of the data stage's identity."""
    dtype = config.distill.teacher.dtype or config.precision.dtype
    return config.teacher_logits.parameters() | {"dtype": str(dtype)}


def _lacking_logits(config: RunConfig, run: RunFolder) -> str | None:
    return lacking(config, run.stage("data"), LogitCache(run.stage("teacher_logits")))


def _eval_values(config: RunConfig) -> Values:
    settings = _section(config, "eval", drop=("micro_batch_size", "checkpoint"))
    return settings | _section(config, "precision") | _section(config, "report")


def _model_outside(config: RunConfig) -> dict[str, str]:
    if config.source.kind is SourceKind.random or config.source.path is None:
        return {}
    return {"model": model_fingerprint(Path(config.source.path))}


def _checkpoint_outside(config: RunConfig) -> dict[str, str]:
    """Content of ``eval.checkpoint``: a Hugging Face folder, or a checkpoint folder of ours."""
    if config.eval.checkpoint is None:
        return {}
    folder = Path(config.eval.checkpoint)
    if not is_checkpoint_folder(folder):
        return {"checkpoint": model_fingerprint(folder)}
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        with file.open("rb") as stream:
            digest.update(file.name.encode() + hashlib.file_digest(stream, "sha256").digest())
    return {"checkpoint": digest.hexdigest()}


def _cache_outside(config: RunConfig) -> dict[str, str]:
    """What the cache of another run, ``distill.teacher.cache``, belongs to."""
    if config.distill.teacher.cache is None:
        return {}
    identity = read_identity(Path(config.distill.teacher.cache))
    return {"teacher_logits": hashlib.sha256(repr(identity).encode()).hexdigest()}


def _text_outside(config: RunConfig) -> dict[str, str]:
    return {"text": text_fingerprint(config.data)}
