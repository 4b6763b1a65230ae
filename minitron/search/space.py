"""The candidates: every shape of the grid that can be made, run fast, passes the filter and meets the budget."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace

from minitron.config.fp8 import check_fp8_model
from minitron.config.model import ModelConfig
from minitron.config.parallel import ParallelConfig, check_layout
from minitron.config.precision import PrecisionConfig
from minitron.config.prune import DENSE_SIZES, PruneConfig, check_target
from minitron.config.search import COSTS, BoundsConfig, SearchConfig
from minitron.errors import ConfigError, LayoutError, PruneError
from minitron.models.axes import num_embedding_parameters, num_parameters
from minitron.search.roofline import matrix_parameters, memory_bytes, roofline_ms

_NEAREST_SHOWN = 3

Latency = Callable[[ModelConfig], float]
"""Milliseconds of a model's batch."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a shape costs; see `config.search.BudgetConfig`. ``latency_ms`` is None until it has been measured."""

    parameters: int
    non_embedding: int
    active_parameters: int
    memory_gb: float
    latency_ms: float | None


@dataclass(frozen=True)
class Candidate:
    """One shape of the grid.

    Attributes:
        model: The architecture.
        costs: What it costs.
    """

    model: ModelConfig
    costs: Costs

    @property
    def name(self) -> str:
        """Its sizes, also the name of its folder: layers, hidden, ffn, query heads, query groups."""
        model = self.model
        return (
            f"L{model.num_layers}-h{model.hidden_size}-f{model.ffn_hidden_size}"
            f"-a{model.num_attention_heads}-g{model.num_query_groups}"
        )

    def prune(self, config: PruneConfig) -> PruneConfig:
        """The prune section that makes it."""
        sizes = {name: getattr(self.model, name) for name in DENSE_SIZES}
        if config.drop_layers is not None:
            sizes["num_layers"] = None  # their list says how many
        return replace(config, **sizes)


@dataclass
class Space:
    """What became of a grid.

    Attributes:
        num_points: Points of the grid.
        candidates: Those that are left, in the grid's order.
        dropped: How many fell to what.
        example: For each reason, the first point that fell to it and why.
        beside: Points that only the budget refuses: how far outside, relative to the limits, the point, and why.
    """

    num_points: int = 0
    candidates: list[Candidate] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    example: dict[str, str] = field(default_factory=dict)
    beside: list[tuple[float, str, str]] = field(default_factory=list)

    def drop(self, reason: str, example: str) -> None:
        """Count a point that fell."""
        self.dropped[reason] += 1
        self.example.setdefault(reason, example)

    @property
    def reasons(self) -> str:
        """The counts in words, the largest first."""
        return ", ".join(f"{number} by {reason}" for reason, number in self.dropped.most_common())


def enumerate_space(
    source: ModelConfig,
    prune: PruneConfig,
    search: SearchConfig,
    parallel: ParallelConfig,
    latency: Latency | None,
    *,
    precision: PrecisionConfig | None = None,
) -> Space:
    """Go through the grid.

    Args:
        source: The model to prune.
        prune: Sizes of the axes that the grid leaves out.
        search: Grid, budget, divisors, filter.
        parallel: The layout that candidates are trained in.
        latency: Milliseconds of a shape; None while they are not measured: what asks for them is left undecided then.
        precision: Number formats that candidates are trained in; None for any without FP8.
    """
    space, condition = Space(), search.condition()
    undecided = {"latency_ms"} if latency is None else set()
    if condition is not None and condition.names & undecided:
        condition = None
    for sizes in _grid(search):
        space.num_points += 1
        model = _make(source, prune, sizes, parallel, precision or PrecisionConfig(), space)
        if model is None or not _divides(model, search, space):
            continue
        candidate = Candidate(model, _costs(model, search, latency))
        values = {name: getattr(model, name) for name in (*DENSE_SIZES, "kv_channels", "vocab_size")}
        values |= {name: value for name, value in asdict(candidate.costs).items() if value is not None}
        if condition is not None and not condition.holds(values):
            space.drop("search.filter", candidate.name)
            continue
        if _meets(candidate, search, space):
            space.candidates.append(candidate)
    return space


def roofline(search: SearchConfig) -> Latency:
    """Latency by the roofline of ``search.latency.gpu``."""
    return lambda model: roofline_ms(model, search.serving, search.latency.gpu)


