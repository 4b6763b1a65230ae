"""How the ranks are laid out, and the arithmetic that says whether a model fits the layout."""

from dataclasses import dataclass

from minitron.config.model import ModelConfig
from minitron.errors import LayoutError


@dataclass(kw_only=True)
class ParallelConfig:
    """Sizes of the parallel axes. The number of ranks is their product."""

    tensor_model_parallel_size: int = 1
    """Ranks that share every layer (heads, ffn neurons and vocabulary are split)."""
    pipeline_model_parallel_size: int = 1
    """Stages that the layers are dealt over."""
    context_parallel_size: int = 1
    """Ranks that share every sequence; each holds two chunks of it. Scoring takes them as further copies."""
    data_parallel_size: int = 1
    """Copies of the model, each reading its own part of the global batch."""
    sequence_parallel: bool = False
    """Split norms and residuals along the sequence over the tensor-parallel ranks (needs TP > 1)."""

    def __post_init__(self) -> None:
        """Check the sizes by themselves; `check_layout` checks a model against them."""
        for name in (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "context_parallel_size",
            "data_parallel_size",
        ):
            if getattr(self, name) < 1:
                raise LayoutError(f"parallel.{name}={getattr(self, name)} must be at least 1")
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise LayoutError(
                "parallel.sequence_parallel=true needs parallel.tensor_model_parallel_size > 1 (it is 1); "
                "set sequence_parallel=false or raise the tensor-parallel size"
            )

    @property
    def num_ranks(self) -> int:
        """Processes that the layout needs."""
        model = self.tensor_model_parallel_size * self.pipeline_model_parallel_size
        return model * self.context_parallel_size * self.data_parallel_size

    def arithmetic(self) -> str:
        """The product written out, for messages."""
        context = f"x context {self.context_parallel_size} " if self.context_parallel_size > 1 else ""
        return (
            f"tensor {self.tensor_model_parallel_size} x pipeline {self.pipeline_model_parallel_size} "
            f"{context}x data {self.data_parallel_size} = {self.num_ranks}"
        )


def check_layout(model: ModelConfig, parallel: ParallelConfig, *, who: str) -> None:
    """Refuse a model that the layout cannot split.

    Args:
        model: The architecture.
        parallel: The layout.
        who: Name of the model in the message (``teacher``, ``student``).

    Raises:
        LayoutError: With the division that leaves a remainder.
    """
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        size = getattr(model, name)
        if size % tp:
            raise LayoutError(
                f"{who}: {name}={size} does not divide over parallel.tensor_model_parallel_size={tp} "
                f"({size} / {tp} leaves {size % tp}); use a divisor of {size}, such as {_divisors(size)}"
            )
    if model.num_layers < pp:
        raise LayoutError(
            f"{who}: num_layers={model.num_layers} is fewer than parallel.pipeline_model_parallel_size={pp} "
            f"stages; use at most {model.num_layers} stages"
        )


def stage_layers(num_layers: int, num_stages: int) -> list[int]:
    """Layers of each pipeline stage, as even as Megatron's first/middle/last form allows.

    Megatron sets the first and the last stage freely and makes all middle stages equal.

    >>> stage_layers(24, 2), stage_layers(7, 2), stage_layers(10, 4)
    ([12, 12], [4, 3], [3, 2, 2, 3])
    """
    if num_stages == 1:
        return [num_layers]
    best: list[int] | None = None
    for middle in range(num_layers // num_stages, -(-num_layers // num_stages) + 1):
        ends = num_layers - middle * (num_stages - 2)
        first, last = ends - ends // 2, ends // 2
        if last < 1 or (num_stages > 2 and middle < 1):
            continue
        stages = [first, *[middle] * (num_stages - 2), last]
        if best is None or max(stages) < max(best):
            best = stages
    if best is None:
        raise LayoutError(f"{num_layers} layers cannot fill {num_stages} pipeline stages")
    return best


def _divisors(size: int) -> str:
    return ", ".join(str(d) for d in range(1, min(size, 16) + 1) if size % d == 0)
