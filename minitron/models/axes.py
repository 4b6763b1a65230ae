"""The table of parameter axes: what every dimension of every parameter means.

The canonical model is unsharded and stored as Megatron's ``torch_dist`` checkpoint stores a homogeneous GPT: the
layers of one parameter are stacked along a leading dimension, gate rows precede up rows, and the fused QKV rows run
group by group (the group's query heads, then its key head, then its value head). Four readers depend on this table
and nothing else knows a weight layout: Hugging Face import and export, the pruning slicer, scoring, and parameter
counting. A new architecture is a new `ArchitectureTable`, not new code in four places. How units lie along one
dimension is in `minitron.models.dims`, whose names are this module's too.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from minitron.config.model import Architecture, ModelConfig
from minitron.models.dims import Axis, Dim, Indices, Run, dim_size, kept_positions, part_rows, runs

__all__ = [
    "OUTPUT_LAYER_KEY",
    "TABLES",
    "ArchitectureTable",
    "Axis",
    "Block",
    "Dim",
    "HfPart",
    "Indices",
    "ParamAxes",
    "Run",
    "ScoreSite",
    "block_of",
    "dim_size",
    "global_shape",
    "kept_positions",
    "layer_shape",
    "num_active_parameters",
    "num_embedding_parameters",
    "num_parameters",
    "params_of",
    "part_rows",
    "runs",
    "score_sites_of",
    "stack_shape",
]


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
        dims: Layout of each dimension of one layer's (one expert's) tensor, without the dimensions it is stacked over.
        hf: The Hugging Face tensors it is made of; ``{layer}`` and ``{expert}`` in a name are their numbers.
        stacked: Whether the checkpoint stacks it over layers.
        per_expert: Whether each expert of a layer has its own, stacked along the second dimension.
    """

    key: str
    dims: tuple[Dim, ...]
    hf: tuple[HfPart, ...]
    stacked: bool = True
    per_expert: bool = False


@dataclass(frozen=True)
class ScoreSite:
    """Where the activation that scores an axis is seen, inside one Megatron ``TransformerLayer``.

    Attributes:
        module: Dotted path of the module in the layer.
        sees: ``input`` or ``output`` of the module.
        axis: The axis its last dimension scores.
        expert: The expert it is in; it sees only the tokens that are routed there.
    """

    module: str
    sees: str
    axis: Axis
    expert: int | None = None


@dataclass(frozen=True, kw_only=True)
class Block:
    """What a layer computes, under the names of Megatron's ``TransformerConfig``; biases are in `ArchitectureTable`.

    Attributes:
        normalization: ``RMSNorm`` or ``LayerNorm`` (the latter with a bias).
        layernorm_zero_centered_gamma: Whether a norm multiplies by its stored weight plus one.
        activation_func: ``silu`` or ``squared_relu``.
        gated_linear_unit: Whether the mlp has a gate.
        add_qkv_bias: Whether queries, keys and values have a bias.
        qk_layernorm: Whether the queries and keys of each head pass a norm.
    """

    normalization: str = "RMSNorm"
    layernorm_zero_centered_gamma: bool = False
    activation_func: str = "silu"
    gated_linear_unit: bool = True
    add_qkv_bias: bool = False
    qk_layernorm: bool = False


@dataclass(frozen=True)
class ArchitectureTable:
    """Everything the readers need to know of one architecture."""

    block: Block
    params: tuple[ParamAxes, ...]
    score_sites: tuple[ScoreSite, ...]


OUTPUT_LAYER_KEY = "output_layer.weight"


def _outside(key: str, dims: tuple[Dim, ...], hf: str) -> ParamAxes:
    """A parameter outside the layers."""
    return ParamAxes(key, dims, (HfPart(hf),), stacked=False)


def _layer(key: str, dims: tuple[Dim, ...], **hf: str) -> ParamAxes:
    """A parameter of every layer; ``hf`` names the Hugging Face tensor of each part."""
    parts = tuple(HfPart("model.layers.{layer}." + name, part) for part, name in hf.items())
    return ParamAxes("decoder.layers." + key, dims, parts, per_expert="experts." in key)


_H, _F, _GU, _QKV, _N, _V, _D = Dim.hidden, Dim.ffn, Dim.gate_up, Dim.qkv, Dim.heads, Dim.vocab, Dim.head_dim

