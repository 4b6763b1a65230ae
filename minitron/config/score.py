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


class FfnActivation(StrEnum):
    """On which side of the activation function a neuron is seen.

    ``after`` is the input of the second linear, the gate's product included, as in NVIDIA Model-Optimizer. ``before``
    is paper 1's formula, the output of the first linear; of a gated ffn the gate's half, which the function is
    applied to.
    """

    before = "before"
    after = "after"


class DepthMetric(StrEnum):
    """What the loss of a layer, or of a block of contiguous layers, is measured by; higher is more important."""

    block_importance = "block_importance"
    """``1 - E[cos(input of the first layer, output of the last)]``: needs no run without the layers."""
    loss = "loss"
    """Cross-entropy on calibration text without the layers, nats per token: the log of the perplexity."""
    logit_mse = "logit_mse"
    """Mean squared difference between the logits with and without the layers."""
    accuracy = "accuracy"
    """Share of multiple-choice questions that are answered wrong without the layers."""


@dataclass(kw_only=True)
class DepthScoreConfig:
    """What is measured by taking layers out of the model: what ``prune`` asks for, and what is named here."""

    metrics: list[DepthMetric] = field(default_factory=list)
    """Metrics to save besides prune.depth_metric. Block importance of single layers is always saved, at no cost."""
    blocks: list[int] = field(default_factory=list)
    """Sizes of contiguous blocks to measure for every metric, besides single layers and what prune asks for."""
    num_samples: int = 32
    """Calibration sequences; each costs about half a forward pass per layer of the model."""
    questions: str | None = None
    """For ``accuracy``: a JSONL file of {context, choices, answer}; the choice of highest summed log-likelihood wins.
    ``answer`` is a place in ``choices``, from 0; ``context`` may be a list with one text for each choice."""

    def __post_init__(self) -> None:
        """Check every value by itself."""
        if self.num_samples < 1:
            raise ConfigError(f"score.depth.num_samples={self.num_samples} must be at least 1")
        if any(size < 1 for size in self.blocks):
            raise ConfigError(f"score.depth.blocks={list(self.blocks)} must be numbers of layers, at least 1")
        for name in ("metrics", "blocks"):
            values = [str(value) for value in getattr(self, name)]
            if len(set(values)) < len(values):
                raise ConfigError(f"score.depth.{name}=[{', '.join(values)}] names one twice; name each once")


@dataclass(kw_only=True)
class ScoreConfig:
    """One calibration pass, forward only, which scores every axis at once."""

    num_samples: int = 1024
    """Calibration sequences, over all data-parallel ranks (paper 1, section 4: 1024)."""
    seq_length: int | None = None
    """Tokens of a calibration sequence, packed documents as in training; null takes ``data.seq_length``."""
    micro_batch_size: int = 1
    """Sequences in one forward pass of one data-parallel rank; the scores do not depend on it."""
    aggregations: list[Aggregation] = field(default_factory=lambda: [Aggregation.l2_mean])
    """Aggregations to save; pruning picks one. Paper 1's Table 13 chooses (batch=l2, seq=mean)."""
    head_norm: HeadNorm = HeadNorm.token
    """Norm over a head's channels: per token (paper 1), or of aggregated channels (ModelOpt)."""
    ffn_activation: FfnActivation = FfnActivation.after
    """See neurons before or after the activation function."""
    rounds: int = 1
    """Rounds of scoring, each after a cut of the width that goes on equally to the shape of ``prune`` (paper 1,
    section 2.2, which finds no gain in it). Above 1 the scores are for that shape only."""
    depth: DepthScoreConfig = field(default_factory=DepthScoreConfig)

    def __post_init__(self) -> None:
        """Check every value by itself."""
        for name in ("num_samples", "seq_length", "micro_batch_size", "rounds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"score.{name}={value} must be at least 1")
        if not self.aggregations:
            raise ConfigError("score.aggregations=[] saves no scores; name at least one, such as l2_mean")
        names = [a.value for a in self.aggregations]
        if len(set(names)) < len(names):
            raise ConfigError(f"score.aggregations={names} names one twice; name each once")
