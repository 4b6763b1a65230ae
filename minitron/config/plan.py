"""What `minitron plan` assumes of the machine that the run will have."""

import math
from dataclasses import dataclass

from minitron.config.gpus import Gpu
from minitron.errors import ConfigError


@dataclass(kw_only=True)
class PlanConfig:
    """The machine that the figures of `minitron plan` are for. No result depends on it."""

    gpu: Gpu | None = None
    """Kind of GPU: its memory and peak; null is ``cluster.gpu``, and h100 where that is null too."""
    peak_tflops: float | None = None
    """Peak of one GPU in 10^12 FLOPs a second; null takes the data sheet's, dense, in ``precision.dtype``."""
    utilization: float = 0.4
    """Part of the peak that training reaches, by the FLOPs of the model (MFU)."""
    gpus_per_node: int | None = None
    """GPUs of one node; null is ``cluster.gpus_per_node``, and 8 where that is 0."""

    def __post_init__(self) -> None:
        """Refuse values that cannot be."""
        if self.peak_tflops is not None and not 0 < self.peak_tflops < math.inf:
            raise ConfigError(f"plan.peak_tflops={self.peak_tflops} must be a number above 0, or null")
        if not 0 < self.utilization <= 1:
            raise ConfigError(f"plan.utilization={self.utilization} must be above 0 and at most 1, such as 0.4")
        if self.gpus_per_node is not None and self.gpus_per_node < 1:
            raise ConfigError(f"plan.gpus_per_node={self.gpus_per_node} must be at least 1")
