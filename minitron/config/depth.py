"""What depth pruning asks of the score stage."""

from dataclasses import dataclass
from typing import Any

from minitron.config.prune import DepthSelection, PruneConfig, Ranking
from minitron.config.score import DepthMetric, ScoreConfig
from minitron.errors import ConfigError


@dataclass(frozen=True)
class DepthPlan:
    """What the score stage measures by taking layers out.

    Attributes:
        metrics: Metrics of every block.
        sizes: Numbers of contiguous layers in a block; with ``block_importance`` alone, 1 is not among them, for the
            calibration pass measures that.
        greedy: Metric by which layers are removed one after the other; None for none.
        num_greedy: How many of them.
    """

    metrics: tuple[DepthMetric, ...] = ()
    sizes: tuple[int, ...] = ()
    greedy: DepthMetric | None = None
    num_greedy: int = 0

    @property
    def asks(self) -> tuple[DepthMetric, ...]:
        """Every metric that is measured."""
        return tuple(dict.fromkeys([*self.metrics, *([self.greedy] if self.greedy else [])]))

    @property
    def on_text(self) -> bool:
        """Whether any metric is measured on calibration text."""
        return any(metric is not DepthMetric.accuracy for metric in self.asks)


def cuts_depth_by_score(prune: PruneConfig) -> bool:
    """Whether scores decide which layers go."""
    return prune.num_layers is not None and prune.drop_layers is None and prune.ranking is Ranking.importance


def depth_plan(score: ScoreConfig, prune: PruneConfig, num_layers: int) -> DepthPlan:
    """Put together what ``score.depth`` names and what ``prune`` needs.

    Args:
        score: The score stage's settings.
        prune: The target.
        num_layers: Layers of the model to score.

    Raises:
        ConfigError: A block is as large as the model.
    """
    largest = max(score.depth.blocks, default=0)
    if largest >= num_layers:
        raise ConfigError(
            f"score.depth.blocks names {largest} layers, but the model has {num_layers}; name at most {num_layers - 1}"
        )
    metrics, sizes = list(score.depth.metrics), [1, *score.depth.blocks]
    greedy, num_greedy = None, 0
    cut = num_layers - (prune.num_layers or num_layers)
    if cuts_depth_by_score(prune) and prune.scores is None and cut > 0:
        if prune.depth_selection is DepthSelection.iterative:
            greedy, num_greedy = prune.depth_metric, cut
        else:
            metrics.append(prune.depth_metric)
            if prune.depth_selection is DepthSelection.contiguous:
                sizes.append(cut)
    if score.depth.blocks and not metrics:
        metrics.append(DepthMetric.block_importance)
    if set(metrics) <= {DepthMetric.block_importance}:
        sizes = [size for size in sizes if size > 1]
    if not sizes:
        metrics = []
    return DepthPlan(tuple(dict.fromkeys(metrics)), tuple(sorted(set(sizes))), greedy, num_greedy)


def depth_values(score: ScoreConfig, prune: PruneConfig) -> dict[str, Any]:
    """What `prune` decides of a score stage's result, by dotted key: for the stage's identity."""
    if not cuts_depth_by_score(prune) or prune.scores is not None:
        return {}
    metric, selection = prune.depth_metric, prune.depth_selection
    if selection is DepthSelection.free:
        if metric is DepthMetric.block_importance or metric in score.depth.metrics:
            return {}
        return {"prune.depth_metric": str(metric)}
    return {
        "prune.depth_metric": str(metric),
        "prune.depth_selection": str(selection),
        "prune.num_layers": prune.num_layers,
    }


def check_depth(score: ScoreConfig, prune: PruneConfig) -> None:
    """Refuse what cannot be measured.

    Raises:
        ConfigError: An aggregation that is not saved, accuracy without questions, or rounds without scores.
    """
    if prune.ranking is Ranking.importance and prune.scores is None and prune.aggregation not in score.aggregations:
        saved = ", ".join(score.aggregations)
        raise ConfigError(
            f"prune.aggregation={prune.aggregation} is not among score.aggregations=[{saved}], so it would not be "
            "saved; add it there"
        )
    wanted = list(score.depth.metrics)
    if cuts_depth_by_score(prune) and prune.scores is None:
        wanted.append(prune.depth_metric)
    if DepthMetric.accuracy in wanted and score.depth.questions is None:
        raise ConfigError(
            "the depth metric accuracy needs questions; set score.depth.questions to a JSONL file of "
            "{context, choices, answer}, or choose another of block_importance, loss, logit_mse"
        )
    if score.rounds > 1 and prune.ranking is Ranking.random:
        raise ConfigError(f"score.rounds={score.rounds} cuts by importance, but prune.ranking=random; set one of them")
