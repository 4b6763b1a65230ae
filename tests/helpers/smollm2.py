"""The architecture of SmolLM2-135M, the real model of the demo and of the benchmarks."""

from minitron.config.model import Architecture, ModelConfig

SMOLLM2_135M = ModelConfig(
    architecture=Architecture.llama,
    num_layers=30,
    hidden_size=576,
    ffn_hidden_size=1536,
    num_attention_heads=9,
    num_query_groups=3,
    kv_channels=64,
    vocab_size=49152,
    max_position_embeddings=8192,
    layernorm_epsilon=1e-5,
    rotary_base=100000.0,
    share_embeddings_and_output_weights=True,
)