_EMBEDDING = _outside("embedding.word_embeddings.weight", (_V, _H), "model.embed_tokens.weight")
_FINAL_NORM = _outside("decoder.final_layernorm.weight", (_H,), "model.norm.weight")
_FINAL_NORM_BIAS = _outside("decoder.final_layernorm.bias", (_H,), "model.norm.bias")
_OUTPUT = _outside(OUTPUT_LAYER_KEY, (_V, _H), "lm_head.weight")

_INPUT_NORM = _layer("self_attention.linear_qkv.layer_norm_weight", (_H,), all="input_layernorm.weight")
_INPUT_NORM_BIAS = _layer("self_attention.linear_qkv.layer_norm_bias", (_H,), all="input_layernorm.bias")
_ATTENTION_IN = _layer(
    "self_attention.linear_qkv.weight",
    (_QKV, _H),
    q="self_attn.q_proj.weight",
    k="self_attn.k_proj.weight",
    v="self_attn.v_proj.weight",
)
_ATTENTION_IN_BIAS = _layer(
    "self_attention.linear_qkv.bias",
    (_QKV,),
    q="self_attn.q_proj.bias",
    k="self_attn.k_proj.bias",
    v="self_attn.v_proj.bias",
)
_Q_NORM = _layer("self_attention.q_layernorm.weight", (_D,), all="self_attn.q_norm.weight")
_K_NORM = _layer("self_attention.k_layernorm.weight", (_D,), all="self_attn.k_norm.weight")
_ATTENTION_OUT = _layer("self_attention.linear_proj.weight", (_H, _N), all="self_attn.o_proj.weight")

_MLP_NORM = _layer("mlp.linear_fc1.layer_norm_weight", (_H,), all="post_attention_layernorm.weight")
_MLP_NORM_BIAS = _layer("mlp.linear_fc1.layer_norm_bias", (_H,), all="post_attention_layernorm.bias")
_MLP_IN = _layer("mlp.linear_fc1.weight", (_F, _H), all="mlp.up_proj.weight")
_MLP_IN_GATED = _layer("mlp.linear_fc1.weight", (_GU, _H), gate="mlp.gate_proj.weight", up="mlp.up_proj.weight")
_MLP_OUT = _layer("mlp.linear_fc2.weight", (_H, _F), all="mlp.down_proj.weight")

_SPARSE_NORM = _layer("pre_mlp_layernorm.weight", (_H,), all="post_attention_layernorm.weight")
_ROUTER = _layer("mlp.router.weight", (Dim.experts, _H), all="mlp.gate.weight")
_EXPERT_IN = _layer(
    "mlp.experts.experts.linear_fc1.weight",
    (_GU, _H),
    gate="mlp.experts.{expert}.gate_proj.weight",
    up="mlp.experts.{expert}.up_proj.weight",
)
_EXPERT_OUT = _layer("mlp.experts.experts.linear_fc2.weight", (_H, _F), all="mlp.experts.{expert}.down_proj.weight")

_SCORE_SITES = (
    ScoreSite("input_layernorm", "output", Axis.hidden),
    ScoreSite("pre_mlp_layernorm", "output", Axis.hidden),
    ScoreSite("self_attention.linear_proj", "input", Axis.head),
    ScoreSite("mlp.linear_fc2", "input", Axis.ffn),
)

_LLAMA = ArchitectureTable(
    Block(),
    (
        _EMBEDDING,
        *(_INPUT_NORM, _ATTENTION_IN, _ATTENTION_OUT),
        *(_MLP_NORM, _MLP_IN_GATED, _MLP_OUT),
        *(_FINAL_NORM, _OUTPUT),
    ),
    _SCORE_SITES,
)
_QWEN2 = ArchitectureTable(
    Block(add_qkv_bias=True),
    (
        _EMBEDDING,
        *(_INPUT_NORM, _ATTENTION_IN, _ATTENTION_IN_BIAS, _ATTENTION_OUT),
        *(_MLP_NORM, _MLP_IN_GATED, _MLP_OUT),
        *(_FINAL_NORM, _OUTPUT),
    ),
    _SCORE_SITES,
)
_QWEN3 = ArchitectureTable(
    Block(qk_layernorm=True),
    (
        _EMBEDDING,
        *(_INPUT_NORM, _ATTENTION_IN, _Q_NORM, _K_NORM, _ATTENTION_OUT),
        *(_MLP_NORM, _MLP_IN_GATED, _MLP_OUT),
        *(_FINAL_NORM, _OUTPUT),
    ),
    _SCORE_SITES,
)
_NEMOTRON = ArchitectureTable(
    Block(
        normalization="LayerNorm",
        layernorm_zero_centered_gamma=True,
        activation_func="squared_relu",
        gated_linear_unit=False,
    ),
    (
        _EMBEDDING,
        *(_INPUT_NORM, _INPUT_NORM_BIAS, _ATTENTION_IN, _ATTENTION_OUT),
        *(_MLP_NORM, _MLP_NORM_BIAS, _MLP_IN, _MLP_OUT),
        *(_FINAL_NORM, _FINAL_NORM_BIAS, _OUTPUT),
    ),
    _SCORE_SITES,
)

