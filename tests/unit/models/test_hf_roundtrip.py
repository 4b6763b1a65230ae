"""Hugging Face folder -> checkpoint -> Hugging Face folder: bit-identical tensors, an equal config."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from minitron.checkpoint.folder import (
    SIDE_DIR,
    read_model_config,
    weights_dir,
    write_model_config,
)
from minitron.checkpoint.store import CheckpointReader, CheckpointWriter
from minitron.config.parallel import ParallelConfig
from minitron.errors import ArtefactError, CheckpointError
from minitron.models import pieces
from minitron.models.axes import global_shape, params_of
from minitron.models.hf_export import export_model, hf_logits
from minitron.models.hf_import import import_model
from minitron.models.hf_source import SINGLE_FILE
from tests.helpers.pool import WorkerPool
from tests.unit.checkpoint.workers import load_and_save
from tests.unit.models import tiny_hf, workers
from tests.unit.models.tiny_hf import VARIANTS, read_folder, save_tiny


def config_of(folder: Path) -> dict[str, Any]:
    values = AutoConfig.from_pretrained(folder, local_files_only=True).to_dict()
    return {key: value for key, value in values.items() if key != "_name_or_path"}


def assert_same_model(have: Path, want: Path) -> None:
    ours, theirs = read_folder(have), read_folder(want)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype is tensor.dtype
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip_is_bit_identical(tmp_path: Path, variant: str) -> None:
    source = save_tiny(tmp_path / "source", variant, max_shard_size="6KB")
    assert len(list(source.glob("*.safetensors"))) > 1
    import_model(source, tmp_path / "checkpoint")
    export_model(tmp_path / "checkpoint", tmp_path / "out", dtype=torch.float32, card="# card\n")
    assert_same_model(tmp_path / "out", source)
    assert config_of(tmp_path / "out") == config_of(source)
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert (tmp_path / "out" / "README.md").read_text() == "# card\n"
    tokens_BS = torch.arange(20).reshape(2, 10)
    assert torch.equal(hf_logits(tmp_path / "out", tokens_BS), hf_logits(source, tokens_BS))


def test_bf16_survives_an_fp32_checkpoint(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", dtype=torch.bfloat16)
    import_model(source, tmp_path / "checkpoint", dtype=torch.float32)
    reader = CheckpointReader(weights_dir(tmp_path / "checkpoint"))
    assert {info.dtype for info in reader.tensors.values()} == {torch.float32}
    export_model(tmp_path / "checkpoint", tmp_path / "out", dtype=torch.bfloat16)
    assert_same_model(tmp_path / "out", source)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("stored", "kept"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),  # bf16 would round it
        (torch.float32, torch.float32),
    ],
)
def test_the_checkpoint_has_the_sources_dtype(tmp_path: Path, stored: torch.dtype, kept: torch.dtype) -> None:
    source = save_tiny(tmp_path / "source", dtype=stored)
    import_model(source, tmp_path / "checkpoint")
    reader = CheckpointReader(weights_dir(tmp_path / "checkpoint"))
    assert {info.dtype for info in reader.tensors.values()} == {kept}
    export_model(tmp_path / "checkpoint", tmp_path / "out", dtype=stored)
    assert_same_model(tmp_path / "out", source)


def test_one_fp32_tensor_makes_an_fp32_checkpoint(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", dtype=torch.bfloat16)
    tensors = read_folder(source)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float() + 1e-6  # not a bf16 number
    save_file(tensors, source / SINGLE_FILE)
    import_model(source, tmp_path / "checkpoint")
    reader = CheckpointReader(weights_dir(tmp_path / "checkpoint"))
    assert {info.dtype for info in reader.tensors.values()} == {torch.float32}
    assert torch.equal(reader.read("decoder.final_layernorm.weight"), tensors["model.norm.weight"])


def test_megatron_loads_a_bf16_checkpoint_into_an_fp32_model(tmp_path: Path, pool: WorkerPool) -> None:
    source = save_tiny(tmp_path / "source", dtype=torch.bfloat16)
    import_model(source, tmp_path / "checkpoint")
    shutil.copytree(tmp_path / "checkpoint" / SIDE_DIR, tmp_path / "saved" / SIDE_DIR)
    layout = ParallelConfig(tensor_model_parallel_size=2)
    pool.run(load_and_save, 2, tmp_path / "checkpoint", tmp_path / "saved", layout)
    export_model(tmp_path / "saved", tmp_path / "out", dtype=torch.float32)
    ours, theirs = read_folder(tmp_path / "out"), read_folder(source)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor.float()) for name, tensor in theirs.items())


def test_the_dtype_is_named_as_the_source_named_it(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    (source / "config.json").write_text(json.dumps(config))
    import_model(source, tmp_path / "checkpoint", dtype=torch.bfloat16)
    export_model(tmp_path / "checkpoint", tmp_path / "out", dtype=torch.bfloat16)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["torch_dtype"] == "bfloat16"
    assert "dtype" not in written
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert loaded.dtype is torch.bfloat16


def test_canonical_rows_by_hand(tmp_path: Path) -> None:
    """4 heads in 2 groups of 6 channels: q0 q1 k0 v0 | q2 q3 k1 v1; gate, then up."""
    source = save_tiny(tmp_path / "source")
    import_model(source, tmp_path / "checkpoint")
    reader = CheckpointReader(weights_dir(tmp_path / "checkpoint"))
    theirs = read_folder(source)
    q, k, v = (theirs[f"model.layers.1.self_attn.{p}_proj.weight"] for p in "qkv")
    qkv = torch.cat([q[:12], k[:6], v[:6], q[12:], k[6:], v[6:]])
    assert torch.equal(reader.read("decoder.layers.self_attention.linear_qkv.weight")[1], qkv)
    gate, up = (theirs[f"model.layers.2.mlp.{p}_proj.weight"] for p in ("gate", "up"))
    fc1 = reader.read("decoder.layers.mlp.linear_fc1.weight")[2]
    assert torch.equal(fc1, torch.cat([gate, up]))


def test_embeddings_in_row_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "CHUNK_BYTES", 7 * 24 * 4)  # 7 rows: 96 is no multiple
    source = save_tiny(tmp_path / "source")
    import_model(source, tmp_path / "checkpoint")
    export_model(tmp_path / "checkpoint", tmp_path / "out", dtype=torch.float32)
    assert_same_model(tmp_path / "out", source)


def test_shards_have_an_index_and_the_size_asked_for(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source")
    import_model(source, tmp_path / "checkpoint")
    calls: list[tuple[int, int]] = []
    out = tmp_path / "out"
    export_model(
        tmp_path / "checkpoint",
        out,
        dtype=torch.float32,
        max_shard_bytes=15_000,
        on_progress=lambda done, total: calls.append((done, total)),
    )
    files = sorted(out.glob("*.safetensors"))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(files) == len(calls) > 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert calls[-1] == (30, 30)
    tensors = read_folder(out)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    for file in files:
        here = [n for n, shard in index["weight_map"].items() if shard == file.name]
        assert sum(tensors[name].nbytes for name in here) <= 15_000
        assert file.stat().st_mode == (out / "config.json").stat().st_mode
    assert_same_model(out, source)
    assert torch.equal(hf_logits(out, torch.arange(9)[None]), hf_logits(source, torch.arange(9)[None]))


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_import(tmp_path: Path, pool: WorkerPool, world_size: int) -> None:
    source = save_tiny(tmp_path / "source", "llama-wide-heads")
    pool.run(workers.import_by_all, world_size, source, tmp_path / "checkpoint")
    export_model(tmp_path / "checkpoint", tmp_path / "out", dtype=torch.float32)
    assert_same_model(tmp_path / "out", source)


@pytest.mark.parametrize(
    ("variant", "tp", "pp"),
    [("llama", 1, 1), ("llama", 2, 1), ("llama-tied", 2, 1), ("llama-wide-heads", 1, 3)],
)
def test_through_megatron_at_a_layout(
    tmp_path: Path, pool: WorkerPool, variant: str, tp: int, pp: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Megatron loads what was written, and export reads what Megatron saves, its padding left out."""
    monkeypatch.setitem(tiny_hf.SIZES, "vocab_size", 97)  # TP2 pads it to 98
    source = save_tiny(tmp_path / "source", variant)
    import_model(source, tmp_path / "checkpoint")
    layout = ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    pool.run(load_and_save, tp * pp, tmp_path / "checkpoint", tmp_path / "saved", layout)
    saved = CheckpointReader(weights_dir(tmp_path / "saved"))
    assert saved.tensors["embedding.word_embeddings.weight"].shape == (97 + tp - 1, 24)
    (tmp_path / "checkpoint" / SIDE_DIR).rename(tmp_path / "saved" / SIDE_DIR)
    export_model(tmp_path / "saved", tmp_path / "out", dtype=torch.float32)
    assert_same_model(tmp_path / "out", source)


