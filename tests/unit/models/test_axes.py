"""The axes table against layouts written out by hand, and published parameter counts."""

from dataclasses import replace

import numpy as np
import pytest

from minitron.config.model import Architecture, ModelConfig
from minitron.models.axes import (
    OUTPUT_LAYER_KEY,
    Axis,
    Dim,
    dim_size,
    global_shape,
    kept_positions,
    layer_shape,
    num_embedding_parameters,
    num_parameters,
    params_of,
    part_rows,
    runs,
)
from minitron.models.hf_names import blocks, hf_tensors
from tests.helpers.smollm2 import SMOLLM2_135M

# 4 query heads in 2 groups, 2 channels a head.
MODEL = ModelConfig(
    architecture=Architecture.llama,
    num_layers=3,
    hidden_size=6,
    ffn_hidden_size=5,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=2,
    vocab_size=11,
    max_position_embeddings=16,
    layernorm_epsilon=1e-5,
    rotary_base=10000.0,
)

# Rows of the fused weight, by hand: q0 q0 q1 q1 k0 k0 v0 v0 | q2 q2 q3 q3 k1 k1 v1 v1.
QKV_ROWS = {
    "q": [0, 1, 2, 3, 8, 9, 10, 11],
    "k": [4, 5, 12, 13],
    "v": [6, 7, 14, 15],
}


@pytest.mark.parametrize("part", QKV_ROWS)
def test_qkv_rows_run_group_by_group(part: str) -> None:
    assert part_rows(Dim.qkv, part, MODEL).tolist() == QKV_ROWS[part]


def test_gate_rows_precede_up_rows() -> None:
    assert part_rows(Dim.gate_up, "gate", MODEL).tolist() == [0, 1, 2, 3, 4]
    assert part_rows(Dim.gate_up, "up", MODEL).tolist() == [5, 6, 7, 8, 9]


@pytest.mark.parametrize("dim", Dim)
def test_parts_fill_a_dimension_once(dim: Dim) -> None:
    parts = {run.part for run in runs(dim, MODEL)}
    rows = np.concatenate([part_rows(dim, part, MODEL) for part in parts])
    assert sorted(rows) == list(range(dim_size(dim, MODEL)))


@pytest.mark.parametrize(
    ("dim", "kept", "positions"),
    [
        (Dim.hidden, {Axis.hidden: [0, 2, 5]}, [0, 2, 5]),
        (Dim.ffn, {Axis.ffn: [1, 4]}, [1, 4]),
        (Dim.gate_up, {Axis.ffn: [1, 4]}, [1, 4, 6, 9]),
        # One head of each group, both groups: q1 k0 v0 | q2 k1 v1.
        (Dim.qkv, {Axis.head: [1, 2]}, [2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 14, 15]),
        # The second group alone, with its two heads.
        (Dim.qkv, {Axis.head: [2, 3], Axis.group: [1]}, [8, 9, 10, 11, 12, 13, 14, 15]),
        (Dim.heads, {Axis.head: [1, 2]}, [2, 3, 4, 5]),
        (Dim.vocab, {Axis.hidden: [0]}, list(range(11))),
        (Dim.ffn, {Axis.ffn: []}, []),
    ],
)
def test_kept_positions(dim: Dim, kept: dict[Axis, list[int]], positions: list[int]) -> None:
    assert kept_positions(dim, MODEL, kept).tolist() == positions


@pytest.mark.parametrize("dim", Dim)
def test_keeping_everything_keeps_every_position(dim: Dim) -> None:
    counts = {Axis.hidden: 6, Axis.ffn: 5, Axis.head: 4, Axis.group: 2, Axis.vocab: 11}
    everything = {axis: range(count) for axis, count in counts.items()}
    assert kept_positions(dim, MODEL, everything).tolist() == list(range(dim_size(dim, MODEL)))


def test_shapes_by_hand() -> None:
    shapes = {param.key: global_shape(param, MODEL) for param in params_of(MODEL)}
    assert shapes == {
        "embedding.word_embeddings.weight": (11, 6),
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight": (3, 6),
        "decoder.layers.self_attention.linear_qkv.weight": (3, 16, 6),
        "decoder.layers.self_attention.linear_proj.weight": (3, 6, 8),
        "decoder.layers.mlp.linear_fc1.layer_norm_weight": (3, 6),
        "decoder.layers.mlp.linear_fc1.weight": (3, 10, 6),
        "decoder.layers.mlp.linear_fc2.weight": (3, 6, 5),
        "decoder.final_layernorm.weight": (6,),
        "output_layer.weight": (11, 6),
    }


