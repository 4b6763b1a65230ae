"""A run made small: its shapes divided, so that the same experiment runs on a laptop."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from minitron.config.model import SHAPE, ModelConfig
from minitron.config.prune import DENSE_SIZES, PruneConfig
from minitron.errors import ConfigError

if TYPE_CHECKING:
    from minitron.config.run import RunConfig


@dataclass(kw_only=True)
class ScaleConfig:
    """What ``scale=tiny`` divides the shapes of ``source.model`` and ``prune`` by; see `scaled`. 1 changes nothing."""

    width: int = 1
    """Divides hidden_size and ffn_hidden_size."""
    heads: int = 1
    """Divides heads and query groups; the size of a head is divided by width / heads."""
    depth: int = 1
    """Divides the number of layers; each layer left stands for the last of as many."""

    def __post_init__(self) -> None:
        """Refuse values that divide nothing."""
        for name in ("width", "heads", "depth"):
            if getattr(self, name) < 1:
                raise ConfigError(f"scale.{name}={getattr(self, name)} must be at least 1")
        if self.width % self.heads:
            raise ConfigError(f"scale.width={self.width} must be a multiple of scale.heads={self.heads}")

    def divisor(self, size: str) -> int:
        """What the size of this name is divided by."""
        return {
            "num_layers": self.depth,
            "hidden_size": self.width,
            "ffn_hidden_size": self.width,
            "num_attention_heads": self.heads,
            "num_query_groups": self.heads,
            "kv_channels": self.width // self.heads,
        }[size]


def scaled(run: "RunConfig") -> "RunConfig":
    """The run with a random model of ``source.model``'s architecture and proportions, and targets to match.

    The result is an ordinary run: it has no published shape and no scale any more. Its name ends in ``_tiny``, so that
    it has a folder of its own.

    Args:
        run: As composed.

    Raises:
        ConfigError: There is no shape to scale, or a size does not divide.
    """
    scale, model = run.scale, run.source.model
    if scale == ScaleConfig():
        return run
    if model is None:
        raise ConfigError(
            "scale divides the published shape of the source, but source.model is not set; choose one (model=...), or "
            "an experiment that has one"
        )
    sizes = {name: _divided(scale, name, getattr(model, name), "source.model") for name in SHAPE}
    random = replace(
        run.source.random,
        architecture=model.architecture,
        rotary_percent=model.rotary_percent,
        share_embeddings_and_output_weights=model.share_embeddings_and_output_weights,
        **sizes,
    )
    return replace(
        run,
        name=f"{run.name}_tiny",
        scale=ScaleConfig(),
        source=replace(run.source, model=None, random=random),
        prune=_scaled_prune(scale, run.prune, model, "prune"),
        chain=[
            replace(
                step,
                num_tokens=0 if step.num_tokens == 0 else None,
                prune=_scaled_prune(scale, step.prune, model, f"chain.{number}.prune"),
            )
            for number, step in enumerate(run.chain)
        ],
    )


def _scaled_prune(scale: ScaleConfig, prune: PruneConfig, model: ModelConfig, where: str) -> PruneConfig:
    sizes = {
        name: _divided(scale, name, size, where) for name in DENSE_SIZES if (size := getattr(prune, name)) is not None
    }
    drop = prune.drop_layers
    if drop is not None:
        drop = [layer for layer in range(model.num_layers // scale.depth) if (layer + 1) * scale.depth - 1 in drop]
    return replace(prune, drop_layers=drop, **sizes)  # type: ignore[arg-type]


def _divided(scale: ScaleConfig, name: str, size: int, where: str) -> int:
    divisor = scale.divisor(name)
    if size % divisor:
        raise ConfigError(f"scale: {where}.{name}={size} is not a multiple of {divisor}; choose other divisors")
    return size // divisor
