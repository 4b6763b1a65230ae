"""The table of parameter axes: what every dimension of every parameter means.

The canonical model is unsharded and stored as Megatron's ``torch_dist`` checkpoint stores a homogeneous GPT: the
layers of one parameter are stacked along a leading dimension, gate rows precede up rows, and the fused QKV rows run
group by group (the group's query heads, then its key head, then its value head). Four readers depend on this table
and nothing else knows a weight layout: Hugging Face import and export, the pruning slicer, scoring, and parameter
counting. A new architecture is a new `ArchitectureTable`, not new code in four places.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from minitron.config.model import Architecture, ModelConfig

Indices = NDArray[np.int64]


class Axis(StrEnum):
    """What the units along a dimension are; a unit is what pruning keeps or drops."""

    layer = "layer"
    hidden = "hidden"
    ffn = "ffn"
    head = "head"
    group = "group"
    vocab = "vocab"


class Dim(StrEnum):
    """How one dimension of a parameter is laid out, as runs of units (see `runs`)."""

    hidden = "hidden"
    ffn = "ffn"
    gate_up = "gate_up"
    qkv = "qkv"
    heads = "heads"
    vocab = "vocab"


@dataclass(frozen=True)
class Run:
    """Consecutive units along a dimension.

    Attributes:
        part: Which Hugging Face tensor the run belongs to (``all`` when there is only one).
        axis: What the units are.
        first: Number of the first unit.
        count: Number of units.
        width: Rows of one unit (``kv_channels`` for heads and groups, else 1).
    """

    part: str
    axis: Axis
    first: int
    count: int
    width: int


@dataclass(frozen=True)
class HfPart:
    """One Hugging Face tensor inside a canonical parameter: its name, and the part of dimension 0 it fills."""

    name: str
    part: str = "all"


@dataclass(frozen=True)
class ParamAxes:
    """One canonical parameter.

    Attributes:
        key: Key in the ``torch_dist`` checkpoint.
        dims: Layout of each dimension of one layer's tensor (without the leading layer dimension).
        hf: The Hugging Face tensors it is made of; ``{layer}`` in a name is the layer's number.
        stacked: Whether the checkpoint stacks it over layers.
    """

    key: str
    dims: tuple[Dim, ...]
    hf: tuple[HfPart, ...]
    stacked: bool = True


@dataclass(frozen=True)
class ScoreSite:
    """Where the activation that scores an axis is seen, inside one Megatron ``TransformerLayer``.

    Attributes:
        module: Dotted path of the module in the layer.
        sees: ``input`` or ``output`` of the module.
        axis: The axis its last dimension scores.
    """

    module: str
    sees: str
    axis: Axis


@dataclass(frozen=True)
class ArchitectureTable:
    """Everything the four readers need to know of one architecture."""

    params: tuple[ParamAxes, ...]
    score_sites: tuple[ScoreSite, ...]


_LAYER = "decoder.layers."
_HF_LAYER = "model.layers.{layer}."

OUTPUT_LAYER_KEY = "output_layer.weight"

_LLAMA = ArchitectureTable(
    params=(
        ParamAxes(
            "embedding.word_embeddings.weight",
            (Dim.vocab, Dim.hidden),
            (HfPart("model.embed_tokens.weight"),),
            stacked=False,
        ),
        ParamAxes(
            _LAYER + "self_attention.linear_qkv.layer_norm_weight",
            (Dim.hidden,),
            (HfPart(_HF_LAYER + "input_layernorm.weight"),),
        ),
        ParamAxes(
            _LAYER + "self_attention.linear_qkv.weight",
            (Dim.qkv, Dim.hidden),
            (
                HfPart(_HF_LAYER + "self_attn.q_proj.weight", "q"),
                HfPart(_HF_LAYER + "self_attn.k_proj.weight", "k"),
                HfPart(_HF_LAYER + "self_attn.v_proj.weight", "v"),
            ),
        ),
        ParamAxes(
            _LAYER + "self_attention.linear_proj.weight",
            (Dim.hidden, Dim.heads),
            (HfPart(_HF_LAYER + "self_attn.o_proj.weight"),),
        ),
        ParamAxes(
            _LAYER + "mlp.linear_fc1.layer_norm_weight",
            (Dim.hidden,),
            (HfPart(_HF_LAYER + "post_attention_layernorm.weight"),),
        ),
        ParamAxes(
            _LAYER + "mlp.linear_fc1.weight",
            (Dim.gate_up, Dim.hidden),
            (
                HfPart(_HF_LAYER + "mlp.gate_proj.weight", "gate"),
                HfPart(_HF_LAYER + "mlp.up_proj.weight", "up"),
            ),
        ),
        ParamAxes(
            _LAYER + "mlp.linear_fc2.weight",
            (Dim.hidden, Dim.ffn),
            (HfPart(_HF_LAYER + "mlp.down_proj.weight"),),
        ),
        ParamAxes(
            "decoder.final_layernorm.weight",
            (Dim.hidden,),
            (HfPart("model.norm.weight"),),
            stacked=False,
        ),
        ParamAxes(
            OUTPUT_LAYER_KEY,
            (Dim.vocab, Dim.hidden),
            (HfPart("lm_head.weight"),),
            stacked=False,
        ),
    ),
    score_sites=(
        ScoreSite("input_layernorm", "output", Axis.hidden),
        ScoreSite("pre_mlp_layernorm", "output", Axis.hidden),
        ScoreSite("self_attention.linear_proj", "input", Axis.head),
        ScoreSite("mlp.linear_fc2", "input", Axis.ffn),
    ),
)

TABLES: Mapping[Architecture, ArchitectureTable] = {
    Architecture.llama: _LLAMA,
    Architecture.mistral: _LLAMA,
}


def params_of(model: ModelConfig) -> tuple[ParamAxes, ...]:
    """The parameters of a model; a tied model has no output layer of its own."""
    params = TABLES[model.architecture].params
    if model.share_embeddings_and_output_weights:
        return tuple(p for p in params if p.key != OUTPUT_LAYER_KEY)
    return params


def score_sites_of(model: ModelConfig) -> tuple[ScoreSite, ...]:
    """Where each axis of the model is scored."""
    return TABLES[model.architecture].score_sites


def runs(dim: Dim, model: ModelConfig) -> tuple[Run, ...]:
    """Lay out one dimension as runs of units, in order."""
    match dim:
        case Dim.hidden:
            return (Run("all", Axis.hidden, 0, model.hidden_size, 1),)
        case Dim.ffn:
            return (Run("all", Axis.ffn, 0, model.ffn_hidden_size, 1),)
        case Dim.gate_up:
            size = model.ffn_hidden_size
            return (Run("gate", Axis.ffn, 0, size, 1), Run("up", Axis.ffn, 0, size, 1))
        case Dim.heads:
            return (Run("all", Axis.head, 0, model.num_attention_heads, model.kv_channels),)
        case Dim.vocab:
            return (Run("all", Axis.vocab, 0, model.vocab_size, 1),)
        case Dim.qkv:
            per_group, width = model.heads_per_group, model.kv_channels
            return tuple(
                run
                for group in range(model.num_query_groups)
                for run in (
                    Run("q", Axis.head, group * per_group, per_group, width),
                    Run("k", Axis.group, group, 1, width),
                    Run("v", Axis.group, group, 1, width),
                )
            )


def dim_size(dim: Dim, model: ModelConfig) -> int:
    """Length of a dimension."""
    return sum(run.count * run.width for run in runs(dim, model))


def layer_shape(param: ParamAxes, model: ModelConfig) -> tuple[int, ...]:
    """Shape of the parameter for one layer (or of the whole parameter, when it is not stacked)."""
    return tuple(dim_size(dim, model) for dim in param.dims)


def global_shape(param: ParamAxes, model: ModelConfig) -> tuple[int, ...]:
    """Shape of the parameter in the checkpoint, the layer dimension included."""
    shape = layer_shape(param, model)
    return (model.num_layers, *shape) if param.stacked else shape


def part_rows(dim: Dim, part: str, model: ModelConfig) -> Indices:
    """Positions along ``dim`` that one Hugging Face part fills, in the part's own row order."""
    return _positions(dim, model, lambda run: _range(run.count) if run.part == part else None)


