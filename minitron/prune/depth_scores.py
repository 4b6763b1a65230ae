"""Importance of layers and of blocks of layers, as measured by taking them out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from minitron.config.score import DepthMetric
from minitron.errors import PruneError

Floats = NDArray[np.float64]

_BLOCK, _GREEDY = "depth.block", "depth.greedy"


@dataclass(frozen=True, kw_only=True)
class GreedyRemoval:
    """Layers removed one after the other, each time the one whose loss the metric finds the smallest.

    Attributes:
        metric: What was measured.
        layers: The removed layers by number in the source, the first removed first.
        values: The metric at each place: loss and accuracy of what is left, logit_mse against the whole model,
            block_importance of the removed layer in the model that it was removed from.
    """

    metric: DepthMetric
    layers: list[int]
    values: Floats


@dataclass(frozen=True, kw_only=True)
class DepthScores:
    """What a score stage has measured by taking layers out; higher is more important.

    Attributes:
        blocks: By metric and size n, ``[L - n + 1]``: the metric without the n layers from each one on.
        greedy: The iterative removal, if there was one.
        whole_loss: Cross-entropy of the whole model on the same text, nats per token; None if not measured.
    """

    blocks: dict[tuple[DepthMetric, int], Floats] = field(default_factory=dict)
    greedy: GreedyRemoval | None = None
    whole_loss: float | None = None

    def arrays(self) -> dict[str, Floats]:
        """Every array under its name in the file."""
        arrays = {f"{_BLOCK}.{metric}.{size}": values for (metric, size), values in self.blocks.items()}
        if self.greedy is not None:
            arrays[f"{_GREEDY}.values"] = self.greedy.values
        return arrays

    def about(self) -> dict[str, Any]:
        """The rest, for the JSON file."""
        greedy = None
        if self.greedy is not None:
            greedy = {"metric": self.greedy.metric.value, "layers": self.greedy.layers}
        return {"greedy": greedy, "whole_loss": self.whole_loss}

    @classmethod
    def of(cls, about: Mapping[str, Any], arrays: Mapping[str, Floats]) -> Self:
        """Inverse of `arrays` and `about`.

        Raises:
            KeyError, ValueError: The two do not belong together.
        """
        blocks = {}
        for name, values in arrays.items():
            if name.startswith(f"{_BLOCK}."):
                metric, size = name.removeprefix(f"{_BLOCK}.").split(".")
                blocks[DepthMetric(metric), int(size)] = values
        greedy = None
        if about["greedy"] is not None:
            metric = DepthMetric(about["greedy"]["metric"])
            greedy = GreedyRemoval(
                metric=metric, layers=list(about["greedy"]["layers"]), values=arrays[f"{_GREEDY}.values"]
            )
        return cls(blocks=blocks, greedy=greedy, whole_loss=about["whole_loss"])

    def shapes(self, num_layers: int) -> dict[str, tuple[int, ...]]:
        """Shape that each array must have, by its name in the file."""
        shapes: dict[str, tuple[int, ...]] = {
            f"{_BLOCK}.{metric}.{size}": (num_layers - size + 1,) for metric, size in self.blocks
        }
        if self.greedy is not None:
            shapes[f"{_GREEDY}.values"] = (len(self.greedy.layers),)
        return shapes

    def block(self, metric: DepthMetric, size: int) -> Floats:
        """The scores of all blocks of a size.

        Raises:
            PruneError: They were not measured.
        """
        if (metric, size) not in self.blocks:
            saved = ", ".join(f"{m} of {n}" for m, n in self.blocks) or "none"
            raise PruneError(
                f"prune.depth_metric={metric} of blocks of {size} layers is not among the saved scores ({saved}); add "
                "them to score.depth.metrics and score.depth.blocks and score again"
            )
        return self.blocks[metric, size]

    def first_removed(self, metric: DepthMetric, count: int) -> Sequence[int]:
        """The layers that iterative removal takes first.

        Raises:
            PruneError: There was none by this metric, or it did not go so far.
        """
        if self.greedy is None or self.greedy.metric is not metric or len(self.greedy.layers) < count:
            saved = f"{len(self.greedy.layers)} by {self.greedy.metric}" if self.greedy else "none"
            raise PruneError(
                f"prune.depth_selection=iterative needs {count} layers removed one after the other by {metric}, but "
                f"the scores have {saved}; score again with this target"
            )
        return self.greedy.layers[:count]