def require_candidates(space: Space, search: SearchConfig) -> list[Candidate]:
    """The candidates of a search that can start.

    Raises:
        ConfigError: There are none (the message has the nearest shapes), or more than ``search.max_candidates``.
    """
    number = len(space.candidates)
    if number > search.max_candidates:
        raise ConfigError(
            f"search: {number} shapes of {space.num_points} meet the budget, more than search.max_candidates="
            f"{search.max_candidates}; narrow search.grid or search.budget, or raise it"
        )
    if number:
        return space.candidates
    if space.beside:
        nearest = "; ".join(f"{name} ({why})" for _, name, why in sorted(space.beside)[:_NEAREST_SHOWN])
        raise ConfigError(
            f"search: no shape of {space.num_points} meets search.budget; nearest: {nearest}; change search.budget or "
            "search.grid"
        )
    [(reason, _)] = space.dropped.most_common(1)
    raise ConfigError(
        f"search: no shape of {space.num_points} is left ({space.reasons}), for instance {space.example[reason]}"
    )


def _grid(search: SearchConfig) -> Iterator[dict[str, float]]:
    """Every combination of the axes that are given, as sizes by name; ``ffn_factor`` is one of the names."""
    axes = {name: sizes for name, sizes in asdict(search.grid).items() if sizes}
    for combination in itertools.product(*axes.values()):
        yield dict(zip(axes, combination, strict=True))


def _make(
    source: ModelConfig,
    prune: PruneConfig,
    sizes: dict[str, float],
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    space: Space,
) -> ModelConfig | None:
    """The pruned architecture at a point of the grid, if it can be made and trained."""
    shown = " ".join(f"{name}={size:g}" for name, size in sizes.items())
    factor = sizes.pop("ffn_factor", None)
    if factor is not None:
        ffn = factor * sizes.get("hidden_size", prune.hidden_size or source.hidden_size)
        if round(ffn) != ffn:
            space.drop("an ffn_factor that gives no whole size", f"{shown}: {ffn:g} neurons")
            return None
        sizes["ffn_hidden_size"] = ffn
    target = replace(prune, **{name: int(size) for name, size in sizes.items()})  # type: ignore[arg-type]
    try:
        model = check_target(source, target)
    except PruneError as error:
        space.drop("not fitting the source", f"{shown}: {error}")
        return None
    try:
        check_layout(model, parallel, who="candidate")
    except LayoutError as error:
        space.drop("not fitting the layout", f"{shown}: {error}")
        return None
    try:
        check_fp8_model(model, precision, parallel, who="candidate")
    except LayoutError as error:
        space.drop(f"not fitting FP8 ({precision.fp8_recipe})", f"{shown}: {error}")
        return None
    return model


def _divides(model: ModelConfig, search: SearchConfig, space: Space) -> bool:
    """Whether every size is a multiple of what it should be."""
    divisors, ranks = search.divisors, search.serving.tensor_model_parallel_size
    for name in DENSE_SIZES:
        size, divisor = getattr(model, name), getattr(divisors, name)
        if size % divisor:
            space.drop(f"search.divisors.{name}", f"{name}={size} is no multiple of {divisor}")
            return False
    rows = {
        "hidden_size": (model.hidden_size, 1),
        "ffn_hidden_size": (model.ffn_hidden_size, ranks),
        "num_attention_heads x kv_channels": (model.num_attention_heads * model.kv_channels, ranks),
        "num_query_groups x kv_channels": (model.num_query_groups * model.kv_channels, ranks),
    }
    for name, (size, parts) in rows.items():
        if size % (parts * divisors.per_rank):
            space.drop(
                "search.divisors.per_rank",
                f"{name}={size} over {parts} ranks is no multiple of {divisors.per_rank} on each",
            )
            return False
    return True


def _costs(model: ModelConfig, search: SearchConfig, latency: Latency | None) -> Costs:
    total = num_parameters(model)
    return Costs(
        parameters=total,
        non_embedding=total - num_embedding_parameters(model),
        active_parameters=matrix_parameters(model),
        memory_gb=memory_bytes(model, search.serving) / 1e9,
        latency_ms=None if latency is None else latency(model),
    )


def _meets(candidate: Candidate, search: SearchConfig, space: Space) -> bool:
    """Whether all costs are within their limits; the first that is not names the reason."""
    outside: list[tuple[float, str, str]] = []
    for cost in COSTS:
        value, bounds = getattr(candidate.costs, cost), getattr(search.budget, cost)
        if value is not None and (side := _outside(value, bounds)) is not None:
            which, limit = side
            why = f"{cost}={value:.4g} is {'below' if which == 'min' else 'above'} {limit:.4g}"
            outside.append((abs(value - limit) / max(limit, 1e-12), f"search.budget.{cost}.{which}", why))
    if not outside:
        return True
    _, reason, _ = outside[0]
    space.drop(reason, candidate.name)
    space.beside.append((sum(far for far, *_ in outside), candidate.name, ", ".join(why for *_, why in outside)))
    return False


def _outside(value: float, bounds: BoundsConfig) -> tuple[str, float] | None:
    """The limit that a cost is beyond."""
    if bounds.min is not None and value < bounds.min:
        return "min", bounds.min
    if bounds.max is not None and value > bounds.max:
        return "max", bounds.max
    return None
