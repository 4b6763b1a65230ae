"""What FP8 needs: of a model's widths, of the number of tokens, of a device. Pure arithmetic."""

from collections.abc import Mapping
from dataclasses import dataclass

from minitron.config.model import ModelConfig
from minitron.config.parallel import ParallelConfig
from minitron.config.precision import Fp8Recipe, PrecisionConfig
from minitron.errors import ConfigError, LayoutError

Version = tuple[int, int]


@dataclass(frozen=True)
class Need:
    """What a recipe needs of a GPU.

    Attributes:
        capability: Least CUDA compute capability.
        below: First compute capability, after those that can, that cannot; None where there is none.
        cuda: Least version of CUDA that torch and Transformer Engine were built for; None for any.
    """

    capability: Version
    below: Version | None = None
    cuda: Version | None = None


_FP8 = Need((8, 9), cuda=(12, 1))
NEEDS: Mapping[Fp8Recipe, Need] = {
    Fp8Recipe.delayed: _FP8,
    Fp8Recipe.tensorwise: _FP8,
    Fp8Recipe.blockwise: Need((9, 0), cuda=(12, 9)),
    Fp8Recipe.mxfp8: Need((10, 0), below=(12, 0)),
}
"""By recipe, as Transformer Engine 2 checks it (``transformer_engine/pytorch/quantization.py``)."""


def unmet_need(recipe: Fp8Recipe, *, capability: Version, cuda: Version | None) -> str | None:
    """Why a GPU cannot run a recipe, in words; None when it can.

    Args:
        recipe: The recipe.
        capability: The GPU's compute capability: (9, 0) for H100 and H200, (10, 0) for B200.
        cuda: Version of CUDA that torch was built for; None when it is not known, and not asked for.
    """
    need = NEEDS[recipe]
    if capability < need.capability or (need.below and capability >= need.below):
        below = f" and below {_text(need.below)}" if need.below else ""
        return f"{recipe} needs compute capability {_text(need.capability)} or higher{below}, not {_text(capability)}"
    if need.cuda and cuda and cuda < need.cuda:
        return f"{recipe} needs CUDA {_text(need.cuda)} or higher, not {_text(cuda)}"
    return None


def _text(version: Version) -> str:
    return f"{version[0]}.{version[1]}"


def fp8_alignment(recipe: Fp8Recipe) -> int:
    """What every dimension of an FP8 matrix product must be a multiple of (Megatron's ``get_fp8_align_size``)."""
    return 32 if recipe is Fp8Recipe.mxfp8 else 16


@dataclass(frozen=True)
class Width:
    """A dimension of the layers' weights on one tensor-parallel rank.

    Attributes:
        name: How it is made of the model's sizes.
        size: Its length.
        num_ranks: Ranks that the whole is divided over.
    """

    name: str
    size: int
    num_ranks: int


def widths_per_rank(model: ModelConfig, tensor_model_parallel_size: int) -> tuple[Width, ...]:
    """Every dimension of the layers' weights on one rank: what FP8 aligns.

    The fused gate and up rows are twice the ffn width, and so aligned where it is.

    Args:
        model: The architecture.
        tensor_model_parallel_size: Ranks that share every layer; divides heads, groups and ffn.
    """
    tp, channels = tensor_model_parallel_size, model.kv_channels
    heads, groups = model.num_attention_heads, model.num_query_groups
    over = f" / tensor_model_parallel_size={tp}" if tp > 1 else ""
    qkv = f"(num_attention_heads={heads} + 2 x num_query_groups={groups}) x kv_channels={channels}{over}"
    return (
        Width(f"hidden_size={model.hidden_size}", model.hidden_size, 1),
        Width(f"ffn_hidden_size={model.ffn_hidden_size}{over}", model.ffn_hidden_size // tp, tp),
        Width(f"num_attention_heads={heads} x kv_channels={channels}{over}", heads * channels // tp, tp),
        Width(qkv, (heads + 2 * groups) * channels // tp, tp),
    )


def misaligned(model: ModelConfig, recipe: Fp8Recipe, tensor_model_parallel_size: int) -> str | None:
    """The first width of a model that a recipe cannot multiply, in words; None when all can.

    A search over shapes can drop the candidates for which this says something.

    Args:
        model: The architecture.
        recipe: The FP8 recipe.
        tensor_model_parallel_size: Ranks that share every layer; divides heads, groups and ffn.
    """
    multiple = fp8_alignment(recipe)
    for width in widths_per_rank(model, tensor_model_parallel_size):
        if width.size % multiple:
            lower = width.size - width.size % multiple
            near = " or ".join(str(size * width.num_ranks) for size in (lower, lower + multiple) if size)
            near += f" / {width.num_ranks}" if width.num_ranks > 1 else ""
            equals = "" if width.name.endswith(f"={width.size}") else f" = {width.size}"
            return f"{width.name}{equals} is not a multiple of {multiple} (nearest: {near})"
    return None


def check_fp8_model(model: ModelConfig, precision: PrecisionConfig, parallel: ParallelConfig, *, who: str) -> None:
    """Refuse a model whose widths FP8 cannot multiply on one rank, or whose ends in bf16 do not fit.

    Args:
        model: The architecture, which the layout can split.
        precision: Its number formats; nothing is checked without FP8.
        parallel: Its layout.
        who: Name of the model in the message.

    Raises:
        LayoutError: With the width and its nearest neighbours, or the layers.
    """
    if precision.fp8 is None:
        return
    reason = misaligned(model, precision.fp8_recipe, parallel.tensor_model_parallel_size)
    if reason:
        raise LayoutError(
            f"{who}: {reason}, which FP8 ({precision.fp8_recipe}) needs on every tensor-parallel rank; "
            "change the size or the layout, or multiply in bf16 (precision=bf16)"
        )
    if precision.first_last_layers_bf16:
        most = model.num_layers // parallel.pipeline_model_parallel_size
        for name in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
            if getattr(precision, name) > most:
                raise LayoutError(
                    f"{who}: precision.{name}={getattr(precision, name)} is more than the {most} layers of a pipeline "
                    f"stage ({model.num_layers} layers / {parallel.pipeline_model_parallel_size} stages), which is "
                    "Megatron's limit; lower it"
                )


def check_fp8_tokens(
    precision: PrecisionConfig, parallel: ParallelConfig, *, micro_batch_size: int, seq_length: int, who: str
) -> None:
    """Refuse micro-batches whose tokens on one rank FP8 cannot multiply: they are a dimension of every product.

    Args:
        precision: Number formats; nothing is checked without FP8.
        parallel: The layout.
        micro_batch_size: Sequences of a micro-batch.
        seq_length: Tokens of a sequence.
        who: Place of the setting in the message, such as ``distill.train.micro_batch_size``.

    Raises:
        ConfigError: With the number of tokens.
    """
    if precision.fp8 is None:
        return
    ranks = parallel.context_parallel_size
    if parallel.sequence_parallel:
        ranks *= parallel.tensor_model_parallel_size
    multiple = fp8_alignment(precision.fp8_recipe)
    tokens = micro_batch_size * seq_length
    if tokens % (ranks * multiple):
        over = f" / {ranks} ranks that split the sequence" if ranks > 1 else ""
        raise ConfigError(
            f"{who}={micro_batch_size} x data.seq_length={seq_length}{over} = {tokens / ranks:g} tokens is not a "
            f"multiple of {multiple}, which FP8 ({precision.fp8_recipe}) needs; change one of the two"
        )
