"""Hugging Face's config.json and `ModelConfig`, both ways.

Missing keys have the defaults of transformers' own config classes. What Megatron's model here does not
compute (biases, other activations, other rotary scalings, quantised weights) is refused, never ignored.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from minitron.config.model import Architecture, ModelConfig, RopeScaling
from minitron.errors import ModelError

HfConfig = dict[str, Any]

ROPE_TYPES = ("default", "llama3")

# Keys that describe the source's layers, code or storage, and are wrong for another shape.
_STALE_KEYS = (
    "_name_or_path",
    "auto_map",
    "layer_types",
    "max_window_layers",
    "num_kv_heads",
    "quantization_config",
)


@dataclass(frozen=True, kw_only=True)
class _Family:
    """One architecture's config.json: its names, and what transformers assumes where it is silent.

    Attributes:
        num_key_value_heads: None: as many as query heads.
        head_dim: None: hidden size over query heads.
        writes_head_dim: Whether transformers' own config class has ``head_dim``; a model reads it either way.
        epsilon_key: Name of the norms' epsilon.
        has_window: Whether ``sliding_window`` alone limits the attention.
        has_experts: Whether every mlp is a mixture of experts.
        refused: Keys whose truth asks for something that is not computed here, and what that is.
    """

    model_type: str
    max_position_embeddings: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    writes_head_dim: bool = True
    epsilon_key: str = "rms_norm_eps"
    epsilon: float = 1e-6
    hidden_act: str = "silu"
    initializer_range: float = 0.02
    rope_theta: float = 10000.0
    partial_rotary_factor: float | None = None
    has_window: bool = False
    sliding_window: int | None = None
    has_experts: bool = False
    refused: Mapping[str, str] = field(default_factory=dict)


_BIASES = {"attention_bias": "models with biases", "mlp_bias": "models with biases"}
_QWEN_WINDOW = {"use_sliding_window": "attention windows in some of the layers"}

_FAMILIES = {
    Architecture.llama: _Family(model_type="llama", max_position_embeddings=2048, refused=_BIASES),
    Architecture.mistral: _Family(
        model_type="mistral",
        max_position_embeddings=131072,
        num_key_value_heads=8,
        has_window=True,
        sliding_window=4096,
        refused=_BIASES,
    ),
    Architecture.qwen2: _Family(
        model_type="qwen2",
        max_position_embeddings=32768,
        num_key_value_heads=32,
        writes_head_dim=False,
        refused=_QWEN_WINDOW,
    ),
    Architecture.qwen3: _Family(
        model_type="qwen3",
        max_position_embeddings=32768,
        num_key_value_heads=32,
        head_dim=128,
        refused=_BIASES | _QWEN_WINDOW,
    ),
    Architecture.nemotron: _Family(
        model_type="nemotron",
        max_position_embeddings=4096,
        epsilon_key="norm_eps",
        epsilon=1e-5,
        hidden_act="relu2",
        initializer_range=0.0134,
        partial_rotary_factor=0.5,
        refused=_BIASES,
    ),
    Architecture.qwen3_moe: _Family(
        model_type="qwen3_moe",
        max_position_embeddings=32768,
        num_key_value_heads=4,
        writes_head_dim=False,
        has_experts=True,
        refused=_BIASES | _QWEN_WINDOW | {"mlp_only_layers": "layers without experts among those with"},
    ),
}


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ModelError: The file is not one.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{file} is not a JSON object")
    return values


def model_from_hf_config(config: Mapping[str, Any]) -> ModelConfig:
    """Read a config.json.

    Args:
        config: Its content; rotary settings in the style of transformers 5 (``rope_parameters``) or
            before (``rope_theta`` and ``rope_scaling``).

    Raises:
        ModelError: The architecture is not known, or the model computes something this program does not.
    """
    architecture = _architecture(config)
    family = _FAMILIES[architecture]
    _refuse_unsupported(config, family)
    heads = _size(config, "num_attention_heads")
    hidden = _size(config, "hidden_size")
    head_dim = config.get("head_dim") or family.head_dim
    if not head_dim and hidden % heads:
        raise ModelError(
            f"config.json: hidden_size={hidden} is not a multiple of num_attention_heads={heads}; add head_dim"
        )
    rope = _rope(config, family)
    return ModelConfig(
        architecture=architecture,
        num_layers=_size(config, "num_hidden_layers"),
        hidden_size=hidden,
        ffn_hidden_size=_size(config, "moe_intermediate_size" if family.has_experts else "intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=config.get("num_key_value_heads", family.num_key_value_heads) or heads,
        kv_channels=head_dim or hidden // heads,
        vocab_size=_size(config, "vocab_size"),
        max_position_embeddings=_or(config, "max_position_embeddings", family.max_position_embeddings),
        layernorm_epsilon=float(_or(config, family.epsilon_key, family.epsilon)),
        rotary_base=float(rope["rope_theta"]),
        rotary_percent=float(rope["partial_rotary_factor"]),
        rope_scaling=_rope_scaling(rope),
        # Elsewhere it has no effect, whatever config.json says.
        sliding_window=config.get("sliding_window", family.sliding_window) if family.has_window else None,
        share_embeddings_and_output_weights=bool(config.get("tie_word_embeddings", False)),
        init_method_std=float(_or(config, "initializer_range", family.initializer_range)),
        **(_experts(config) if family.has_experts else {}),
    )


def to_hf_config(model: ModelConfig, base: Mapping[str, Any]) -> HfConfig:
    """Write the config.json of a pruned model over that of its source.

    Sizes come from ``model``; everything else (token ids, rotary settings, ...) stays as the source had it.

    Args:
        model: The model to describe.
        base: The source's config.json; may hold no sizes at all.

    Raises:
        ModelError: transformers could not build the model, or ``base`` belongs to another one.
    """
    check_loadable(model)
    family = _FAMILIES[model.architecture]
    config = {key: value for key, value in base.items() if key not in _STALE_KEYS}
    config |= {
        "architectures": [model.architecture.value],
        "model_type": family.model_type,
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "moe_intermediate_size" if family.has_experts else "intermediate_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_position_embeddings,
        family.epsilon_key: model.layernorm_epsilon,
        "initializer_range": model.init_method_std,
        "tie_word_embeddings": model.share_embeddings_and_output_weights,
        "hidden_act": family.hidden_act,
    }
    if family.has_experts:
        config.pop("num_local_experts", None)
        config |= {
            "num_experts": model.num_moe_experts,
            "num_experts_per_tok": model.moe_router_topk,
            "norm_topk_prob": not model.moe_router_pre_softmax,
        }
    if (
        family.writes_head_dim
        or "head_dim" in base
        or model.kv_channels * model.num_attention_heads != model.hidden_size
    ):
        config["head_dim"] = model.kv_channels
    if family.has_window:
        config["sliding_window"] = model.sliding_window
    if not {"rope_theta", "rope_scaling", "rope_parameters"} & config.keys():
        # The older spelling: transformers 5 reads it too.
        config["rope_theta"] = model.rotary_base
        scaling = model.rope_scaling
        config["rope_scaling"] = {"rope_type": "llama3", **asdict(scaling)} if scaling else None
        if family.partial_rotary_factor is not None:
            config["partial_rotary_factor"] = model.rotary_percent
    written = model_from_hf_config(config)
    if written != model:
        different = [name for name, value in asdict(model).items() if asdict(written)[name] != value]
        raise ModelError(
            f"hf/config.json describes another model than model.json ({', '.join(different)}); import the source again"
        )
    return config


def check_loadable(model: ModelConfig) -> None:
    """Check that transformers will build this shape (`ModelConfig.loadable_hidden_sizes`).

    Raises:
        ModelError: It will not.
    """
    nearest = model.loadable_hidden_sizes()
    if nearest:
        raise ModelError(
            f"transformers cannot load {model.architecture.value} with hidden_size={model.hidden_size}, not a multiple "
            f"of num_attention_heads={model.num_attention_heads}; choose hidden_size={' or '.join(map(str, nearest))}"
        )


def model_type_of(model: ModelConfig) -> str:
    """Name of the architecture's config class in transformers."""
    return _FAMILIES[model.architecture].model_type


