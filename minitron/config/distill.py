"""Distillation of the pruned student: the losses, and where the teacher's signal comes from."""

import math
from dataclasses import dataclass, field
from enum import StrEnum

from minitron.config.intermediate import IntermediateConfig
from minitron.config.logit_loss import LogitLossConfig, LogitLossKind
from minitron.config.mixing import Mixing
from minitron.config.precision import Dtype, Fp8Recipe, PrecisionConfig
from minitron.config.train import TrainConfig
from minitron.errors import ConfigError


@dataclass(kw_only=True)
class CrossEntropyMixConfig:
    """Cross-entropy with the labels beside the logit loss; the papers' best recipe has none."""

    weight: float = 0.0
    """Weight of the cross-entropy; 0 leaves it out."""
    mixing: Mixing = Mixing.fixed
    """``fixed``: logit loss + weight x cross-entropy. ``scaled``: the cross-entropy is first brought to the size of
    the logit loss (its absolute value), by a detached factor of each micro-batch. ``cross_entropy_weight`` in the log
    is the mean over micro-batches of weight x factor; ``cross_entropy`` there is unweighted."""

    def __post_init__(self) -> None:
        """Refuse weights that cannot work."""
        if not (self.weight >= 0 and math.isfinite(self.weight)):
            raise ConfigError(f"distill.cross_entropy.weight={self.weight} must be a number of at least 0")


class TeacherSource(StrEnum):
    """Where the teacher's distributions come from (member names equal their values: OmegaConf reads the names)."""

    online = "online"
    cached = "cached"


@dataclass(kw_only=True)
class TeacherParallelConfig:
    """A layout of the teacher's own, on the student's ranks. What is left over after TP x PP is data-parallel."""

    tensor_model_parallel_size: int | None = None
    """Ranks that share every layer of the teacher; null takes the student's."""
    pipeline_model_parallel_size: int | None = None
    """Stages of the teacher; null takes the student's."""
    sequence_parallel: bool | None = None
    """Split the teacher's norms and residuals along the sequence (needs TP > 1, and experts over TP > 1 need it); null
    takes the student's where the teacher's TP is more than 1."""


@dataclass(kw_only=True)
class TeacherConfig:
    """The teacher and how it runs."""

    source: TeacherSource = TeacherSource.online
    """``online``: the teacher runs beside the student. ``cached``: what `minitron teacher-logits` wrote is read, and
    the teacher is not loaded."""
    cache: str | None = None
    """``source=cached``: the teacher_logits folder of another run, with the same data and teacher; null takes this
    run's own."""
    path: str | None = None
    """A checkpoint folder to learn from, such as runs/corrected/distill; null takes the run's own source."""
    dtype: Dtype | None = None
    """Number format of the teacher; null takes ``precision.dtype``."""
    fp8_recipe: Fp8Recipe | None = None
    """Run the linears of the teacher's layers in FP8, scaled so: tensorwise, blockwise or mxfp8. Which layers stay in
    bf16 is said by ``precision``; null is no FP8, whatever the student has."""
    parallel: TeacherParallelConfig = field(default_factory=TeacherParallelConfig)
    """The teacher's own layout; by default it has the student's."""
    micro_batch_size: int | None = None
    """Sequences in one forward pass of one data-parallel rank of the teacher; null takes the student's."""

    def __post_init__(self) -> None:
        """Refuse combinations that cannot work."""
        if self.cache is not None and self.source is not TeacherSource.cached:
            raise ConfigError(
                f"distill.teacher.cache={self.cache} is read by distill.teacher.source=cached only, and it is "
                f"{self.source}; set one of the two"
            )

    def precision(self, student: PrecisionConfig) -> PrecisionConfig:
        """The teacher's number formats, beside a student in these.

        Raises:
            ConfigError: They exclude each other.
        """
        return student.for_teacher(self.dtype, self.fp8_recipe)


@dataclass(kw_only=True)
class DistillConfig:
    """Distillation of the pruned student from the unpruned teacher."""

    train: TrainConfig = field(default_factory=TrainConfig)
    """Batch, schedule and optimizer."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """The teacher and how it runs."""
    logit_loss: LogitLossConfig = field(default_factory=LogitLossConfig)
    """Loss between the teacher's and the student's distributions."""
    cross_entropy: CrossEntropyMixConfig = field(default_factory=CrossEntropyMixConfig)
    """Cross-entropy with the labels, mixed in."""
    intermediate: IntermediateConfig = field(default_factory=IntermediateConfig)
    """Losses between hidden states inside the two models."""
    teacher_microbatches: int = 0
    """Most micro-batches whose teacher states wait at once; 0 holds a whole step's."""

    def __post_init__(self) -> None:
        """Refuse losses that a cached teacher cannot give.

        Raises:
            ConfigError: With the setting to change.
        """
        if self.teacher.source is not TeacherSource.cached:
            return
        if self.intermediate.enabled:
            raise ConfigError(
                "distill.intermediate needs the teacher's states, but distill.teacher.source=cached has none of them: "
                "leave distill.intermediate without pairs, or set distill.teacher.source=online"
            )
        loss = self.logit_loss
        for name, value, only in (
            ("kind", loss.kind, LogitLossKind.forward_kl),
            ("temperature", loss.temperature, 1.0),
            ("top_k", loss.top_k, 0),
        ):
            if value != only:
                raise ConfigError(
                    f"distill.logit_loss.{name}={value} needs the teacher's whole distributions, but "
                    f"distill.teacher.source=cached has a part of them: leave it {only} (what is kept is chosen by "
                    "teacher_logits.method), or set distill.teacher.source=online"
                )
