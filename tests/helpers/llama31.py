"""Llama-3.1-8B's architecture."""

from minitron.config.model import Architecture, ModelConfig, RopeScaling

LLAMA_8B = ModelConfig(
    architecture=Architecture.llama,
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=128,
    vocab_size=128256,
    max_position_embeddings=131072,
    layernorm_epsilon=1e-5,
    rotary_base=500000.0,
    rope_scaling=RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    ),
)