_QWEN3_MOE = ArchitectureTable(
    Block(qk_layernorm=True),
    (
        _EMBEDDING,
        *(_INPUT_NORM, _ATTENTION_IN, _Q_NORM, _K_NORM, _ATTENTION_OUT),
        *(_SPARSE_NORM, _ROUTER, _EXPERT_IN, _EXPERT_OUT),
        *(_FINAL_NORM, _OUTPUT),
    ),
    (*_SCORE_SITES[:3], ScoreSite("mlp.experts.local_experts.{expert}.linear_fc2", "input", Axis.ffn)),
)

TABLES: Mapping[Architecture, ArchitectureTable] = {
    Architecture.llama: _LLAMA,
    Architecture.mistral: _LLAMA,
    Architecture.qwen2: _QWEN2,
    Architecture.qwen3: _QWEN3,
    Architecture.nemotron: _NEMOTRON,
    Architecture.qwen3_moe: _QWEN3_MOE,
}


def params_of(model: ModelConfig) -> tuple[ParamAxes, ...]:
    """The parameters of a model; a tied model has no output layer of its own."""
    params = TABLES[model.architecture].params
    if model.share_embeddings_and_output_weights:
        return tuple(p for p in params if p.key != OUTPUT_LAYER_KEY)
    return params


def block_of(model: ModelConfig) -> Block:
    """What a layer of the model computes."""
    return TABLES[model.architecture].block


def score_sites_of(model: ModelConfig) -> tuple[ScoreSite, ...]:
    """Where each axis of the model is scored; a site inside an expert once for each."""
    sites: list[ScoreSite] = []
    for site in TABLES[model.architecture].score_sites:
        if "{expert}" not in site.module:
            sites.append(site)
            continue
        for expert in range(model.num_moe_experts or 0):
            sites.append(replace(site, module=site.module.format(expert=expert), expert=expert))
    return tuple(sites)


def layer_shape(param: ParamAxes, model: ModelConfig) -> tuple[int, ...]:
    """Shape of the parameter for one layer (for one expert of it; of the whole parameter, when it is not stacked)."""
    return tuple(dim_size(dim, model) for dim in param.dims)


def global_shape(param: ParamAxes, model: ModelConfig) -> tuple[int, ...]:
    """Shape of the parameter in the checkpoint, the dimensions that it is stacked over included."""
    return (*stack_shape(param, model), *layer_shape(param, model))


def stack_shape(param: ParamAxes, model: ModelConfig) -> tuple[int, ...]:
    """The dimensions that the parameter is stacked over in the checkpoint: layers, and experts of a layer."""
    if not param.stacked:
        return ()
    return (model.num_layers, model.num_moe_experts or 0) if param.per_expert else (model.num_layers,)


def num_parameters(model: ModelConfig) -> int:
    """All parameters, a tied embedding counted once."""
    return sum(int(np.prod(global_shape(param, model))) for param in params_of(model))


def num_embedding_parameters(model: ModelConfig) -> int:
    """Parameters with a vocabulary dimension: the embedding, and the output layer unless it is tied."""
    vocab_params = (param for param in params_of(model) if Dim.vocab in param.dims)
    return sum(int(np.prod(global_shape(param, model))) for param in vocab_params)


def num_active_parameters(model: ModelConfig) -> int:
    """Parameters that one token passes through: of the experts, those that it is routed to."""
    chosen = (model.moe_router_topk or 0) / (model.num_moe_experts or 1)
    experts = sum(int(np.prod(global_shape(param, model))) for param in params_of(model) if param.per_expert)
    return num_parameters(model) - experts + round(experts * chosen)
