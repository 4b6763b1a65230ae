"""The numbers of a report, and ``report.json``, their machine-readable form."""

import json
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

from minitron.config.model import ModelConfig
from minitron.data.summary import SplitSummary
from minitron.errors import ArtefactError

FORMAT = 2
JSON_FILE = "report.json"
HTML_FILE = "report.html"


class Role(StrEnum):
    """The models of a run, in the order of the table."""

    teacher = "teacher"
    corrected = "corrected"
    pruned = "pruned"
    distilled = "distilled"
    baseline = "baseline"

    @property
    def label(self) -> str:
        """Name in tables and plots."""
        return {
            Role.teacher: "teacher",
            Role.corrected: "teacher, corrected",
            Role.pruned: "pruned",
            Role.distilled: "pruned + distilled",
            Role.baseline: "random init",
        }[self]


@dataclass(frozen=True, kw_only=True)
class ModelResult:
    """One row of the table.

    Attributes:
        role: Which model.
        num_parameters: All parameters, a tied embedding counted once.
        num_non_embedding: Those without a vocabulary dimension.
        loss: Held-out cross-entropy in nats per token.
        perplexity: exp(loss).
        num_tokens: Held-out tokens the loss is the mean of.
        gap_recovered: (pruned - this) / (pruned - teacher) of the losses; None when pruning lost nothing.
        prompt: Start of the sample.
        sample: What the model wrote.
    """

    role: Role
    num_parameters: int
    num_non_embedding: int
    loss: float
    perplexity: float
    num_tokens: int
    gap_recovered: float | None
    prompt: str
    sample: str


@dataclass(frozen=True, kw_only=True)
class TrainingCurve:
    """One training run over its tokens.

    Attributes:
        objective: What was minimised.
        tokens: Tokens trained on at each logged step.
        loss: The objective there, nats per token.
        heldout_tokens: Tokens trained on at each validation.
        heldout_loss: Held-out cross-entropy there, nats per token.
        tokens_per_s: Median speed, None if not recorded.
    """

    objective: str
    tokens: list[int]
    loss: list[float]
    heldout_tokens: list[int]
    heldout_loss: list[float]
    tokens_per_s: float | None


@dataclass(frozen=True, kw_only=True)
class PruneResult:
    """What was pruned.

    Attributes:
        source: Shape before.
        target: Shape after.
        kept_layers: The layers that stayed, counted from 0.
        ranking: How units were ranked.
        aggregation: Which aggregation of the scores ranked them.
        score_kept: Share of the sum of scores that an axis kept, by `minitron.config.prune.SIZES`; no entry for an axis
            that stayed whole or was not ranked by scores.
        verification: What the verify stage found, in a sentence.
    """

    source: ModelConfig
    target: ModelConfig
    kept_layers: list[int]
    ranking: str | None
    aggregation: str | None
    score_kept: dict[str, float]
    verification: str

    @property
    def dropped_layers(self) -> list[int]:
        """Layers of the source that are gone."""
        return sorted(set(range(self.source.num_layers)) - set(self.kept_layers))


