"""Distillation of the pruned student: the losses, and where the teacher's signal comes from."""

import math
from dataclasses import dataclass, field

from minitron.config.intermediate import IntermediateConfig
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
class TeacherConfig:
    """The teacher and how it runs."""

    dtype: Dtype | None = None
    """Number format of the teacher; null takes ``precision.dtype``."""


@dataclass(kw_only=True)
class DistillConfig:
    """Distillation of the pruned student from the unpruned teacher."""

    train: TrainConfig = field(default_factory=TrainConfig)
    """Batch, schedule and optimizer."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """The teacher and how it runs."""
    cross_entropy: CrossEntropyMixConfig = field(default_factory=CrossEntropyMixConfig)
    """Cross-entropy with the labels, mixed in."""
    intermediate: IntermediateConfig = field(default_factory=IntermediateConfig)
    """Losses between hidden states inside the two models."""
    teacher_microbatches: int = 0
    """Most micro-batches whose teacher states wait at once; 0 holds a whole step's."""
