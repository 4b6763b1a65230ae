"""`minitron search`: a grid of shapes, a budget, and how the shapes that meet it are compared."""

import math
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum

from minitron.config.expression import Condition
from minitron.config.gpus import GPUS, Gpu
from minitron.config.prune import DENSE_SIZES
from minitron.config.train import TrainConfig
from minitron.errors import ConfigError

COSTS = ("parameters", "non_embedding", "active_parameters", "memory_gb", "latency_ms")
"""What a budget limits."""

FILTER_NAMES = (*DENSE_SIZES, "kv_channels", "vocab_size", *COSTS)
"""What ``search.filter`` may name."""

SEARCH = "search"
"""What a job is asked for to run a whole search; each stage of one has this as its folder."""

RESULT = f"{SEARCH}/result"
"""The stage that compares the candidates, the last of a search."""

PAPER_STEPS = 400
"""Optimizer steps of a candidate's distillation in arXiv 2407.14679, section 4.3."""

_VALIDATIONS = 4
"""Validations of a candidate, evenly spaced: with the papers' 400 steps the last two are at 300, where rankings are
said to settle, and at 400."""


@dataclass(kw_only=True)
class GridConfig:
    """Sizes to combine; an axis without any has the size that ``prune`` gives it (null: the source's)."""

    num_layers: list[int] = field(default_factory=list)
    """Numbers of layers."""
    hidden_size: list[int] = field(default_factory=list)
    """Hidden sizes."""
    ffn_hidden_size: list[int] = field(default_factory=list)
    """Ffn neurons per layer; give these or `ffn_factor`."""
    ffn_factor: list[float] = field(default_factory=list)
    """Ffn neurons per layer as multiples of the hidden size, as in the papers."""
    num_attention_heads: list[int] = field(default_factory=list)
    """Numbers of query heads."""
    num_query_groups: list[int] = field(default_factory=list)
    """Numbers of query groups (key and value heads)."""

    def __post_init__(self) -> None:
        """Check every value by itself."""
        for axis in fields(self):
            sizes = getattr(self, axis.name)
            if any(not size > 0 or not math.isfinite(size) for size in sizes):
                raise ConfigError(f"search.grid.{axis.name}={list(sizes)} must have numbers above 0 only")
            if len(set(sizes)) < len(sizes):
                raise ConfigError(f"search.grid.{axis.name}={list(sizes)} names a size twice; name each once")
        if self.ffn_hidden_size and self.ffn_factor:
            raise ConfigError("search.grid has both ffn_hidden_size and ffn_factor; leave one of them empty")

    @property
    def is_empty(self) -> bool:
        """Whether no axis is given: there is nothing to search."""
        return not any(getattr(self, axis.name) for axis in fields(self))


@dataclass(kw_only=True)
class BoundsConfig:
    """Limits of one cost, both included; null is none."""

    min: float | None = None
    """The least allowed."""
    max: float | None = None
    """The most allowed."""


@dataclass(kw_only=True)
class BudgetConfig:
    """What every candidate must keep to."""

    parameters: BoundsConfig = field(default_factory=BoundsConfig)
    """All parameters, a tied embedding counted once; the papers: the target -5 % and +5 %."""
    non_embedding: BoundsConfig = field(default_factory=BoundsConfig)
    """Parameters without embedding and output layer."""
    active_parameters: BoundsConfig = field(default_factory=BoundsConfig)
    """Parameters that a token is multiplied with: without an untied input embedding, which is looked up."""
    memory_gb: BoundsConfig = field(default_factory=BoundsConfig)
    """Weights and key-value cache of ``search.serving``, in 10^9 bytes over all of its ranks."""
    latency_ms: BoundsConfig = field(default_factory=BoundsConfig)
    """Time of one batch of ``search.serving``, prompt and new tokens, by ``search.latency``."""

    def __post_init__(self) -> None:
        """Check that something is left between the limits."""
        for cost in COSTS:
            bounds: BoundsConfig = getattr(self, cost)
            least, most = bounds.min or 0.0, math.inf if bounds.max is None else bounds.max
            if not 0 <= least <= most:
                raise ConfigError(
                    f"search.budget.{cost}: min={bounds.min} and max={bounds.max} leave nothing; min must be at least "
                    "0 and not above max"
                )