def test_a_pruned_shape_loads_in_transformers(tmp_path: Path) -> None:
    import_model(save_tiny(tmp_path / "source", "llama-llama3-rope"), tmp_path / "checkpoint")
    model = replace(
        read_model_config(tmp_path / "checkpoint"),
        num_layers=2,
        hidden_size=16,
        ffn_hidden_size=17,
        num_attention_heads=2,
        num_query_groups=1,
    )
    assert model.num_attention_heads * model.kv_channels != model.hidden_size
    pruned = tmp_path / "pruned"
    (tmp_path / "checkpoint" / SIDE_DIR).rename(tmp_path / SIDE_DIR)
    writer = CheckpointWriter(weights_dir(pruned))
    for param in params_of(model):
        shape = global_shape(param, model)
        writer.write(param.key, torch.randn(shape), global_shape=shape, offsets=[0] * len(shape))
    writer.finish()
    write_model_config(pruned, model)
    (tmp_path / SIDE_DIR).rename(pruned / SIDE_DIR)
    export_model(pruned, tmp_path / "out", dtype=torch.float32)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.config.head_dim == 6
    assert loaded.config.eos_token_id == [2, 3]
    assert loaded.config.rope_parameters["rope_type"] == "llama3"
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 96
    assert hf_logits(tmp_path / "out", torch.arange(4)[None]).isfinite().all()


