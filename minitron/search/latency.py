"""Latencies of models from those of their layers: what the benchmark leaves and the search reads."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from minitron.config.model import ModelConfig
from minitron.errors import ArtefactError

LATENCY_FILE = "latency.json"


@dataclass(frozen=True)
class WidthLatency:
    """Milliseconds of a batch at one width.

    Attributes:
        layer_ms: One layer.
        rest_ms: Embedding, final norm and output layer.
    """

    layer_ms: float
    rest_ms: float

    def of(self, num_layers: int) -> float:
        """A model of that many layers, all alike."""
        return self.rest_ms + num_layers * self.layer_ms


def width_name(model: ModelConfig) -> str:
    """Name of a width: all sizes but the depth."""
    return f"h{model.hidden_size}-f{model.ffn_hidden_size}-a{model.num_attention_heads}-g{model.num_query_groups}"


def read_latencies(folder: Path) -> Callable[[ModelConfig], float]:
    """The latency of a shape by what `measure_widths` wrote.

    Args:
        folder: The finished stage.

    Raises:
        ArtefactError: It cannot be read.
    """
    path = folder / LATENCY_FILE
    try:
        widths = {name: WidthLatency(**one) for name, one in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ArtefactError(
            f"{path} cannot be read ({error}); delete {folder} and run minitron search again"
        ) from error
    return lambda model: widths[width_name(model)].of(model.num_layers)
