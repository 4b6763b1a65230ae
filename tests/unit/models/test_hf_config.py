"""config.json both ways, against transformers' own reading of it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from minitron.config.model import Architecture, ModelConfig, RopeScaling
from minitron.errors import ModelError
from minitron.models.axes import num_parameters
from minitron.models.hf_config import check_loadable, model_from_hf_config, to_hf_config
from tests.unit.models.tiny_hf import LLAMA3_ROPE, SIZES

LLAMA: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"} | SIZES
MISTRAL: dict[str, Any] = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"} | SIZES
QWEN2: dict[str, Any] = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"} | SIZES
QWEN3: dict[str, Any] = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"} | SIZES
NEMOTRON: dict[str, Any] = {"architectures": ["NemotronForCausalLM"], "model_type": "nemotron"} | SIZES
BASES = [LLAMA, MISTRAL, QWEN2, QWEN3, NEMOTRON]
QWEN3_MOE: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 10,
    "num_experts": 6,
    "num_experts_per_tok": 2,
} | SIZES


def type_of(config: dict[str, Any]) -> str:
    return str(config["model_type"])


def by_transformers(config: dict[str, Any], folder: Path) -> Any:
    (folder / "config.json").write_text(json.dumps(config))
    return AutoConfig.from_pretrained(folder, local_files_only=True)


@pytest.mark.parametrize("base", BASES, ids=type_of)
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"head_dim": 10},
        {"head_dim": None},
        {"tie_word_embeddings": True},
        {"rope_theta": 12345.0},
        {"rope_theta": 500000.0, "rope_scaling": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}},
        {"sliding_window": 9},
        {"sliding_window": None},
        {"rms_norm_eps": 1e-4, "norm_eps": 1e-3, "initializer_range": 0.01},
    ],
    ids=lambda change: "-".join(map(str, change)) or "plain",
)
def test_reads_what_transformers_reads(base: dict[str, Any], change: dict[str, Any], tmp_path: Path) -> None:
    config = base | change
    if base is QWEN3 and change == {"head_dim": None}:  # transformers wants a number
        config["head_dim"] = 128
    ours, theirs = model_from_hf_config(config), by_transformers(config, tmp_path)
    assert ours == ModelConfig(
        architecture=Architecture(theirs.architectures[0]),
        num_layers=theirs.num_hidden_layers,
        hidden_size=theirs.hidden_size,
        ffn_hidden_size=theirs.intermediate_size,
        num_attention_heads=theirs.num_attention_heads,
        num_query_groups=theirs.num_key_value_heads,
        kv_channels=getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads,
        vocab_size=theirs.vocab_size,
        max_position_embeddings=theirs.max_position_embeddings,
        layernorm_epsilon=epsilon_of(theirs),
        rotary_base=theirs.rope_parameters["rope_theta"],
        rotary_percent=theirs.rope_parameters.get("partial_rotary_factor", 1.0),
        sliding_window=theirs.sliding_window if theirs.model_type == "mistral" else None,
        share_embeddings_and_output_weights=theirs.tie_word_embeddings,
        init_method_std=theirs.initializer_range,
    )


def epsilon_of(theirs: Any) -> float:
    return float(theirs.norm_eps if theirs.model_type == "nemotron" else theirs.rms_norm_eps)


def test_llama_without_groups_has_one_a_head(tmp_path: Path) -> None:
    config = LLAMA | {"num_key_value_heads": None}
    assert model_from_hf_config(config).num_query_groups == 4
    assert by_transformers(config, tmp_path).num_key_value_heads == 4


@pytest.mark.parametrize("base", BASES, ids=type_of)
def test_defaults_are_those_of_transformers(base: dict[str, Any], tmp_path: Path) -> None:
    silent = {"num_key_value_heads", "max_position_embeddings"}
    config = {key: value for key, value in base.items() if key not in silent}
    config |= {"num_attention_heads": 32, "hidden_size": 64}
    ours, theirs = model_from_hf_config(config), by_transformers(config, tmp_path)
    assert ours.num_query_groups == (theirs.num_key_value_heads or 32)
    assert ours.num_query_groups == (8 if base is MISTRAL else 32)
    assert ours.kv_channels == (128 if base is QWEN3 else 2) == getattr(theirs, "head_dim", 2)
    assert ours.rotary_percent == theirs.rope_parameters.get("partial_rotary_factor", 1.0)
    assert ours.init_method_std == theirs.initializer_range
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.layernorm_epsilon == epsilon_of(theirs)
    assert ours.rotary_base == theirs.rope_parameters["rope_theta"]
    assert ours.sliding_window == (theirs.sliding_window if base is MISTRAL else None)
    assert ours.share_embeddings_and_output_weights is theirs.tie_word_embeddings


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_parameters": LLAMA3_ROPE},
        {"rope_theta": 500000.0, "rope_scaling": {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"}},
        {
            "rope_theta": 500000.0,
            "rope_scaling": {"type": "llama3"}
            | {k: v for k, v in LLAMA3_ROPE.items() if k not in ("rope_theta", "rope_type")},
        },
    ],
    ids=["transformers5", "rope_scaling", "rope_scaling-type"],
)
def test_llama3_rope_in_every_spelling(rope: dict[str, Any]) -> None:
    model = model_from_hf_config(LLAMA | rope)
    assert model.rotary_base == 500000.0
    assert model.rope_scaling == RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, ["GPT2LMHeadModel", "LlamaForCausalLM", "MistralFor"]),
        ({"architectures": None, "model_type": "bert"}, ["bert", "LlamaForCausalLM"]),
        ({"attention_bias": True}, ["attention_bias"]),
        ({"mlp_bias": True}, ["mlp_bias"]),
        ({"hidden_act": "gelu"}, ["gelu", "silu"]),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ["linear", "default, llama3"]),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, ["yarn", "default, llama3"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["low_freq_factor"]),
        ({"rope_parameters": 5}, ["rope_parameters=5 is not an object"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor=0.5"]),
        ({"quantization_config": {"quant_method": "awq"}}, ["awq"]),
        ({"hidden_size": None}, ["hidden_size"]),
        ({"num_hidden_layers": "three"}, ["num_hidden_layers"]),
        ({"hidden_size": 26}, ["hidden_size=26", "head_dim"]),
    ],
)
def test_refuses_in_one_line(change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ModelError) as caught:
        model_from_hf_config(LLAMA | change)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("base", "change", "words"),
    [
        (QWEN2, {"use_sliding_window": True}, ["use_sliding_window=true", "windows"]),
        (QWEN3, {"use_sliding_window": True, "max_window_layers": 1}, ["use_sliding_window=true"]),
        (QWEN3, {"attention_bias": True}, ["attention_bias=true"]),
        (QWEN2, {"hidden_act": "gelu"}, ["hidden_act=gelu", "known: silu"]),
        (NEMOTRON, {"hidden_act": "silu"}, ["hidden_act=silu", "known: relu2"]),
        (NEMOTRON, {"attention_bias": True}, ["attention_bias=true"]),
        (NEMOTRON, {"partial_rotary_factor": 1.5}, ["rotary_percent=1.5", "at most 1"]),
        (QWEN2, {"partial_rotary_factor": 0.5}, ["partial_rotary_factor=0.5"]),
        (QWEN3_MOE, {"mlp_only_layers": [1]}, ["mlp_only_layers=[1]", "layers without experts"]),
        (QWEN3_MOE, {"decoder_sparse_step": 2}, ["decoder_sparse_step=2", "layers without experts"]),
        (QWEN3_MOE, {"num_experts_per_tok": 7}, ["moe_router_topk=7", "num_moe_experts=6"]),
        (QWEN2, {"rope_scaling": {"type": "yarn", "factor": 4.0}}, ["yarn"]),
    ],
    ids=lambda value: type_of(value) if "model_type" in value else "-".join(value),
)
def test_refuses_of_a_family(base: dict[str, Any], change: dict[str, Any], words: list[str]) -> None:
    test_refuses_in_one_line(base | change, words)


def test_a_mixture_of_experts(tmp_path: Path) -> None:
    model = model_from_hf_config(QWEN3_MOE)
    assert (model.num_moe_experts, model.moe_router_topk, model.ffn_hidden_size) == (6, 2, 10)
    assert model.moe_router_pre_softmax  # norm_topk_prob is false where it is not given
    pruned = replace(model, num_moe_experts=3, ffn_hidden_size=7, hidden_size=22)
    config = to_hf_config(pruned, QWEN3_MOE | {"norm_topk_prob": False})
    assert model_from_hf_config(config) == pruned
    theirs = AutoModelForCausalLM.from_config(by_transformers(config, tmp_path))
    assert sum(p.numel() for p in theirs.parameters()) == num_parameters(pruned)
    assert not theirs.config.norm_topk_prob


def test_pruned_shape_over_the_source(tmp_path: Path) -> None:
    base = MISTRAL | {"sliding_window": 64, "layer_types": ["sliding_attention"] * 3, "use_cache": True}
    pruned = replace(model_from_hf_config(base), num_layers=2, hidden_size=18, ffn_hidden_size=16, kv_channels=6)
    config = to_hf_config(pruned, base)
    assert model_from_hf_config(config) == pruned
    assert "layer_types" not in config
    assert config["head_dim"] == 6
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "use_cache"):
        assert config[key] == base[key]
    theirs = AutoModelForCausalLM.from_config(by_transformers(config, tmp_path))
    assert sum(p.numel() for p in theirs.parameters()) == num_parameters(pruned)


@pytest.mark.parametrize("base", BASES, ids=type_of)
@pytest.mark.parametrize("rope", [{}, {"rope_parameters": LLAMA3_ROPE}], ids=["default", "llama3"])
def test_without_a_base_everything_is_written(base: dict[str, Any], rope: dict[str, Any], tmp_path: Path) -> None:
    model = model_from_hf_config(base | rope)
    config = to_hf_config(model, {})
    assert model_from_hf_config(config) == model
    theirs = by_transformers(config, tmp_path)
    assert theirs.rope_parameters["rope_theta"] == model.rotary_base
    assert theirs.rope_parameters["rope_type"] == rope.get("rope_parameters", {}).get("rope_type", "default")


def test_a_base_of_another_model_is_refused() -> None:
    model = replace(model_from_hf_config(LLAMA), rotary_base=5.0)
    with pytest.raises(ModelError, match="rotary_base"):
        to_hf_config(model, LLAMA | {"rope_theta": 10000.0})


def test_shapes_that_transformers_refuses_are_refused_before(tmp_path: Path) -> None:
    model = replace(model_from_hf_config(LLAMA), hidden_size=22)
    with pytest.raises(ModelError, match="choose hidden_size=20 or 24"):
        check_loadable(model)
    with pytest.raises(ModelError, match="hidden_size=22"):
        to_hf_config(model, LLAMA)
    config = LLAMA | {"hidden_size": 22, "head_dim": 6}
    with pytest.raises(Exception, match="not a multiple"):  # the day this passes, drop the check
        by_transformers(config, tmp_path)
    for base in BASES[1:]:  # no other class asks for it
        check_loadable(replace(model_from_hf_config(base), hidden_size=22))
        assert by_transformers(base | {"hidden_size": 22, "head_dim": 6}, tmp_path).head_dim == 6
