"""What pruning aims at: the target shape, and how units are ranked."""

from dataclasses import dataclass, field, replace
from enum import StrEnum

from minitron.config.model import SHAPE, ModelConfig
from minitron.config.reconstruct import Linear, ReconstructConfig
from minitron.config.score import Aggregation, DepthMetric
from minitron.errors import ConfigError, PruneError

DENSE_SIZES = tuple(name for name in SHAPE if name != "kv_channels")
"""What pruning may change in every model; ``kv_channels`` stays."""

SIZES = (*DENSE_SIZES, "num_moe_experts")


class Ranking(StrEnum):
    """How the units of an axis are put in order."""

    importance = "importance"
    random = "random"


class DepthSelection(StrEnum):
    """Which sets of layers may go."""

    free = "free"
    """Those of lowest score, each measured by itself."""
    contiguous = "contiguous"
    """The block of lowest score, measured as a whole (arXiv 2408.11796, section 2.3)."""
    iterative = "iterative"
    """One at a time, the lowest of what is left, measured again after each."""


class HiddenNorm(StrEnum):
    """A norm whose output scores the channels of the residual stream, by Megatron's name."""

    input = "input_layernorm"
    pre_mlp = "pre_mlp_layernorm"
    final = "final_layernorm"


class HeadResidual(StrEnum):
    """What becomes of pruned query heads (paper 1, section 2.3): nothing, or a difference added to a kept head.

    With W the query projection of a kept head and V that of the pruned head it is paired with: ``paper`` makes
    ``W + (W - V)`` of it, as the formula is printed; ``laco`` makes ``W + (V - W)`` of it, the sign of Layer Collapse
    (arXiv 2402.11187), which the formula refers to.
    """

    none = "none"
    paper = "paper"
    laco = "laco"


@dataclass(kw_only=True)
class PruneConfig:
    """The target shape; a size left at null keeps the source's. ``kv_channels`` never changes."""

    num_layers: int | None = None
    """Layers to keep; those that `depth_metric` finds least important go, unless `drop_layers` names them."""
    hidden_size: int | None = None
    """Channels of the residual stream to keep, the same ones in the whole network."""
    ffn_hidden_size: int | None = None
    """Ffn neurons to keep in every layer, or in every expert, chosen for each by itself."""
    num_attention_heads: int | None = None
    """Query heads to keep in every layer, as many in each query group."""
    num_query_groups: int | None = None
    """Query groups (key and value heads) to keep in every layer, chosen per layer."""
    num_moe_experts: int | None = None
    """Experts to keep in every layer of a mixture of experts, chosen per layer."""
    drop_layers: list[int] | None = None
    """Layers to drop by number, counted from 0 (the papers count from 1)."""
    depth_metric: DepthMetric = DepthMetric.block_importance
    """What tells which layers go."""
    depth_selection: DepthSelection = DepthSelection.free
    """Any layers, one contiguous block, or one layer after the other."""
    hidden_norms: list[HiddenNorm] = field(default_factory=lambda: [HiddenNorm.input, HiddenNorm.pre_mlp])
    """Norms over whose outputs a channel's score is summed: of all layers, and the final one if named."""
    scores: str | None = None
    """Folder of scores to rank by: another run's score stage on the same source; null takes this run's."""
    ranking: Ranking = Ranking.importance
    """``importance`` ranks by scores; ``random`` is the papers' ablation and needs no scores."""
    aggregation: Aggregation = Aggregation.l2_mean
    """Which of the saved aggregations ranks heads, neurons and channels."""
    seed: int = 1234
    """Seed of the random ranking."""
    reconstruct: ReconstructConfig = field(default_factory=ReconstructConfig)
    """Fit the kept weights to the source on calibration text."""
    head_residual: HeadResidual = HeadResidual.none
    """Merge pruned query heads into kept ones: ``none``, or with the sign of the ``paper`` or of ``laco``."""
    spec: str | None = None
    """A prune spec to apply as it is, a ``prune_spec.json`` edited or not, in place of sizes and ranking."""

    def __post_init__(self) -> None:
        """Check every value by itself; `check_target` checks them against a model."""
        for name in SIZES:
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ConfigError(f"prune.{name}={size} must be at least 1, or null to keep all")
        if self.seed < 0:
            raise ConfigError(f"prune.seed={self.seed} must not be negative")
        drop = self.drop_layers or []
        if any(layer < 0 for layer in drop):
            raise ConfigError(f"prune.drop_layers={drop} must count layers from 0")
        if len(set(drop)) < len(drop):
            raise ConfigError(f"prune.drop_layers={drop} names a layer twice; name each once")
        norms = [norm.name for norm in self.hidden_norms]
        if not norms or len(set(norms)) < len(norms):
            raise ConfigError(f"prune.hidden_norms=[{', '.join(norms)}] must name at least one norm, each once")
        if self.scores is not None and self.ranking is Ranking.random:
            raise ConfigError(f"prune.ranking=random reads no scores; leave prune.scores={self.scores} out")
        if self.spec is not None:
            self._check_alone()

    @property
    def needs_scores(self) -> bool:
        """Whether units are ranked by scores."""
        return self.ranking is Ranking.importance and self.spec is None

    def _check_alone(self) -> None:
        """A given spec says all there is to say."""
        names = (*SIZES, "drop_layers", "scores")
        unread = [f"prune.{name}=null" for name in names if getattr(self, name) is not None]
        if self.head_residual is not HeadResidual.none:
            unread.append(f"prune.head_residual={HeadResidual.none}")
        if unread:
            raise ConfigError(
                f"prune.spec={self.spec} says which units are kept, so other settings of prune would not be read; "
                f"set {' '.join(unread)}"
            )


