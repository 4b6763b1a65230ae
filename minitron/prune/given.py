"""A prune spec that the user gives, ``prune.spec``: read, checked against the source, applied as it is. No torch."""

from dataclasses import replace
from pathlib import Path

from minitron.config.model import ModelConfig
from minitron.config.prune import SIZES, PruneConfig, Ranking, check_target
from minitron.errors import PruneError
from minitron.prune.spec import PruneSpec


def load_given(path: Path, source: ModelConfig, *, source_id: str | None = None) -> PruneSpec:
    """Read a given spec.

    Args:
        path: The file.
        source: Architecture of the model that is pruned.
        source_id: Identity of its weights; None where that is not known yet.

    Raises:
        PruneError: The file cannot be read, is for another architecture or other weights, or leaves a shape that could
            not be exported.
    """
    spec = PruneSpec.load(path)
    if spec.source != source:
        have, want = spec.source.to_dict(), source.to_dict()
        other = [f"{name} is {want[name]}, not {have[name]}" for name in want if have[name] != want[name]]
        raise PruneError(
            f"prune.spec={path} is for another architecture than this run's source, whose {', '.join(other)}; give a "
            "spec of this source"
        )
    if source_id is not None and spec.source_id != source_id:
        raise PruneError(
            f"prune.spec={path} was made for weights of hash {spec.source_id or 'none'}, but this run's source has "
            f"{source_id}; give a spec of this source, or, where its units are meant for these weights, write this "
            "hash into it as source_id"
        )
    try:
        check_target(source, PruneConfig(**{name: getattr(spec.target, name) for name in SIZES}))
    except PruneError as error:
        raise PruneError(f"prune.spec={path}: {error}") from error
    return spec


def target_of(source: ModelConfig, config: PruneConfig) -> ModelConfig:
    """The architecture after pruning, by the configured sizes or by the given spec.

    Raises:
        PruneError: It does not fit the source.
    """
    if config.spec is None:
        return check_target(source, config)
    return load_given(Path(config.spec), source).target


def given_identity(config: PruneConfig) -> dict[str, str]:
    """Hash of the given spec's content, for the prune stage's identity; nothing where none is given.

    Raises:
        PruneError: It cannot be read.
    """
    return {} if config.spec is None else {"spec": PruneSpec.load(Path(config.spec)).content_hash()}


def at_random(config: PruneConfig) -> PruneConfig:
    """As many units of every axis, chosen at random: the control of importance.

    Raises:
        PruneError: A given spec cannot be read.
    """
    if config.spec is None:
        return replace(config, ranking=Ranking.random, scores=None)
    target = PruneSpec.load(Path(config.spec)).target
    sizes = {name: getattr(target, name) for name in SIZES}
    return replace(config, ranking=Ranking.random, spec=None, **sizes)
