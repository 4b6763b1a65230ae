"""Least-squares reconstruction: the kept weights, made to fit what was cut away."""

import math
from dataclasses import dataclass, field
from enum import StrEnum

from minitron.errors import ConfigError


class Linear(StrEnum):
    """The linears that can be fitted, by Megatron's names; all but the last are in every layer."""

    linear_qkv = "linear_qkv"
    """Reads the normed hidden channels; fitted to the source's queries, keys and values."""
    linear_proj = "linear_proj"
    """Writes the heads into the residual stream; fitted to the source's stream behind it."""
    linear_fc1 = "linear_fc1"
    """Reads the normed hidden channels; fitted to the source's gate and up projections."""
    linear_fc2 = "linear_fc2"
    """Writes the neurons into the residual stream; fitted to the source's stream behind it."""
    output_layer = "output_layer"
    """Reads the final normed hidden channels; fitted to the source's logits. Where it is tied to the embedding both
    stay as they were sliced, and the final norm's weight is fitted to the logits instead."""


@dataclass(kw_only=True)
class ReconstructConfig:
    """Fit the kept weights to the source on calibration text, in closed form, layer by layer."""

    enabled: bool = True
    """Fit; false slices only, as the papers do."""
    num_samples: int = 64
    """Calibration sequences, over all ranks: the first of the training split that the run's seed gives."""
    micro_batch_size: int = 4
    """Sequences in one forward pass of one rank; the result does not depend on it."""
    damping: float = 0.1
    """Pulls towards the sliced weights; in units of the mean square of a linear's inputs."""
    modules: list[Linear] = field(default_factory=lambda: list(Linear))
    """What to fit."""

    def __post_init__(self) -> None:
        """Check every value by itself."""
        for name in ("num_samples", "micro_batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"prune.reconstruct.{name}={getattr(self, name)} must be at least 1")
        if not (self.damping > 0 and math.isfinite(self.damping)):
            raise ConfigError(f"prune.reconstruct.damping={self.damping} must be a number above 0, such as 0.1")
        names = [module.value for module in self.modules]
        if not names or len(set(names)) < len(names):
            raise ConfigError(
                f"prune.reconstruct.modules={names} must name each linear once, at least one of "
                f"{', '.join(Linear)}; prune.reconstruct.enabled=false fits none"
            )