def check_merging(config: PruneConfig) -> None:
    """Refuse to merge query heads into what is fitted anew afterwards.

    Raises:
        ConfigError: Both are asked for.
    """
    merging, fitting = config.head_residual, config.reconstruct
    if merging is not HeadResidual.none and fitting.enabled and Linear.linear_qkv in fitting.modules:
        raise ConfigError(
            f"prune.head_residual={merging} merges query heads, but prune.reconstruct fits linear_qkv anew; set "
            "prune.reconstruct.enabled=false, or prune.head_residual=none"
        )


def check_target(model: ModelConfig, config: PruneConfig) -> ModelConfig:
    """The architecture after pruning.

    Args:
        model: The source.
        config: The target shape.

    Returns:
        The source with the target's sizes; everything else, ``kv_channels`` included, is kept.

    Raises:
        PruneError: The target does not fit the source; the message has the arithmetic.
    """
    sizes = {name: _target_size(model, config, name) for name in SIZES}
    if config.drop_layers is not None:
        sizes["num_layers"] = _layers_left(model, config)
    heads, groups = sizes["num_attention_heads"], sizes["num_query_groups"]
    assert heads is not None
    assert groups is not None
    if heads % groups:
        raise PruneError(
            f"prune: num_attention_heads={heads} does not divide over num_query_groups={groups} "
            f"({heads} / {groups} leaves {heads % groups}); use a multiple of {groups} heads"
        )
    if heads // groups > model.heads_per_group:
        raise PruneError(
            f"prune: num_attention_heads={heads} over num_query_groups={groups} is "
            f"{heads // groups} heads per group, but the model has {model.num_attention_heads} / "
            f"{model.num_query_groups} = {model.heads_per_group}; set num_attention_heads to at "
            f"most {groups} x {model.heads_per_group} = {groups * model.heads_per_group}"
        )
    experts, chosen = sizes["num_moe_experts"], model.moe_router_topk
    if experts is not None and chosen is not None and experts < chosen:
        raise PruneError(
            f"prune.num_moe_experts={experts} is fewer than the moe_router_topk={chosen} experts that each token goes "
            f"to; keep at least {chosen}"
        )
    target = replace(model, **sizes)  # type: ignore[arg-type]
    _check_loadable(target)
    _check_head_residual(model, target, config.head_residual)
    return target


def merged_heads(model: ModelConfig, target: ModelConfig) -> tuple[int, int]:
    """Among how many query heads `HeadResidual` finds its pairs, and how many of them are kept.

    Heads share keys and values with those of their group only. With one head a group, that is with one key and value
    for each, all heads of a layer are looked at.
    """
    if model.heads_per_group == 1:
        return model.num_attention_heads, target.num_attention_heads
    return model.heads_per_group, target.heads_per_group


def _check_head_residual(model: ModelConfig, target: ModelConfig, merging: HeadResidual) -> None:
    """Every dropped head needs a kept one of its own."""
    before, after = merged_heads(model, target)
    if merging is not HeadResidual.none and before - after > after:
        raise PruneError(
            f"prune.head_residual={merging} pairs every dropped head with a kept one, but of {before} heads that may "
            f"be merged (num_attention_heads={model.num_attention_heads}, num_query_groups={model.num_query_groups}) "
            f"only {after} are kept; keep at least half, or set prune.head_residual=none"
        )


def _target_size(model: ModelConfig, config: PruneConfig, name: str) -> int | None:
    """One size of the target, which must not exceed the source's; None where the model has no such thing."""
    have: int | None = getattr(model, name)
    want: int | None = getattr(config, name)
    if want is None:
        return have
    if have is None:
        raise PruneError(f"prune.{name}={want}, but {model.architecture.value} has none; set it to null")
    if want > have:
        raise PruneError(
            f"prune.{name}={want} is larger than the model's {have}; use at most {have}, or null to keep all"
        )
    return want


def _check_loadable(target: ModelConfig) -> None:
    """Refuse now what could not be exported."""
    nearest = target.loadable_hidden_sizes()
    if nearest:
        hidden, heads = target.hidden_size, target.num_attention_heads
        raise PruneError(
            f"prune: hidden_size={hidden} is not a multiple of num_attention_heads={heads} "
            f"({hidden} / {heads} leaves {hidden % heads}), which transformers' LlamaConfig needs; "
            f"set hidden_size to {' or '.join(map(str, nearest))}, or change the number of heads"
        )


def _layers_left(model: ModelConfig, config: PruneConfig) -> int:
    """Number of layers that an explicit list leaves."""
    drop = config.drop_layers or []
    outside = [layer for layer in drop if layer >= model.num_layers]
    if outside:
        raise PruneError(
            f"prune.drop_layers names {outside}, but the model's {model.num_layers} layers are "
            f"numbered 0 to {model.num_layers - 1}"
        )
    left = model.num_layers - len(drop)
    if left < 1:
        raise PruneError(f"prune.drop_layers drops all {model.num_layers} layers of the model; keep at least one")
    if config.num_layers is not None and config.num_layers != left:
        raise PruneError(
            f"prune.num_layers={config.num_layers} contradicts prune.drop_layers, which leaves "
            f"{model.num_layers} - {len(drop)} = {left} layers; leave one of the two at null"
        )
    return left
