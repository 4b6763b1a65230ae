"""Read a run's artefacts into the numbers of its report."""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron.checkpoint.folder import read_model_config
from minitron.config.model import ModelConfig
from minitron.data.summary import load_summary
from minitron.errors import ArtefactError
from minitron.models.axes import num_active_parameters, num_embedding_parameters, num_parameters
from minitron.report.cost import six_nd, two_nd
from minitron.report.data import (
    Cost,
    ExportResult,
    ModelResult,
    PruneResult,
    ReportData,
    Role,
    StageTime,
    TrainingCurve,
)
from minitron.runtime.artefact import RunFolder
from minitron.runtime.tracking import METRICS_FILE, read_metrics

# Stage of the line -> the verb that runs it alone.
_VERBS = {
    "import": "import",
    "data": "data",
    "eval_teacher": "eval",
    "correct": "train",
    "eval_corrected": "eval",
    "score": "score",
    "prune": "prune",
    "verify": "verify",
    "eval_pruned": "eval",
    "teacher_logits": "teacher-logits",
    "distill": "distill",
    "eval_distilled": "eval",
    "baseline": "train",
    "eval_baseline": "eval",
    "export": "export",
}
_OPTIONAL = ("correct", "eval_corrected", "score", "teacher_logits", "baseline", "eval_baseline")
_CONTROL = ("baseline", "eval_baseline")
_MODELS = {  # role -> stages with its checkpoint and its evaluation
    Role.teacher: ("import", "eval_teacher"),
    Role.corrected: ("correct", "eval_corrected"),
    Role.pruned: ("prune", "eval_pruned"),
    Role.distilled: ("distill", "eval_distilled"),
    Role.baseline: ("baseline", "eval_baseline"),
}
_TRAIN_PREFIX = "distill.train."
_SCORE_KEPT = {  # key of the prune stage's summary -> size that the axis has in a model's shape
    "score_kept_layers": "num_layers",
    "score_kept_hidden": "hidden_size",
    "score_kept_ffn": "ffn_hidden_size",
    "score_kept_heads": "num_attention_heads",
}
_OBJECTIVES = {
    "forward_kl": "forward KL to the teacher",
    "reverse_kl": "reverse KL to the teacher",
    "jensen_shannon": "Jensen-Shannon divergence to the teacher",
    "mse": "squared difference to the teacher's probabilities",
    "cosine": "cosine distance to the teacher's probabilities",
    "cross_entropy": "cross-entropy on the text",
}

