"""From scores and a target shape to the units that are kept. Pure, no torch."""

from collections.abc import Sequence

import numpy as np

from minitron.config.model import ModelConfig
from minitron.config.prune import PruneConfig, Ranking, check_target
from minitron.errors import PruneError
from minitron.prune.scores import Floats, Scores, random_scores
from minitron.prune.spec import PruneSpec


def choose(source: ModelConfig, config: PruneConfig, *, scores: Scores | None, source_id: str) -> PruneSpec:
    """Choose what a pruned model keeps.

    Channels: the scores of a channel are summed over all norms of the source (dropped layers
    included, as in paper 1) and ranked once for the whole network, because the residual stream
    shares them. Neurons and heads: ranked layer by layer, the same count in each. Heads are ranked
    inside their query group. Layers: those of lowest block importance go. Among equal scores the
    lower number is kept.

    Args:
        source: The model to prune.
        config: The target shape and the ranking.
        scores: Scores of the source; may be None when the ranking is random.
        source_id: Identity of the source weights.

    Raises:
        PruneError: The target does not fit, or the scores are missing or of other weights.
    """
    target = check_target(source, config)
    if config.ranking is Ranking.random:
        scores = random_scores(source, config.aggregation, config.seed)
    elif scores is None:
        raise PruneError(
            "prune.ranking=importance needs scores, and there are none; run the score stage first, "
            "or set prune.ranking=random"
        )
    else:
        _check_scores(scores, source, source_id)
    width = scores.for_aggregation(config.aggregation)
    layers = kept_layers(scores.layer, target.num_layers, config.drop_layers)
    attention = [kept_heads(width.head[layer], source, target) for layer in layers]
    experts = [kept_experts(None if scores.expert is None else scores.expert[layer], target) for layer in layers]
    spec = PruneSpec(
        source=source,
        target=target,
        source_id=source_id,
        layers=layers,
        hidden=top_units(width.hidden.sum(axis=0), target.hidden_size),
        ffn=[
            kept_neurons(width.ffn[layer], chosen, source, target)
            for layer, chosen in zip(layers, experts, strict=True)
        ],
        heads=[heads for heads, _ in attention],
        groups=[groups for _, groups in attention],
        experts=experts if source.num_moe_experts else [],
    )
    spec.validate()
    return spec


def top_units(scores: Floats, count: int) -> list[int]:
    """The ``count`` units of highest score, in original order; ties go to the lower number."""
    order = np.argsort(-scores, kind="stable")
    return [int(unit) for unit in np.sort(order[:count])]


def kept_layers(scores: Floats, count: int, drop_layers: Sequence[int] | None) -> list[int]:
    """The layers that stay: all but ``drop_layers``, or else the ``count`` of highest score."""
    if drop_layers is not None:
        return [layer for layer in range(len(scores)) if layer not in drop_layers]
    return top_units(scores, count)


def kept_heads(scores: Floats, source: ModelConfig, target: ModelConfig) -> tuple[list[int], list[int]]:
    """The query heads and the query groups that one layer keeps.

    Keys and values belong to a group, so heads compete only inside their group and every kept group
    keeps as many. Where the target has fewer groups, groups are ranked first, by the L2 norm of
    their heads' scores (ours: the papers keep all groups).

    Args:
        scores: ``[N]``, scores of the layer's heads.
        source: The model to prune.
        target: The pruned model.
    """
    scores_GN = scores.reshape(source.num_query_groups, source.heads_per_group)
    groups = top_units(np.linalg.norm(scores_GN, axis=1), target.num_query_groups)
    heads = [
        group * source.heads_per_group + head
        for group in groups
        for head in top_units(scores_GN[group], target.heads_per_group)
    ]
    return heads, groups


def kept_experts(scores_E: Floats | None, target: ModelConfig) -> list[int]:
    """The experts that one layer keeps; a dense mlp counts as one, kept.

    Args:
        scores_E: Scores of the layer's experts; None for a dense model.
        target: The pruned model.
    """
    return [0] if scores_E is None else top_units(scores_E, target.num_moe_experts or 0)


def kept_neurons(scores: Floats, experts: Sequence[int], source: ModelConfig, target: ModelConfig) -> list[int]:
    """The neurons that one layer keeps: as many in each kept expert, which its neurons compete for.

    Args:
        scores: ``[F]`` (``[E * F]``, expert by expert), scores of the layer's neurons.
        experts: The kept experts.
        source: The model to prune.
        target: The pruned model.
    """
    size = source.ffn_hidden_size
    return [
        expert * size + neuron
        for expert in experts
        for neuron in top_units(scores[expert * size : (expert + 1) * size], target.ffn_hidden_size)
    ]


def _check_scores(scores: Scores, source: ModelConfig, source_id: str) -> None:
    """Scores must be of the model that is pruned."""
    scores.validate()
    if scores.model != source:
        old, new = scores.model.to_dict(), source.to_dict()
        other = [f"{k} {old[k]} != {new[k]}" for k in new if old[k] != new[k]]
        raise PruneError(f"the scores are of another architecture ({', '.join(other)}); score this model again")
    if scores.source_id != source_id:
        raise PruneError(
            f"the scores are of other weights ({scores.source_id}) than the source ({source_id}); "
            "score this model again"
        )