@dataclass(frozen=True, kw_only=True)
class StageTime:
    """Wall time of a finished stage."""

    name: str
    seconds: float
    finished: str


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What retraining took, by the papers' rule; evaluation and scoring are left out.

    Attributes:
        tokens: Tokens D the student was distilled on.
        student_parameters: N of the student that a token is computed with.
        student_flops: 6 N D, forward and backward of the student.
        teacher_parameters: N_t of the teacher that ran beside the student; 0 where a cache was read, whose making
            is not counted.
        teacher_flops: 2 N_t D, forward of the teacher.
        correction_tokens: Tokens D_c the teacher was corrected on; 0 without correction.
        source_parameters: N_0 of the unpruned model, that a token is computed with.
        correction_flops: 6 N_0 D_c, forward and backward of the corrected model.
        baseline_tokens: Tokens of the random-init control, None without it.
        baseline_flops: 6 N D of the control, None without it.
    """

    tokens: int
    student_parameters: int
    student_flops: float
    teacher_parameters: int
    teacher_flops: float
    correction_tokens: int
    source_parameters: int
    correction_flops: float
    baseline_tokens: int | None
    baseline_flops: float | None


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """The exported Hugging Face folder.

    Attributes:
        size_bytes: Size of all its files.
        max_logit_error: Largest difference to our logits after reloading, relative to the largest logit.
    """

    size_bytes: int
    max_logit_error: float | None


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """Everything in a report except the scores, which only the plots show.

    Attributes:
        run_dir: Folder of the run.
        model_name: Name of the source model.
        models: Rows of the table; no row for a control that was not trained.
        distill: Training curve of the student.
        baseline: Training curve of the control, None without it.
        same_training: Whether the control had the student's tokens and training settings.
        prune: What was pruned.
        data: Size of each split.
        stages: Wall times, in the order of the stages.
        cost: Tokens and FLOPs.
        export: The exported folder.
        environment: What the student was trained with.
        notes: What a reader must know to read the numbers rightly.
    """

    run_dir: Path
    model_name: str
    models: list[ModelResult]
    distill: TrainingCurve
    baseline: TrainingCurve | None
    same_training: bool
    prune: PruneResult
    data: dict[str, SplitSummary]
    stages: list[StageTime]
    cost: Cost
    export: ExportResult
    environment: dict[str, str]
    notes: list[str]

    @property
    def html_path(self) -> Path:
        """Place of the page in the finished report stage."""
        return self.run_dir / "report" / HTML_FILE

    @property
    def export_path(self) -> Path:
        """Place of the exported Hugging Face folder."""
        return self.run_dir / "export" / "hf"

    def result(self, role: Role) -> ModelResult | None:
        """The row of one model, None if it has none."""
        return next((model for model in self.models if model.role is role), None)

    def row(self, role: Role) -> ModelResult:
        """The row of a model that every report has."""
        found = self.result(role)
        assert found is not None, role
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready values; the run's place is left out, for the folder may move."""
        values = {"format": FORMAT, **asdict(self)}
        del values["run_dir"]
        prune = {"source": self.prune.source.to_dict(), "target": self.prune.target.to_dict()}
        values["prune"] |= {**prune, "dropped_layers": self.prune.dropped_layers}
        values["models"] = [{**model, "role": model["role"].value} for model in values["models"]]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, run_dir: Path) -> Self:
        """Inverse of `to_dict`."""
        prune = {key: value for key, value in values["prune"].items() if key != "dropped_layers"}
        prune |= {key: ModelConfig.from_dict(prune[key]) for key in ("source", "target")}
        baseline = values["baseline"]
        return cls(
            run_dir=run_dir,
            model_name=values["model_name"],
            models=[ModelResult(**{**model, "role": Role(model["role"])}) for model in values["models"]],
            distill=TrainingCurve(**values["distill"]),
            baseline=None if baseline is None else TrainingCurve(**baseline),
            same_training=values["same_training"],
            prune=PruneResult(**prune),
            data={split: SplitSummary(**size) for split, size in values["data"].items()},
            stages=[StageTime(**stage) for stage in values["stages"]],
            cost=Cost(**values["cost"]),
            export=ExportResult(**values["export"]),
            environment=values["environment"],
            notes=values["notes"],
        )


def load_report(folder: Path) -> ReportData:
    """Read ``report.json`` of a finished report stage, so that its table can be shown again.

    Args:
        folder: ``<run>/report``.

    Raises:
        ArtefactError: The file is missing, of another format, or cannot be read.
    """
    path = folder / JSON_FILE
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise ArtefactError(
                f"{path}: report format {values['format']} is not {FORMAT}, which this version reads; "
                "run `minitron report` again"
            )
        return ReportData.from_dict(values, run_dir=folder.parent)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtefactError(
            f"{path} is no readable report ({type(error).__name__}: {error}); run `minitron report` again"
        ) from error