Metas = dict[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Units that pruning kept, numbered in the source.

    Attributes:
        layers: Layers.
        hidden: Channels.
        ffn: Neurons of each kept layer.
        heads: Query heads of each kept layer.
    """

    layers: list[int]
    hidden: list[int]
    ffn: list[list[int]]
    heads: list[list[int]]


def collect(run: RunFolder) -> ReportData:
    """Read everything but the scores.

    Args:
        run: The run, or one step of a chain.

    Raises:
        ArtefactError: A stage the report needs is not done, or one of its files cannot be read.
        DataError: The same, for the data folder.
        CheckpointError: The same, for a ``model.json``.
    """
    metas = _metas(run)
    shapes = {role: read_model_config(run.stage(stage)) for role, (stage, _) in _MODELS.items() if stage in metas}
    models = _model_results(run, shapes)
    distill = read_curve(run.stage("distill"))
    baseline = read_curve(run.stage("baseline")) if "baseline" in metas else None
    data = load_summary(run.stage("data"))
    same_training, training_notes = _compare_training(metas, distill, baseline)
    return ReportData(
        run_dir=run.stage("report").parent,
        model_name=_model_name(run, metas["import"]),
        models=models,
        distill=distill,
        baseline=baseline,
        same_training=same_training,
        prune=_prune_result(run, metas),
        data={"train": data.train, "heldout": data.heldout},
        stages=[
            StageTime(name=stage, seconds=float(meta["seconds"]), finished=meta["finished"])
            for stage, meta in metas.items()
        ],
        cost=_cost(run, metas, shapes, distill, baseline),
        export=_export_result(run.stage("export"), metas["export"]),
        environment=metas["distill"]["environment"],
        notes=[*_eval_notes(models), *training_notes, *_environment_notes(metas)],
    )


def read_kept(run: RunFolder) -> Kept:
    """Read the kept units from the prune spec.

    Raises:
        ArtefactError: It cannot be read.
    """
    path = run.stage("prune") / "prune_spec.json"
    spec = _read_json(path, "prune")
    try:
        return Kept(
            layers=_units(spec["layers"]),
            hidden=_units(spec["hidden"]),
            ffn=[_units(text) for text in spec["ffn"]],
            heads=[_units(text) for text in spec["heads"]],
        )
    except (KeyError, ValueError, AttributeError) as error:
        raise _unreadable(path, "prune", error) from error


def _metas(run: RunFolder) -> Metas:
    """Metadata of every finished stage, in the order of the line; the control is there whole or not at all."""
    if not run.path.is_dir():
        raise ArtefactError(f"no run folder {run.path}; run `minitron compress name={run.path.name}` first")
    found = {stage: run.meta(stage) for stage in _VERBS}
    for stage, meta in found.items():
        if meta is None and stage not in _OPTIONAL:
            raise ArtefactError(
                f"{run.path} has no finished stage {stage!r}, which the report needs; run `minitron {_VERBS[stage]}`, "
                f"or `minitron compress name={run.path.name}`, which runs all that is missing"
            )
    has_control = all(found[stage] is not None for stage in _CONTROL)
    return {stage: meta for stage, meta in found.items() if meta is not None and (has_control or stage not in _CONTROL)}


def _model_results(run: RunFolder, shapes: dict[Role, ModelConfig]) -> list[ModelResult]:
    evals = {role: read_eval(run.stage(_MODELS[role][1])) for role in shapes}
    teacher, pruned = evals[Role.teacher]["loss"], evals[Role.pruned]["loss"]
    gap = pruned - teacher
    return [
        ModelResult(
            role=role,
            num_parameters=num_parameters(shape),
            num_non_embedding=num_parameters(shape) - num_embedding_parameters(shape),
            gap_recovered=(pruned - evals[role]["loss"]) / gap if gap > 0 else None,
            **evals[role],
        )
        for role, shape in shapes.items()
    ]


def read_eval(folder: Path) -> dict[str, Any]:
    """What an eval stage measured.

    Raises:
        ArtefactError: It cannot be read.
    """
    path = folder / "eval.json"
    values = _read_json(path, folder.name)
    try:
        return {key: values[key] for key in ("loss", "perplexity", "num_tokens", "prompt", "sample")}
    except KeyError as error:
        raise _unreadable(path, folder.name, error) from error


def read_curve(folder: Path) -> TrainingCurve:
    """The metrics of a training stage.

    Raises:
        ArtefactError: There are none, or they cannot be read.
    """
    records = read_metrics(folder)
    path = folder / METRICS_FILE
    if not records:
        raise ArtefactError(f"{path} has no records; run `minitron {_verb(folder.name)}` again")
    try:
        validated = [r for r in records if r.get("heldout_loss") is not None]
        speeds = [r["tokens_per_s"] for r in records if "tokens_per_s" in r]
        terms = [text for key, text in _OBJECTIVES.items() if key in records[-1]]
        return TrainingCurve(
            objective=" + ".join(terms) or "training loss",
            tokens=[int(r["tokens"]) for r in records],
            loss=[float(r["loss"]) for r in records],
            heldout_tokens=[int(r["tokens"]) for r in validated],
            heldout_loss=[float(r["heldout_loss"]) for r in validated],
            tokens_per_s=statistics.median(speeds) if speeds else None,
        )
    except KeyError as error:
        raise _unreadable(path, folder.name, error) from error


def teacher_parameters(meta: dict[str, Any]) -> int:
    """Parameters of the teacher that ran beside a distilled student; 0 where a cache was read.

    Args:
        meta: The distillation's ``meta.json``.
    """
    return int(meta["summary"]["teacher_parameters"])


def _prune_result(run: RunFolder, metas: Metas) -> PruneResult:
    values, summary = metas["prune"]["values"], metas["prune"]["summary"]
    given = "spec" in metas["prune"]["inputs"]
    return PruneResult(
        source=read_model_config(run.stage("source")),
        target=read_model_config(run.stage("prune")),
        kept_layers=read_kept(run).layers,
        ranking="a given spec" if given else values.get("prune.ranking"),
        aggregation=values.get("prune.aggregation"),
        score_kept={size: summary[key] for key, size in _SCORE_KEPT.items() if key in summary},
        verification=_verification(metas["verify"]["summary"]),
    )


def _verification(summary: dict[str, Any]) -> str:
    """What the verify stage found."""
    finite = f"on {summary['tokens']} tokens of calibration text the pruned model's logits are finite"
    error = summary.get("masked_teacher_error")
    if error is None:
        return f"{finite}; masked teacher {summary['masked_teacher']}"
    return f"{finite}, and those of the teacher with the same units masked but for {error:.0e} of the largest logit"


def _cost(
    run: RunFolder,
    metas: dict[str, dict[str, Any]],
    shapes: dict[Role, ModelConfig],
    distill: TrainingCurve,
    baseline: TrainingCurve | None,
) -> Cost:
    student, source = (num_active_parameters(shapes[role]) for role in (Role.distilled, Role.teacher))
    teacher = teacher_parameters(metas["distill"])
    corrected = read_curve(run.stage("correct")).tokens[-1] if "correct" in metas else 0
    control = num_active_parameters(shapes[Role.baseline]) if baseline else 0
    tokens = distill.tokens[-1]
    return Cost(
        tokens=tokens,
        student_parameters=student,
        student_flops=six_nd(student, tokens),
        teacher_parameters=teacher,
        teacher_flops=two_nd(teacher, tokens),
        correction_tokens=corrected,
        source_parameters=source,
        correction_flops=six_nd(source, corrected),
        baseline_tokens=baseline.tokens[-1] if baseline else None,
        baseline_flops=six_nd(control, baseline.tokens[-1]) if baseline else None,
    )


def _export_result(folder: Path, meta: dict[str, Any]) -> ExportResult:
    hf = folder / "hf"
    if not hf.is_dir():
        raise ArtefactError(f"{folder} has no hf/ folder; run `minitron export` again")
    return ExportResult(
        size_bytes=sum(file.stat().st_size for file in hf.rglob("*") if file.is_file()),
        max_logit_error=meta["summary"].get("max_logit_error"),
    )


def _model_name(run: RunFolder, meta: dict[str, Any]) -> str:
    """What the import stage calls the model, else the source's own name for itself, else the run's name."""
    if meta["summary"].get("name"):
        return str(meta["summary"]["name"])
    path = run.stage("import") / "hf" / "config.json"
    name = _read_json(path, "import").get("_name_or_path") if path.is_file() else None
    return str(name or run.path.name)


def _compare_training(metas: Metas, distill: TrainingCurve, baseline: TrainingCurve | None) -> tuple[bool, list[str]]:
    """Whether student and control were trained alike, and a note of what differs."""
    if baseline is None:
        return False, []
    settings = [
        {key: value for key, value in metas[stage]["values"].items() if key.startswith(_TRAIN_PREFIX)}
        for stage in ("distill", "baseline")
    ]
    shared = settings[0].keys() & settings[1].keys()
    differ = [
        f"{key.removeprefix(_TRAIN_PREFIX)} ({settings[0][key]} and {settings[1][key]})"
        for key in sorted(shared)
        if settings[0][key] != settings[1][key]
    ]
    if distill.tokens[-1] != baseline.tokens[-1]:
        differ.insert(0, f"tokens ({distill.tokens[-1]:,} and {baseline.tokens[-1]:,})")
    if not differ:
        return True, []
    return False, [f"The student and the random-init control differ in {', '.join(differ)}: no like-for-like control."]


def _eval_notes(models: list[ModelResult]) -> list[str]:
    notes = []
    if len({model.num_tokens for model in models}) > 1:
        counts = ", ".join(f"{model.role.label} {model.num_tokens:,}" for model in models)
        notes.append(f"The held-out losses are means over different numbers of tokens: {counts}.")
    if models[0].gap_recovered is None:
        notes.append("The pruned model's held-out loss is not above the teacher's, so there is no gap to recover.")
    return notes


def _environment_notes(metas: Metas) -> list[str]:
    reference = metas["distill"]["environment"]
    others = [stage for stage, meta in metas.items() if meta["environment"] != reference]
    return [f"Made in another environment than the distillation: {', '.join(others)}."] if others else []


def _read_json(path: Path, stage: str) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(path, stage, error) from error
    return values


def _verb(stage: str) -> str:
    """The verb that runs a stage alone; those that only an ablation has are its own."""
    return _VERBS.get(stage, "ablate")


def _unreadable(path: Path, stage: str, error: Exception) -> ArtefactError:
    return ArtefactError(
        f"{path} cannot be read ({type(error).__name__}: {error}); run `minitron {_verb(stage)}` again"
    )


def _units(text: str) -> list[int]:
    """Unit numbers as a prune spec writes them: ``0-3,5`` is 0, 1, 2, 3, 5."""
    units: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        units.extend(range(int(first), int(last or first) + 1))
    return units
