"""What pruning aims at: the target shape, and how units are ranked."""

from dataclasses import dataclass, replace
from enum import StrEnum

from minitron.config.model import ModelConfig
from minitron.config.score import Aggregation
from minitron.errors import ConfigError, PruneError

SIZES = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "num_moe_experts",
)


class Ranking(StrEnum):
    """How the units of an axis are put in order."""

    importance = "importance"
    random = "random"


@dataclass(kw_only=True)
class PruneConfig:
    """The target shape; a size left at null keeps the source's. ``kv_channels`` never changes."""

    num_layers: int | None = None
    """Layers to keep; those of lowest block importance go, unless `drop_layers` names them."""
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
    ranking: Ranking = Ranking.importance
    """``importance`` ranks by scores; ``random`` is the papers' ablation and needs no scores."""
    aggregation: Aggregation = Aggregation.l2_mean
    """Which of the saved aggregations ranks heads, neurons and channels."""
    seed: int = 1234
    """Seed of the random ranking."""

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
    return target


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
