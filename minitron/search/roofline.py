"""Latency without the device: arithmetic and memory traffic over a GPU's peaks."""

from dataclasses import replace

import numpy as np

from minitron.config.gpus import GPUS, Gpu
from minitron.config.model import ModelConfig
from minitron.config.search import ServingConfig
from minitron.models.axes import num_active_parameters, num_embedding_parameters, num_parameters


def matrix_parameters(model: ModelConfig) -> int:
    """Parameters that a token is multiplied with.

    All but an untied input embedding, which is looked up, and the experts that it is not routed to.
    """
    return num_active_parameters(model) - num_embedding_parameters(model) + model.vocab_size * model.hidden_size


def _read_parameters(model: ModelConfig, tokens: int) -> int:
    """Parameters that a pass reads at least: of the experts, as many as its tokens can be routed to."""
    if model.num_moe_experts is None or model.moe_router_topk is None:
        return matrix_parameters(model)
    return matrix_parameters(replace(model, moe_router_topk=min(model.num_moe_experts, tokens * model.moe_router_topk)))


def cache_bytes_per_token(model: ModelConfig, serving: ServingConfig) -> int:
    """Keys and values of one token in all layers."""
    return 2 * model.num_layers * model.num_query_groups * model.kv_channels * serving.dtype.num_bytes


def memory_bytes(model: ModelConfig, serving: ServingConfig) -> int:
    """Weights, and the cache of a whole batch at its longest."""
    tokens = serving.batch_size * (serving.prompt_tokens + serving.new_tokens)
    return num_parameters(model) * serving.dtype.num_bytes + tokens * cache_bytes_per_token(model, serving)


def roofline_ms(model: ModelConfig, serving: ServingConfig, gpu: Gpu) -> float:
    """Time of one batch, if every pass were bound by arithmetic or by memory alone.

    A lower bound: nothing is counted for launches, norms or communication, so depth looks cheaper than it is. The
    prompt is one pass, each new token another; logits are computed for the last position only. Tensor-parallel ranks
    divide the work.

    Args:
        model: The architecture.
        serving: Batch, lengths, number format, ranks.
        gpu: Whose peaks.
    """
    figures, prompt, new = GPUS[gpu], serving.prompt_tokens, serving.new_tokens
    flops_peak = 1e12 * figures.tflops[serving.dtype] * serving.tensor_model_parallel_size
    bandwidth = figures.bandwidth * serving.tensor_model_parallel_size
    output = model.vocab_size * model.hidden_size
    weights = matrix_parameters(model)
    prompt_bytes, token_bytes = (
        serving.dtype.num_bytes * _read_parameters(model, serving.batch_size * tokens) for tokens in (prompt, 1)
    )
    cache = cache_bytes_per_token(model, serving)
    # Scores and values: 2 products of 2 FLOPs per query, key and channel.
    attention = 4 * model.num_layers * model.num_attention_heads * model.kv_channels

    pairs = prompt * (prompt + 1) / 2  # causal
    flops = serving.batch_size * (2 * prompt * (weights - output) + 2 * output + attention * pairs)
    moved = prompt_bytes + serving.batch_size * prompt * cache
    seconds = max(flops / flops_peak, moved / bandwidth)
    contexts = prompt + np.arange(1, new + 1, dtype=np.float64)  # keys that each new token sees, itself included
    flops_each = serving.batch_size * (2 * weights + attention * contexts)
    moved_each = token_bytes + serving.batch_size * cache * contexts
    seconds += float(np.maximum(flops_each / flops_peak, moved_each / bandwidth).sum())
    return 1e3 * seconds
