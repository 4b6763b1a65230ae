"""Latency and memory by hand, where one of the two peaks binds everywhere."""

from dataclasses import replace

import pytest

from minitron.config.gpus import GPUS, Gpu
from minitron.config.model import Architecture
from minitron.config.search import ServingConfig, ServingDtype
from minitron.search.roofline import matrix_parameters, roofline_ms
from tests.helpers.smollm2 import SMOLLM2_135M

WEIGHTS = 134_515_008  # tied: the embedding is the output layer too
OUTPUT = 49152 * 576


def test_one_sequence_is_bound_by_memory() -> None:
    """A short prompt and each new token read all weights once, and the cache so far."""
    serving = ServingConfig(batch_size=1, prompt_tokens=10, new_tokens=3)
    cache = 30 * 2 * 3 * 64 * 2
    moved = 4 * 2 * WEIGHTS + cache * (10 + 11 + 12 + 13)
    assert roofline_ms(SMOLLM2_135M, serving, Gpu.h100) == pytest.approx(1e3 * moved / 3.35e12, rel=1e-12)


def test_a_long_prompt_is_bound_by_arithmetic() -> None:
    serving = ServingConfig(batch_size=8, prompt_tokens=4096, new_tokens=0)
    matrices = 2 * (4096 * (WEIGHTS - OUTPUT) + OUTPUT)
    attention = sum(4 * 30 * 9 * 64 * (position + 1) for position in range(4096))
    expected = 1e3 * 8 * (matrices + attention) / 312e12
    assert roofline_ms(SMOLLM2_135M, serving, Gpu.a100) == pytest.approx(expected, rel=1e-12)


def test_ranks_divide_and_an_untied_embedding_is_only_looked_up() -> None:
    serving = ServingConfig(batch_size=2, prompt_tokens=64, new_tokens=16, dtype=ServingDtype.fp8)
    alone = roofline_ms(SMOLLM2_135M, serving, Gpu.b200)
    shared = roofline_ms(SMOLLM2_135M, replace(serving, tensor_model_parallel_size=4), Gpu.b200)
    assert shared == pytest.approx(alone / 4, rel=1e-12)
    untied = replace(SMOLLM2_135M, share_embeddings_and_output_weights=False)
    assert roofline_ms(untied, serving, Gpu.b200) == alone


def test_every_gpu_has_its_peaks() -> None:
    assert set(GPUS) == set(Gpu)


def test_experts_are_read_as_far_as_tokens_reach() -> None:
    """8 of 2 a token: one new token reads 2 of them, a prompt of 3 tokens 6, and each token computes with 2."""
    experts = replace(
        SMOLLM2_135M, architecture=Architecture.qwen3_moe, ffn_hidden_size=96, num_moe_experts=8, moe_router_topk=2
    )
    expert, norms_and_router = 30 * 3 * 576 * 96, 30 * (2 * 64 + 8 * 576)  # two norms of 64 for queries and keys
    others = WEIGHTS - 30 * 3 * 576 * 1536 + norms_and_router
    assert matrix_parameters(experts) == others + 2 * expert
    serving = ServingConfig(batch_size=1, prompt_tokens=3, new_tokens=1)
    cache = 30 * 2 * 3 * 64 * 2
    moved = 2 * (others + 6 * expert) + 2 * (others + 2 * expert) + cache * (3 + 4)
    assert roofline_ms(experts, serving, Gpu.h100) == pytest.approx(1e3 * moved / 3.35e12, rel=1e-12)
