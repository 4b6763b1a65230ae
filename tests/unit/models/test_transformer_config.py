"""What Megatron is told of FP8, and that Transformer Engine's and Megatron's own layers share their names."""

import pytest
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
from megatron.core.transformer.transformer_config import TransformerConfig

from minitron.config.compose import compose_run
from minitron.config.model import Architecture, ModelConfig
from minitron.config.parallel import ParallelConfig
from minitron.config.run import Device
from minitron.models.axes import params_of
from minitron.models.transformer_config import transformer_config

MODEL = ModelConfig(
    architecture=Architecture.llama,
    num_layers=4,
    hidden_size=64,
    ffn_hidden_size=128,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=16,
    vocab_size=96,
    max_position_embeddings=64,
    layernorm_epsilon=1e-5,
    rotary_base=10000.0,
)


def told(*overrides: str) -> TransformerConfig:
    precision = compose_run(["source.kind=random", *overrides]).precision
    return transformer_config(MODEL, ParallelConfig(), precision, device=Device.cpu, initialize=False)


@pytest.mark.parametrize(
    ("name", "format", "recipe"),
    [
        ("fp8_delayed", "hybrid", "delayed"),
        ("fp8_current", "hybrid", "tensorwise"),
        ("fp8_blockwise", "e4m3", "blockwise"),
        ("mxfp8", "e4m3", "mxfp8"),
    ],
)
def test_megatron_gets_the_recipe(name: str, format: str, recipe: str) -> None:
    config = told(f"precision={name}")
    assert (config.fp8, config.fp8_recipe, config.bf16, config.fp8_param) == (format, recipe, True, False)
    assert config.first_last_layers_bf16 == (name == "fp8_current")


def test_megatron_gets_the_settings_of_a_recipe() -> None:
    delayed = told("precision=fp8_delayed", "precision.fp8_amax_history_len=16", "precision.fp8_amax_compute_algo=max")
    assert (delayed.fp8_amax_history_len, delayed.fp8_amax_compute_algo) == (16, "max")
    ends = told("precision=fp8_current", "precision.num_layers_at_start_in_bf16=2", "precision.fp8=e4m3")
    assert (ends.fp8, ends.num_layers_at_start_in_bf16, ends.num_layers_at_end_in_bf16) == ("e4m3", 2, 1)


def test_without_fp8_megatron_hears_nothing_of_it() -> None:
    assert told("precision=bf16", "precision.fp8_recipe=mxfp8").fp8 is None


def test_checkpoint_names_are_transformer_engines() -> None:
    """Its linears hold the norm before them; Megatron saves its own norms, modules of their own, under those names."""
    renamed = get_gpt_layer_local_submodules(normalization="RMSNorm").sharded_state_dict_keys_map
    saved = {f"{new}weight" for new in renamed.values()}
    norms = {p.key.removeprefix("decoder.layers.") for p in params_of(MODEL) if p.stacked and len(p.dims) == 1}
    assert saved == norms == {"self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight"}