def _architecture(config: Mapping[str, Any]) -> Architecture:
    names = config.get("architectures") or []
    if not names:  # as transformers writes it for a config without a model
        by_type = {family.model_type: name for name, family in _FAMILIES.items()}
        names = [by_type.get(config.get("model_type", ""), config.get("model_type"))]
    for architecture in Architecture:
        if names[0] == architecture:
            return architecture
    known = ", ".join(a.value for a in Architecture)
    raise ModelError(f"config.json: architecture {names[0]} is not known; known: {known}")


def _refuse_unsupported(config: Mapping[str, Any], family: _Family) -> None:
    for key, what in family.refused.items():
        if config.get(key):
            raise ModelError(f"config.json: {key}={json.dumps(config[key])}; {what} are not supported")
    activation = config.get("hidden_act", family.hidden_act)
    if activation != family.hidden_act:
        raise ModelError(f"config.json: hidden_act={activation} is not supported; known: {family.hidden_act}")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise ModelError(
            f"config.json: the weights are quantised (quant_method={method}); "
            "use the unquantised model, or a .gguf file"
        )


def _experts(config: Mapping[str, Any]) -> dict[str, Any]:
    if config.get("decoder_sparse_step", 1) != 1:
        raise ModelError(
            f"config.json: decoder_sparse_step={config['decoder_sparse_step']}; layers without experts among those "
            "with are not supported"
        )
    return {
        "num_moe_experts": _or(config, "num_experts", config.get("num_local_experts", 128)),
        "moe_router_topk": _or(config, "num_experts_per_tok", 8),
        "moe_router_pre_softmax": not config.get("norm_topk_prob", False),
    }


