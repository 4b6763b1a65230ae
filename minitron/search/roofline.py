"""Latency without the device: arithmetic and memory traffic over a GPU's peaks."""

from dataclasses import dataclass

import numpy as np

from minitron.config.model import ModelConfig
from minitron.config.search import Gpu, ServingConfig, ServingDtype
from minitron.models.axes import num_embedding_parameters, num_parameters


@dataclass(frozen=True)
class Peaks:
    """What a GPU reaches at best, without sparsity.

    Attributes:
        flops: FLOP/s of the tensor cores by number format.
        bandwidth: Bytes/s of its memory.
    """

    flops: dict[ServingDtype, float]
    bandwidth: float


def _peaks(bf16_tflops: float, fp8_tflops: float, gb_per_s: float) -> Peaks:
    return Peaks({ServingDtype.bf16: bf16_tflops * 1e12, ServingDtype.fp8: fp8_tflops * 1e12}, gb_per_s * 1e9)


PEAKS = {
    Gpu.a100: _peaks(312, 0, 2039),  # refused with fp8 when the configuration is composed
    Gpu.h100: _peaks(989.4, 1978.9, 3350),
    Gpu.h200: _peaks(989.4, 1978.9, 4800),
    Gpu.b200: _peaks(2250, 4500, 8000),
    Gpu.l40s: _peaks(362, 733, 864),
}
"""NVIDIA's data sheets: A100 and H100 as SXM modules with 80 GB, H200 SXM, B200 in an HGX board, L40S."""


def matrix_parameters(model: ModelConfig) -> int:
    """Parameters that a token is multiplied with: all but an untied input embedding, which is looked up."""
    return num_parameters(model) - num_embedding_parameters(model) + model.vocab_size * model.hidden_size


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
    peaks, prompt, new = PEAKS[gpu], serving.prompt_tokens, serving.new_tokens
    flops_peak = peaks.flops[serving.dtype] * serving.tensor_model_parallel_size
    bandwidth = peaks.bandwidth * serving.tensor_model_parallel_size
    output = model.vocab_size * model.hidden_size
    weights = matrix_parameters(model)
    weight_bytes, cache = weights * serving.dtype.num_bytes, cache_bytes_per_token(model, serving)
    # Scores and values: 2 products of 2 FLOPs per query, key and channel.
    attention = 4 * model.num_layers * model.num_attention_heads * model.kv_channels

    pairs = prompt * (prompt + 1) / 2  # causal
    flops = serving.batch_size * (2 * prompt * (weights - output) + 2 * output + attention * pairs)
    moved = weight_bytes + serving.batch_size * prompt * cache
    seconds = max(flops / flops_peak, moved / bandwidth)
    contexts = prompt + np.arange(1, new + 1, dtype=np.float64)  # keys that each new token sees, itself included
    flops_each = serving.batch_size * (2 * weights + attention * contexts)
    moved_each = weight_bytes + serving.batch_size * cache * contexts
    seconds += float(np.maximum(flops_each / flops_peak, moved_each / bandwidth).sum())
    return 1e3 * seconds
