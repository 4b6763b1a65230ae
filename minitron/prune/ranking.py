"""From scores and a target shape to the units that are kept. Pure, no torch."""

from collections.abc import Sequence

import numpy as np

from minitron.config.model import ModelConfig
from minitron.config.prune import DepthSelection, HeadResidual, PruneConfig, Ranking, check_target, merged_heads
from minitron.errors import PruneError
from minitron.prune.depth_scores import Floats
from minitron.prune.scores import Scores, random_scores
from minitron.prune.spec import HeadPair, PruneSpec


def choose(source: ModelConfig, config: PruneConfig, *, scores: Scores | None, source_id: str) -> PruneSpec:
    """Choose what a pruned model keeps.

    Channels: the scores of a channel are summed over the norms of the source that ``prune.hidden_norms`` names
    (dropped layers included, as in paper 1) and ranked once for the whole network, because the residual stream
    shares them. Neurons and heads: ranked layer by layer, the same count in each. Heads are ranked
    inside their query group. Layers: see `kept_layers`. Among equal scores the lower number is kept. Dropped heads are
    paired with kept ones where ``head_residual`` asks for it.

    Args:
        source: The model to prune.
        config: The target shape and the ranking.
        scores: Scores of the source; may be None when the ranking is random.
        source_id: Identity of the source weights.

    Raises:
        PruneError: The target does not fit, or the scores are missing, of other weights, or not all that it needs.
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
    return choose_for(target, config, scores=scores, source_id=source_id)


def choose_for(target: ModelConfig, config: PruneConfig, *, scores: Scores, source_id: str) -> PruneSpec:
    """`choose` for a shape that is worked out already, from scores that are checked already.

    Args:
        target: The pruned model.
        config: The ranking; its sizes are not read.
        scores: Scores of the source, or random ones.
        source_id: Identity of the source weights.
    """
    source = scores.model
    width = scores.for_aggregation(config.aggregation)
    layers = kept_layers(scores, target.num_layers, config)
    attention = [kept_heads(width.head[layer], source, target) for layer in layers]
    channels = scores.channels(config.aggregation, config.hidden_norms)
    merging = config.head_residual is not HeadResidual.none
    experts = [kept_experts(None if scores.expert is None else scores.expert[layer], target) for layer in layers]
    spec = PruneSpec(
        source=source,
        target=target,
        source_id=source_id,
        layers=layers,
        hidden=top_units(channels, target.hidden_size),
        ffn=[
            kept_neurons(width.ffn[layer], chosen, source, target)
            for layer, chosen in zip(layers, experts, strict=True)
        ],
        heads=[heads for heads, _ in attention],
        groups=[groups for _, groups in attention],
        experts=experts if source.num_moe_experts else [],
        head_residual=config.head_residual,
        head_pairs=[
            pair_heads(width.head[layer], groups, source, target)
            for layer, (_, groups) in zip(layers, attention, strict=True)
            if merging
        ],
    )
    spec.validate()
    return spec


def top_units(scores: Floats, count: int) -> list[int]:
    """The ``count`` units of highest score, in original order; ties go to the lower number."""
    order = np.argsort(-scores, kind="stable")
    return [int(unit) for unit in np.sort(order[:count])]


def kept_layers(scores: Scores, count: int, config: PruneConfig) -> list[int]:
    """The layers that stay: all but ``prune.drop_layers``, or else those that ``prune.depth_metric`` leaves.

    Args:
        scores: Scores of the source.
        count: How many stay.
        config: The metric and the selection.

    Raises:
        PruneError: The scores lack what the metric needs.
    """
    num_layers = scores.model.num_layers
    if config.drop_layers is not None:
        return [layer for layer in range(num_layers) if layer not in config.drop_layers]
    cut = num_layers - count
    if cut == 0:
        return list(range(num_layers))
    size = cut if config.depth_selection is DepthSelection.contiguous else 1
    if config.ranking is Ranking.random:  # of a block: the sum of its layers' random scores
        sums = np.convolve(scores.layer, np.ones(size), mode="valid")
    elif config.depth_selection is DepthSelection.iterative:
        gone = scores.depth.first_removed(config.depth_metric, cut)
        return [layer for layer in range(num_layers) if layer not in gone]
    else:
        sums = scores.blocks(config.depth_metric, size)
    if size == 1:
        return top_units(sums, count)
    first = len(sums) - 1 - int(np.argmin(sums[::-1]))  # of equal blocks the later one goes
    return [layer for layer in range(num_layers) if not first <= layer < first + size]


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


def pair_heads(scores: Floats, groups: Sequence[int], source: ModelConfig, target: ModelConfig) -> list[HeadPair]:
    """The kept and the dropped query head of every pair of one layer, for `HeadResidual`; sorted by the kept one.

    The paper sorts heads by importance, counts them from 1, keeps K of L, and merges head 2K - i + 1 into head i for i
    from K - (L - K) to K. At that lower bound the partner would be head L + 1, which there is none of; from one further
    on, every dropped head is merged once, the best of them into the worst of the kept.

    Args:
        scores: ``[N]``, scores of the layer's heads.
        groups: The query groups that the layer keeps; heads of the others have no partner.
        source: The model to prune.
        target: The pruned model.
    """
    count, kept = merged_heads(source, target)
    firsts = [0] if source.heads_per_group == 1 else [group * count for group in groups]
    pairs: list[HeadPair] = []
    for first in firsts:
        order = first + np.argsort(-scores[first : first + count], kind="stable")  # as in `top_units`
        pairs += [HeadPair(int(order[i]), int(order[2 * kept - 1 - i])) for i in range(2 * kept - count, kept)]
    return sorted(pairs)


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
