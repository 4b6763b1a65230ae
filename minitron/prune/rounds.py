"""Scoring in rounds: between two, the width is cut part of the way to the target (arXiv 2407.14679, section 2.2)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from minitron.config.model import ModelConfig
from minitron.prune.depth_scores import Floats
from minitron.prune.scores import Scores, WidthScores
from minitron.prune.spec import PruneSpec


def shape_after(source: ModelConfig, target: ModelConfig, *, done: int, rounds: int, multiple_of: int) -> ModelConfig:
    """The shape when ``done`` of ``rounds`` equal cuts of the width are made; the depth stays the source's.

    Args:
        source: The model.
        target: The shape after all cuts.
        done: Cuts made.
        rounds: Cuts in all.
        multiple_of: Ffn neurons and query groups stay a multiple of it: tensor-parallel ranks.
    """

    def between(have: int, want: int, step: int) -> int:
        part = have - round((have - want) * done / rounds)
        return min(have, max(want, -(-part // step) * step))

    groups = between(source.num_query_groups, target.num_query_groups, multiple_of)
    per_group = between(source.heads_per_group, target.heads_per_group, 1)
    return replace(
        source,
        hidden_size=between(source.hidden_size, target.hidden_size, 1),
        ffn_hidden_size=between(source.ffn_hidden_size, target.ffn_hidden_size, multiple_of),
        num_query_groups=groups,
        num_attention_heads=groups * per_group,
    )


@dataclass(frozen=True)
class Survivors:
    """Units of the source that are left after some cuts of the width.

    Attributes:
        hidden: Channels.
        ffn: Neurons of each layer.
        heads: Query heads of each layer.
    """

    hidden: Sequence[int]
    ffn: Sequence[Sequence[int]]
    heads: Sequence[Sequence[int]]

    @classmethod
    def all_of(cls, model: ModelConfig) -> Self:
        """Nothing is cut yet."""
        depth = range(model.num_layers)
        return cls(
            range(model.hidden_size),
            [range(model.ffn_hidden_size) for _ in depth],
            [range(model.num_attention_heads) for _ in depth],
        )

    def after(self, spec: PruneSpec) -> "Survivors":
        """What a further cut leaves; its spec counts the units that were left before it."""

        def pick(units: Sequence[int], kept: Sequence[int]) -> list[int]:
            return [units[place] for place in kept]

        return Survivors(
            pick(self.hidden, spec.hidden),
            [pick(units, kept) for units, kept in zip(self.ffn, spec.ffn, strict=True)],
            [pick(units, kept) for units, kept in zip(self.heads, spec.heads, strict=True)],
        )

    def in_source(self, scores: Scores, source: ModelConfig, source_id: str) -> Scores:
        """Scores of the cut model as scores of the source: units that are gone score 0, the lowest there is."""

        def spread(rows: Floats, units: Sequence[Sequence[int]], size: int) -> Floats:
            whole = np.zeros((len(rows), size))
            for row, values, places in zip(whole, rows, units, strict=True):
                row[list(places)] = values
            return whole

        width = {}
        for aggregation, cut in scores.width.items():
            norms = [self.hidden] * len(cut.hidden)
            width[aggregation] = WidthScores(
                ffn=spread(cut.ffn, self.ffn, source.ffn_hidden_size),
                head=spread(cut.head, self.heads, source.num_attention_heads),
                hidden=spread(cut.hidden, norms, source.hidden_size),
                final=spread(cut.final[None], [self.hidden], source.hidden_size)[0],
            )
        return replace(scores, model=source, source_id=source_id, width=width)


def score_in_rounds(
    source: ModelConfig,
    target: ModelConfig,
    *,
    rounds: int,
    multiple_of: int,
    score: Callable[[int], Scores],
    cut: Callable[[int, Scores, ModelConfig], PruneSpec],
) -> Scores:
    """Score, cut, score again; the last scores, in the source's units, with the first round's of the depth.

    Args:
        source: The model.
        target: The shape that pruning will cut to; its depth is not read.
        rounds: How often to score.
        multiple_of: See `shape_after`.
        score: Scores the model that the given number of cuts has left.
        cut: Makes the next cut, to a shape, by scores of the model as it is.
    """
    left = Survivors.all_of(source)
    first = scores = score(0)
    for done in range(1, rounds):
        spec = cut(done, scores, shape_after(source, target, done=done, rounds=rounds, multiple_of=multiple_of))
        left = left.after(spec)
        scores = score(done)
    whole = left.in_source(scores, source, first.source_id)
    return replace(whole, layer=first.layer, depth=first.depth)
