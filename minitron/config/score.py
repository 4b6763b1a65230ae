"""What the calibration pass measures: which aggregations of which activations."""

from dataclasses import dataclass, field
from enum import StrEnum

from minitron.errors import ConfigError


class Reduction(StrEnum):
    """One way to make one number of a list s_1 .. s_n (paper 1, section 2.2)."""

    mean = "mean"
    """``(1/n) sum |s_i|``: the mean of absolute values, called just mean in the paper."""
    l2 = "l2"
    """``sqrt(sum s_i^2)``."""
    var = "var"
    """``(1/n) sum (s_i - mean(s))^2``, the mean here being of signed values."""


class Aggregation(StrEnum):
    """A pair (batch, sequence) of reductions, in the order of the paper's Table 13.

    The sequence reduction makes one number per sample; the batch reduction then makes one number of
    all samples.
    """

    mean_mean = "mean_mean"
    mean_l2 = "mean_l2"
    mean_var = "mean_var"
    l2_mean = "l2_mean"
    l2_l2 = "l2_l2"
    l2_var = "l2_var"
    var_mean = "var_mean"
    var_l2 = "var_l2"
    var_var = "var_var"

    @property
    def batch(self) -> Reduction:
        """Reduction over samples."""
        return Reduction(self.value.split("_")[0])

    @property
    def seq(self) -> Reduction:
        """Reduction over the positions of one sample."""
        return Reduction(self.value.split("_")[1])


class HeadNorm(StrEnum):
    """Where the L2 norm over the channels of one head is taken.

    ``token`` is paper 1's formula: the norm of each token's head output, then the aggregation.
    ``channel`` is NVIDIA Model-Optimizer's: each channel is aggregated by itself, then the norm is
    taken over the head's channels. The two rank heads differently.
    """

    token = "token"
    channel = "channel"


@dataclass(kw_only=True)
class ScoreConfig:
    """One calibration pass, forward only, which scores every axis at once."""

    num_samples: int = 1024
    """Calibration sequences, over all data-parallel ranks (paper 1, section 4: 1024)."""
    micro_batch_size: int = 1
    """Sequences in one forward pass of one data-parallel rank; the scores do not depend on it."""
    aggregations: list[Aggregation] = field(default_factory=lambda: [Aggregation.l2_mean])
    """Aggregations to save; pruning picks one. Paper 1's Table 13 chooses (batch=l2, seq=mean)."""
    head_norm: HeadNorm = HeadNorm.token
    """Norm over a head's channels: per token (paper 1), or of aggregated channels (ModelOpt)."""

    def __post_init__(self) -> None:
        """Check every value by itself."""
        for name in ("num_samples", "micro_batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"score.{name}={getattr(self, name)} must be at least 1")
        if not self.aggregations:
            raise ConfigError("score.aggregations=[] saves no scores; name at least one, such as l2_mean")
        names = [a.value for a in self.aggregations]
        if len(set(names)) < len(names):
            raise ConfigError(f"score.aggregations={names} names one twice; name each once")