def test_an_export_over_weights_is_refused(tmp_path: Path) -> None:
    import_model(save_tiny(tmp_path / "source"), tmp_path / "checkpoint")
    with pytest.raises(ArtefactError, match="holds weights already"):
        export_model(tmp_path / "checkpoint", tmp_path / "source", dtype=torch.float32)


def test_an_import_over_a_checkpoint_is_refused(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source")
    import_model(source, tmp_path / "checkpoint")
    with pytest.raises(ArtefactError, match="holds a checkpoint already"):
        import_model(source, tmp_path / "checkpoint")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"share_embeddings_and_output_weights": True}, r"not known \['output_layer.weight'\]"),
        ({"num_layers": 2}, r"layer_norm_weight has shape \(3, 24\).*needs \(2, 24\)"),
        ({"vocab_size": 98}, r"word_embeddings.weight has shape \(96, 24\).*needs \(98, 24\)"),
    ],
)
def test_weights_that_are_not_those_of_model_json(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    import_model(save_tiny(tmp_path / "source"), tmp_path / "checkpoint")
    model = replace(read_model_config(tmp_path / "checkpoint"), **change)
    write_model_config(tmp_path / "checkpoint", model)
    with pytest.raises(CheckpointError, match=words):
        export_model(tmp_path / "checkpoint", tmp_path / "out", dtype=torch.float32)
    assert not (tmp_path / "out").exists()
