"""How the ranks are laid out, and the arithmetic that says whether a model fits the layout."""

from dataclasses import dataclass, replace
from enum import StrEnum

from minitron.config.model import ModelConfig
from minitron.errors import LayoutError

_CHUNKS = "virtual_pipeline_model_parallel_size"
_FIRST = "num_layers_in_first_pipeline_stage"
_LAST = "num_layers_in_last_pipeline_stage"


class RecomputeGranularity(StrEnum):
    """What the backward pass computes again instead of keeping it from the forward pass."""

    selective = "selective"
    full = "full"


class RecomputeMethod(StrEnum):
    """Which layers `RecomputeGranularity.full` computes again."""

    uniform = "uniform"
    block = "block"


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
    virtual_pipeline_model_parallel_size: int | None = None
    """Chunks of layers on each stage of the trained model's interleaved pipeline; null is plain 1F1B."""
    num_layers_in_first_pipeline_stage: int | None = None
    """Layers of the trained model on the first stage; null divides as evenly as Megatron can."""
    num_layers_in_last_pipeline_stage: int | None = None
    """Layers of the trained model on the last stage; null divides as evenly as Megatron can."""
    overlap_grad_reduce: bool = True
    """Reduce gradients over the data-parallel ranks while the backward pass still runs."""
    recompute_granularity: RecomputeGranularity | None = None
    """Memory for time in training: ``selective`` computes the attention again, ``full`` whole layers."""
    recompute_method: RecomputeMethod | None = None
    """For ``full``: ``uniform`` keeps the input of every group of `recompute_num_layers` layers; ``block`` computes
    the first `recompute_num_layers` layers of each chunk again, one by one."""
    recompute_num_layers: int | None = None
    """For ``full``: see `recompute_method`."""

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
        for name, least in ((_CHUNKS, 2), (_FIRST, 1), (_LAST, 1)):
            value = getattr(self, name)
            if value is None:
                continue
            if value < 1:
                raise LayoutError(f"parallel.{name}={value} must be at least 1, or null")
            if self.pipeline_model_parallel_size == 1 and value >= least:
                raise LayoutError(
                    f"parallel.{name}={value} needs parallel.pipeline_model_parallel_size > 1 (it is 1): "
                    "there are no stages to divide the layers over"
                )
        self._check_recompute()

    def _check_recompute(self) -> None:
        method, number = self.recompute_method, self.recompute_num_layers
        given = f"recompute_method={method or 'null'} and recompute_num_layers={'null' if number is None else number}"
        if self.recompute_granularity is RecomputeGranularity.full:
            if method is None or number is None or number < 1:
                raise LayoutError(
                    "parallel.recompute_granularity=full needs recompute_method (uniform or block) and "
                    f"recompute_num_layers of at least 1, but {given}"
                )
        elif method is not None or number is not None:
            raise LayoutError(
                f"parallel.{given} belong to recompute_granularity=full, but it is "
                f"{self.recompute_granularity or 'null'}; set the two to null, or the granularity to full"
            )

    @property
    def num_chunks(self) -> int:
        """Chunks of layers on each stage of the trained model: 1 without interleaving."""
        return self.virtual_pipeline_model_parallel_size or 1

    def plain(self) -> "ParallelConfig":
        """The layout on the same ranks of a model that is only run forward: nothing that speeds up training."""
        return replace(
            self,
            virtual_pipeline_model_parallel_size=None,
            num_layers_in_first_pipeline_stage=None,
            num_layers_in_last_pipeline_stage=None,
            recompute_granularity=None,
            recompute_method=None,
            recompute_num_layers=None,
        )

    def for_teacher(self, num_layers: int) -> "ParallelConfig":
        """The layout of a teacher beside the trained model: divided by itself, interleaved where its depth allows.

        Its schedule is one of its own, so it need not have as many chunks as the student.

        Args:
            num_layers: Depth of the teacher.
        """
        divides = (
            num_layers % self.num_chunks == 0 and num_layers >= self.num_chunks * self.pipeline_model_parallel_size
        )
        chunks = self.virtual_pipeline_model_parallel_size if divides else None
        return replace(self.plain(), virtual_pipeline_model_parallel_size=chunks)

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