@dataclass(kw_only=True)
class DivisorsConfig:
    """What sizes must be multiples of, so that kernels run well."""

    num_layers: int = 1
    """Divisor of the number of layers, such as the pipeline stages of the serving engine."""
    hidden_size: int = 1
    """Divisor of the hidden size."""
    ffn_hidden_size: int = 1
    """Divisor of the ffn neurons."""
    num_attention_heads: int = 1
    """Divisor of the query heads."""
    num_query_groups: int = 1
    """Divisor of the query groups."""
    per_rank: int = 1
    """Divisor of every matrix's rows and columns on one rank of ``search.serving.tensor_model_parallel_size``: 8 for
    bf16 tensor cores, 16 for FP8."""

    def __post_init__(self) -> None:
        """Refuse what divides nothing."""
        for axis in fields(self):
            if getattr(self, axis.name) < 1:
                raise ConfigError(f"search.divisors.{axis.name}={getattr(self, axis.name)} must be at least 1")


class ServingDtype(StrEnum):
    """Number format of weights and key-value cache where the candidate is served."""

    bf16 = "bf16"
    fp8 = "fp8"

    @property
    def num_bytes(self) -> int:
        """Bytes of one number."""
        return 1 if self is ServingDtype.fp8 else 2


@dataclass(kw_only=True)
class ServingConfig:
    """How a candidate would be served: what memory and latency are counted for."""

    batch_size: int = 1
    """Sequences at once."""
    prompt_tokens: int = 1024
    """Tokens of each prompt."""
    new_tokens: int = 128
    """Tokens generated for each; memory is that of the longest cache."""
    dtype: ServingDtype = ServingDtype.bf16
    """Number format of weights and cache; ``latency.source=measured`` runs in ``precision.dtype``."""
    tensor_model_parallel_size: int = 1
    """Ranks that share the model."""

    def __post_init__(self) -> None:
        """Check every value by itself."""
        for name, least in (
            ("batch_size", 1),
            ("prompt_tokens", 1),
            ("new_tokens", 0),
            ("tensor_model_parallel_size", 1),
        ):
            if getattr(self, name) < least:
                raise ConfigError(f"search.serving.{name}={getattr(self, name)} must be at least {least}")


class LatencySource(StrEnum):
    """Where latencies come from."""

    roofline = "roofline"
    measured = "measured"


@dataclass(kw_only=True)
class LatencyConfig:
    """Where latencies come from."""

    source: LatencySource = LatencySource.roofline
    """``roofline``: arithmetic and memory traffic over the peaks of `gpu`. ``measured``: a benchmark on this device,
    one layer of every width, in a stage of its own."""
    gpu: Gpu = Gpu.h100
    """The GPU of the roofline."""


@dataclass(kw_only=True)
class HalvingConfig:
    """Successive halving: candidates stop early, on one schedule, and the better part goes on."""

    rungs: int = 1
    """Times that candidates are compared; 1 trains every candidate to the end, as the papers do."""
    factor: int = 2
    """One in so many candidates goes on, each time to as many times the tokens."""

    def __post_init__(self) -> None:
        """Check every value by itself."""
        if self.rungs < 1:
            raise ConfigError(f"search.halving.rungs={self.rungs} must be at least 1")
        if self.factor < 2:
            raise ConfigError(f"search.halving.factor={self.factor} must be at least 2")


