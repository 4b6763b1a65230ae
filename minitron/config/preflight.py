"""What `minitron preflight` asks of the machines before a run."""

import math
from dataclasses import dataclass

from minitron.errors import ConfigError


@dataclass(kw_only=True)
class PreflightConfig:
    """Limits of `minitron preflight`. No result depends on them."""

    timeout_s: int = 120
    """Longest wait for all ranks to meet, in seconds; of a SLURM job, half an hour at least."""
    message_mb: int = 64
    """Size of the message that bandwidths are measured with, in 10^6 bytes."""
    outlier_share: float = 0.5
    """A rank or a link that reaches less than this part of the median is named, and fails."""
    max_clock_skew_s: float = 1.0
    """Largest difference between a rank's clock and rank 0's."""
    min_free_gb: float = 1.0
    """Least space on the disk of the run folder, in 10^9 bytes."""

    def __post_init__(self) -> None:
        """Refuse values that cannot be."""
        for name in ("timeout_s", "message_mb"):
            if getattr(self, name) < 1:
                raise ConfigError(f"preflight.{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.outlier_share < 1:
            raise ConfigError(f"preflight.outlier_share={self.outlier_share} must lie in [0, 1), such as 0.5")
        for name in ("max_clock_skew_s", "min_free_gb"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ConfigError(f"preflight.{name}={value} must be a number of at least 0")