def check_layout(model: ModelConfig, parallel: ParallelConfig, *, who: str, section: str = "parallel") -> None:
    """Refuse a model that the layout cannot split.

    Args:
        model: The architecture.
        parallel: The layout.
        who: Name of the model in the message (``teacher``, ``student``).
        section: Where the layout is set.

    Raises:
        LayoutError: With the division that leaves a remainder.
    """
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    if model.num_moe_experts is not None and tp > 1 and not parallel.sequence_parallel:
        raise LayoutError(
            f"{who}: a mixture of experts with {section}.tensor_model_parallel_size={tp} needs "
            f"{section}.sequence_parallel=true: Megatron-Core trains experts over tensor-parallel ranks in no other way"
        )
    for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        size = getattr(model, name)
        if size % tp:
            raise LayoutError(
                f"{who}: {name}={size} does not divide over {section}.tensor_model_parallel_size={tp} "
                f"({size} / {tp} leaves {size % tp}); use a divisor of {size}, such as {_divisors(size)}"
            )
    if model.num_layers < pp:
        raise LayoutError(
            f"{who}: num_layers={model.num_layers} is fewer than {section}.pipeline_model_parallel_size={pp} "
            f"stages; use at most {model.num_layers} stages"
        )
    try:
        layers_per_stage(model.num_layers, parallel)
    except LayoutError as error:
        raise LayoutError(f"{who}: {error}") from error


def layers_per_stage(num_layers: int, parallel: ParallelConfig) -> list[int]:
    """Layers of each pipeline stage, over all of its chunks.

    Args:
        num_layers: Layers of the model.
        parallel: The layout; its first and last stage are as large as it says, the others equal.

    Raises:
        LayoutError: With the arithmetic that does not come out.
    """
    chunks, num_stages = parallel.num_chunks, parallel.pipeline_model_parallel_size
    if num_layers % chunks or num_layers < chunks * num_stages:
        raise LayoutError(
            f"num_layers={num_layers} cannot be dealt over {num_stages} stages x parallel."
            f"virtual_pipeline_model_parallel_size={chunks} chunks: a stage's chunks have equally many layers, "
            f"at least 1; chunks that fit: {_divisors(num_layers, num_layers // num_stages)}"
        )
    first, last = parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage
    given = {name: size for name, size in ((_FIRST, first), (_LAST, last)) if size is not None}
    if not given:
        return [chunks * layers for layers in stage_layers(num_layers // chunks, num_stages)]
    text = " and ".join(f"parallel.{name}={size}" for name, size in given.items())
    for name, size in given.items():
        if size % chunks:
            raise LayoutError(
                f"parallel.{name}={size} does not divide over parallel.virtual_pipeline_model_parallel_size={chunks} "
                f"chunks ({size} / {chunks} leaves {size % chunks})"
            )
    rest, others = num_layers - sum(given.values()), num_stages - len(given)
    if rest < others * chunks or (not others and rest) or (others and rest % (others * chunks)):
        raise LayoutError(
            f"{text} leave {num_layers} - {' - '.join(map(str, given.values()))} = {rest} layers for the other "
            f"{others} of {num_stages} stages{f' in {chunks} chunks each' if chunks > 1 else ''}, which must be equal "
            "and not empty"
        )
    middle = [rest // others] * others if others else []
    return [*([first] if first else []), *middle, *([last] if last else [])]


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


def padded_vocab_size(vocab_size: int, tensor_model_parallel_size: int) -> int:
    """Vocabulary rounded up so that every tensor-parallel rank holds as many rows."""
    return -(-vocab_size // tensor_model_parallel_size) * tensor_model_parallel_size


def _divisors(size: int, largest: int = 16) -> str:
    return ", ".join(str(d) for d in range(1, min(size, largest) + 1) if size % d == 0)