@dataclass(kw_only=True)
class SearchConfig:
    """`minitron search`: every shape of a grid that meets a budget is pruned, evaluated and distilled for a while."""

    grid: GridConfig = field(default_factory=GridConfig)
    """Sizes to combine."""
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    """What every candidate must keep to."""
    divisors: DivisorsConfig = field(default_factory=DivisorsConfig)
    """What sizes must be multiples of."""
    filter: str | None = None
    """A condition on sizes and costs, such as 'ffn_hidden_size <= 4 * hidden_size'."""
    serving: ServingConfig = field(default_factory=ServingConfig)
    """What memory and latency are counted for."""
    latency: LatencyConfig = field(default_factory=LatencyConfig)
    """Where latencies come from."""
    max_candidates: int = 20
    """More candidates than this are refused before any work."""
    distill_best: int | None = None
    """Candidates to distill, the best before any retraining; null is all of them, for that order misleads."""
    num_tokens: int | None = None
    """Tokens of a candidate's distillation; null is the papers' 400 steps of ``distill.train``'s batch."""
    lr_warmup_steps: int | None = None
    """Warm-up of a candidate's distillation; null takes ``distill.train``'s."""
    eval_tokens: int = 16_384
    """Held-out tokens that candidates are compared on."""
    halving: HalvingConfig = field(default_factory=HalvingConfig)
    """Stop the worse candidates early."""
    workers: int = 1
    """Candidates side by side, each on the ranks of ``parallel``: this machine has workers x ranks processes."""

    def __post_init__(self) -> None:
        """Check what concerns one value."""
        if self.filter is not None:
            self.condition()
        for name in ("max_candidates", "distill_best", "num_tokens", "eval_tokens", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"search.{name}={value} must be at least 1")
        if self.lr_warmup_steps is not None and self.lr_warmup_steps < 0:
            raise ConfigError(f"search.lr_warmup_steps={self.lr_warmup_steps} must be at least 0, or null")
        if self.latency.source is LatencySource.measured and self.serving.tensor_model_parallel_size > 1:
            raise ConfigError(
                f"search.latency.source=measured runs on one device, but search.serving.tensor_model_parallel_size="
                f"{self.serving.tensor_model_parallel_size}; set it to 1, or search.latency.source=roofline"
            )
        if self.serving.dtype not in GPUS[self.latency.gpu].tflops:
            raise ConfigError(
                f"search.latency.gpu={self.latency.gpu} has no {self.serving.dtype}; set search.serving.dtype=bf16, or "
                "another GPU"
            )

    def condition(self) -> Condition | None:
        """``filter``, parsed."""
        if self.filter is None:
            return None
        return Condition(self.filter, names=FILTER_NAMES, key="search.filter")


def candidate_training(train: TrainConfig, search: SearchConfig, *, seq_length: int) -> TrainConfig:
    """Batch, schedule and optimizer of a candidate's distillation.

    Args:
        train: The run's own, ``distill.train``.
        search: The search section.
        seq_length: Tokens of a sequence.
    """
    tokens = PAPER_STEPS * train.tokens_per_step(seq_length) if search.num_tokens is None else search.num_tokens
    settings = replace(train, num_tokens=tokens, eval_tokens=search.eval_tokens)
    if search.lr_warmup_steps is not None:
        settings = replace(settings, lr_warmup_steps=search.lr_warmup_steps, lr_warmup_tokens=0)
    return replace(settings, eval_interval_steps=max(1, settings.num_steps(seq_length) // _VALIDATIONS))


def rung_steps(num_steps: int, halving: HalvingConfig) -> list[int]:
    """Steps after which candidates are compared; the last is the whole schedule.

    Args:
        num_steps: Steps of the whole schedule.
        halving: How often, and by which factor.

    Raises:
        ConfigError: The first rung has less than a step, or two rungs are the same.

    >>> rung_steps(400, HalvingConfig(rungs=3, factor=2))
    [100, 200, 400]
    """
    steps = [-(-num_steps // halving.factor**below) for below in reversed(range(halving.rungs))]
    if len(set(steps)) < len(steps):
        raise ConfigError(
            f"search.halving: {num_steps} steps cannot be divided by {halving.factor} for {halving.rungs} rungs "
            f"(they would stop at {steps}); use fewer rungs, or raise search.num_tokens"
        )
    return steps
