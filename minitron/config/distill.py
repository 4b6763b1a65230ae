"""Distillation of the pruned student: the losses, and where the teacher's signal comes from."""

import math
from dataclasses import dataclass, field

from minitron.config.intermediate import IntermediateConfig
from minitron.config.logit_loss import LogitLossConfig
from minitron.config.mixing import Mixing
from minitron.config.precision import Dtype
from minitron.config.train import TrainConfig
from minitron.errors import ConfigError


@dataclass(kw_only=True)
class CrossEntropyMixConfig:
    """Cross-entropy with the labels beside the logit loss; the papers' best recipe has none."""

    weight: float = 0.0
    """Weight of the cross-entropy; 0 leaves it out."""
    mixing: Mixing = Mixing.fixed
    """``fixed``: logit loss + weight x cross-entropy. ``scaled``: the cross-entropy is first brought to the size of
    the logit loss, by a detached factor of each micro-batch."""

    def __post_init__(self) -> None:
        """Refuse weights that cannot work."""
        if not (self.weight >= 0 and math.isfinite(self.weight)):
            raise ConfigError(f"distill.cross_entropy.weight={self.weight} must be a number of at least 0")


@dataclass(kw_only=True)
class TeacherParallelConfig:
    """A layout of the teacher's own, on the student's ranks. What is left over after TP x PP is data-parallel."""

    tensor_model_parallel_size: int | None = None
    """Ranks that share every layer of the teacher; null takes the student's."""
    pipeline_model_parallel_size: int | None = None
    """Stages of the teacher; null takes the student's."""


@dataclass(kw_only=True)
class TeacherConfig:
    """The teacher and how it runs."""

    path: str | None = None
    """A checkpoint folder to learn from, such as runs/corrected/distill; null takes the run's own source."""
    dtype: Dtype | None = None
    """Number format of the teacher; null takes ``precision.dtype``."""
    parallel: TeacherParallelConfig = field(default_factory=TeacherParallelConfig)
    """The teacher's own layout; by default it has the student's."""
    micro_batch_size: int | None = None
    """Sequences in one forward pass of one data-parallel rank of the teacher; null takes the student's."""


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
