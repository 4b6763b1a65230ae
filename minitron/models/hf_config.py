"""Hugging Face's config.json and `ModelConfig`, both ways.

Missing keys have the defaults of transformers' own config classes. What Megatron's model here does not
compute (biases, other activations, other rotary scalings, quantised weights) is refused, never ignored.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from minitron.config.model import Architecture, ModelConfig, RopeScaling
from minitron.errors import ModelError

HfConfig = dict[str, Any]

MODEL_TYPES = {Architecture.llama: "llama", Architecture.mistral: "mistral"}
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


@dataclass(frozen=True)
class _Defaults:
    """What transformers assumes where config.json is silent."""

    max_position_embeddings: int
    num_key_value_heads: int | None
    sliding_window: int | None
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    initializer_range: float = 0.02


_DEFAULTS = {
    Architecture.llama: _Defaults(2048, None, None),
    Architecture.mistral: _Defaults(131072, 8, 4096),
}


def model_from_hf_config(config: Mapping[str, Any]) -> ModelConfig:
    """Read a config.json.

    Args:
        config: Its content; rotary settings in the style of transformers 5 (``rope_parameters``) or
            before (``rope_theta`` and ``rope_scaling``).

    Raises:
        ModelError: The architecture is not known, or the model computes something this program does not.
    """
    architecture = _architecture(config)
    _refuse_unsupported(config)
    defaults = _DEFAULTS[architecture]
    heads = _size(config, "num_attention_heads")
    hidden = _size(config, "hidden_size")
    if not config.get("head_dim") and hidden % heads:
        raise ModelError(
            f"config.json: hidden_size={hidden} is not a multiple of num_attention_heads={heads}; add head_dim"
        )
    rope = _rope(config, defaults)
    return ModelConfig(
        architecture=architecture,
        num_layers=_size(config, "num_hidden_layers"),
        hidden_size=hidden,
        ffn_hidden_size=_size(config, "intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=config.get("num_key_value_heads", defaults.num_key_value_heads) or heads,
        kv_channels=config.get("head_dim") or hidden // heads,
        vocab_size=_size(config, "vocab_size"),
        max_position_embeddings=_or(config, "max_position_embeddings", defaults.max_position_embeddings),
        layernorm_epsilon=float(_or(config, "rms_norm_eps", defaults.rms_norm_eps)),
        rotary_base=float(rope["rope_theta"]),
        rope_scaling=_rope_scaling(rope),
        # LlamaForCausalLM has no sliding window, whatever its config.json says.
        sliding_window=config.get("sliding_window", defaults.sliding_window)
        if architecture is Architecture.mistral
        else None,
        share_embeddings_and_output_weights=bool(config.get("tie_word_embeddings", False)),
        init_method_std=float(_or(config, "initializer_range", defaults.initializer_range)),
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
    config = {key: value for key, value in base.items() if key not in _STALE_KEYS}
    config |= {
        "architectures": [model.architecture.value],
        "model_type": MODEL_TYPES[model.architecture],
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.kv_channels,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.layernorm_epsilon,
        "initializer_range": model.init_method_std,
        "tie_word_embeddings": model.share_embeddings_and_output_weights,
        "hidden_act": "silu",
    }
    if model.architecture is Architecture.mistral:
        config["sliding_window"] = model.sliding_window
    if not {"rope_theta", "rope_scaling", "rope_parameters"} & config.keys():
        # The older spelling: transformers 5 reads it too.
        config["rope_theta"] = model.rotary_base
        scaling = model.rope_scaling
        config["rope_scaling"] = {"rope_type": "llama3", **asdict(scaling)} if scaling else None
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


def _architecture(config: Mapping[str, Any]) -> Architecture:
    names = config.get("architectures") or []
    if not names:  # as transformers writes it for a config without a model
        by_type = {model_type: name for name, model_type in MODEL_TYPES.items()}
        names = [by_type.get(config.get("model_type", ""), config.get("model_type"))]
    for architecture in Architecture:
        if names[0] == architecture:
            return architecture
    known = ", ".join(a.value for a in Architecture)
    raise ModelError(f"config.json: architecture {names[0]} is not known; known: {known}")


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise ModelError(f"config.json: {key}=true; models with biases are not supported")
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise ModelError(f"config.json: hidden_act={activation} is not supported; known: silu")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise ModelError(
            f"config.json: the weights are quantised (quant_method={method}); "
            "use the unquantised model, or a .gguf file"
        )


def _rope(config: Mapping[str, Any], defaults: _Defaults) -> dict[str, Any]:
    """Rotary settings in one dict, whichever style config.json has."""
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(config.get(key) or {}, Mapping):
            raise ModelError(f"config.json: {key}={config[key]!r} is not an object")
    rope = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    rope.setdefault("rope_theta", _or(config, "rope_theta", defaults.rope_theta))
    rope.setdefault("rope_type", rope.pop("type", "default"))
    original = config.get("original_max_position_embeddings")
    if original is not None:
        rope.setdefault("original_max_position_embeddings", original)
    if rope["rope_type"] not in ROPE_TYPES:
        raise ModelError(f"config.json: rope_type {rope['rope_type']} is not supported; known: {', '.join(ROPE_TYPES)}")
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1.0):
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