def _rope(config: Mapping[str, Any], family: _Family) -> dict[str, Any]:
    """Rotary settings in one dict, whichever style config.json has."""
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(config.get(key) or {}, Mapping):
            raise ModelError(f"config.json: {key}={config[key]!r} is not an object")
    rope = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    rope.setdefault("rope_theta", _or(config, "rope_theta", family.rope_theta))
    rope.setdefault("rope_type", rope.pop("type", "default"))
    original = config.get("original_max_position_embeddings")
    if original is not None:
        rope.setdefault("original_max_position_embeddings", original)
    if rope["rope_type"] not in ROPE_TYPES:
        raise ModelError(f"config.json: rope_type {rope['rope_type']} is not supported; known: {', '.join(ROPE_TYPES)}")
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    rope["partial_rotary_factor"] = partial = (family.partial_rotary_factor or 1.0) if partial is None else partial
    if family.partial_rotary_factor is None and partial != 1.0:
        raise ModelError(f"config.json: partial_rotary_factor={partial} is not supported; known: 1")
    return rope


def _rope_scaling(rope: Mapping[str, Any]) -> RopeScaling | None:
    if rope["rope_type"] == "default":
        return None
    names = list(RopeScaling.__dataclass_fields__)
    missing = [name for name in names if rope.get(name) is None]
    if missing:
        raise ModelError(f"config.json: rope_type llama3 needs {', '.join(missing)}")
    return RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_position_embeddings=int(rope["original_max_position_embeddings"]),
    )


def _or(config: Mapping[str, Any], key: str, default: Any) -> Any:
    """The key's value; an absent key, and a null one, mean the default."""
    value = config.get(key)
    return default if value is None else value


def _size(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ModelError(f"config.json: {key}={value!r} is not a whole number")
    return value