def kept_positions(dim: Dim, model: ModelConfig, kept: Mapping[Axis, Sequence[int]]) -> Indices:
    """Positions along ``dim`` that survive when only the ``kept`` units of each axis do.

    The original order is kept. An axis absent from ``kept`` is kept whole.

    Args:
        dim: Layout of the dimension.
        model: The model before pruning.
        kept: Sorted unit numbers by axis, for the layer at hand.
    """
    units = {axis: np.asarray(numbers, dtype=np.int64) for axis, numbers in kept.items()}

    def select(run: Run) -> Indices:
        if run.axis not in units:
            return _range(run.count)
        numbers = units[run.axis]
        inside = (numbers >= run.first) & (numbers < run.first + run.count)
        return numbers[inside] - run.first

    return _positions(dim, model, select)


def num_parameters(model: ModelConfig) -> int:
    """All parameters, a tied embedding counted once."""
    return sum(int(np.prod(global_shape(param, model))) for param in params_of(model))


def num_embedding_parameters(model: ModelConfig) -> int:
    """Parameters with a vocabulary dimension: the embedding, and the output layer unless it is tied."""
    vocab_params = (param for param in params_of(model) if Dim.vocab in param.dims)
    return sum(int(np.prod(global_shape(param, model))) for param in vocab_params)


def _range(count: int) -> Indices:
    return np.arange(count, dtype=np.int64)


def _positions(dim: Dim, model: ModelConfig, select: Callable[[Run], Indices | None]) -> Indices:
    """Row numbers of the selected units of every run, run after run."""
    found: list[Indices] = []
    start = 0
    for run in runs(dim, model):
        chosen = select(run)
        if chosen is not None and len(chosen):
            rows = start + chosen[:, None] * run.width + _range(run.width)[None, :]
            found.append(rows.reshape(-1))
        start += run.count * run.width
    return np.concatenate(found) if found else _range(0)