def test_a_tied_model_has_no_output_layer() -> None:
    tied = replace(MODEL, share_embeddings_and_output_weights=True)
    assert OUTPUT_LAYER_KEY in {param.key for param in params_of(MODEL)}
    assert OUTPUT_LAYER_KEY not in {param.key for param in params_of(tied)}
    assert num_parameters(MODEL) - num_parameters(tied) == 11 * 6
    assert num_embedding_parameters(MODEL) == 2 * num_embedding_parameters(tied) == 2 * 11 * 6


def test_hf_tensors_run_layer_by_layer() -> None:
    tensors = hf_tensors(MODEL)
    names = [tensor.name for tensor in tensors]
    assert names[0] == "model.embed_tokens.weight"
    assert names[1] == "model.layers.0.input_layernorm.weight"
    assert names[-3:] == [
        "model.layers.2.mlp.down_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
    ]
    assert len(names) == len(set(names)) == 3 * 9 + 3
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    assert shapes["model.layers.1.self_attn.k_proj.weight"] == (4, 6)
    assert shapes["model.layers.1.mlp.up_proj.weight"] == (5, 6)
    assert len(list(blocks(MODEL))) == 3 * 6 + 3
    for param in params_of(MODEL):
        rows = sum(t.shape[0] for t in tensors if t.param is param and t.index == ((0,) if param.stacked else ()))
        assert rows == layer_shape(param, MODEL)[0]


# Published shapes: class, layers, hidden, ffn, heads, groups, vocabulary; billions in all and without embeddings
# (Minitron and Mistral-NeMo-Minitron papers and model cards; Nemotron-4 15B: its report).
PUBLISHED = {
    "Nemotron-4-15B": (Architecture.nemotron, 32, 6144, 24576, 48, 8, 256000, 15.629, 12.483),
    "Minitron-8B": (Architecture.nemotron, 32, 4096, 16384, 48, 8, 256000, 8.272, 6.175),
    "Minitron-4B": (Architecture.nemotron, 32, 3072, 9216, 24, 8, 256000, 4.191, 2.618),
    "Llama-3.1-8B": (Architecture.llama, 32, 4096, 14336, 32, 8, 128256, 8.030, 6.980),
    "Llama-3.1-Minitron-4B-Width": (Architecture.llama, 32, 3072, 9216, 32, 8, 128256, 4.513, 3.725),
    "Llama-3.1-Minitron-4B-Depth": (Architecture.llama, 16, 4096, 14336, 32, 8, 128256, 4.540, 3.490),
    "Mistral-NeMo-12B": (Architecture.mistral, 40, 5120, 14336, 32, 8, 131072, 12.248, 10.906),
    "Mistral-NeMo-Minitron-8B": (Architecture.mistral, 40, 4096, 11520, 32, 8, 131072, 8.414, 7.340),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name: str) -> None:
    architecture, layers, hidden, ffn, heads, groups, vocab, total, body = PUBLISHED[name]
    model = ModelConfig(
        architecture=architecture,
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=128,
        vocab_size=vocab,
        max_position_embeddings=8192,
        layernorm_epsilon=1e-5,
        rotary_base=500000.0,
    )
    assert round(num_parameters(model) / 1e9, 3) == total
    assert round((num_parameters(model) - num_embedding_parameters(model)) / 1e9, 3) == body


# The smallest published model of each of these families: its config.json, and what transformers counts.
EXACT = {
    "Qwen2.5-0.5B": (Architecture.qwen2, 24, 896, 4864, 14, 2, 64, 494_032_768),
    "Qwen3-0.6B": (Architecture.qwen3, 28, 1024, 3072, 16, 8, 128, 596_049_920),
}


@pytest.mark.parametrize("name", EXACT)
def test_qwen_to_the_last_parameter(name: str) -> None:
    architecture, layers, hidden, ffn, heads, groups, channels, total = EXACT[name]
    model = replace(
        MODEL,
        architecture=architecture,
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=channels,
        vocab_size=151936,
        share_embeddings_and_output_weights=True,
    )
    assert num_parameters(model) == total


def test_smollm2_135m_to_the_last_parameter() -> None:
    assert num_parameters(SMOLLM2_135M) == 134_515_008
    assert num_embedding_parameters(SMOLLM2_135M) == 49152 * 576
