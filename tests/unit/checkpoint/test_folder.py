"""The checkpoint folder: what is in it, and what is said when something is not."""

from dataclasses import replace
from pathlib import Path

import pytest

from minitron.checkpoint.folder import (
    copy_side_files,
    read_model_config,
    side_dir,
    weights_dir,
    write_model_config,
)
from minitron.config.model import Architecture, ModelConfig, RopeScaling
from minitron.errors import ArtefactError, CheckpointError, ModelError

MODEL = ModelConfig(
    architecture=Architecture.mistral,
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
    sliding_window=7,
)
SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8)


@pytest.mark.parametrize("model", [MODEL, replace(MODEL, rope_scaling=SCALING)])
def test_model_config_reads_back(tmp_path: Path, model: ModelConfig) -> None:
    write_model_config(tmp_path / "new", model)
    assert read_model_config(tmp_path / "new") == model


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        read_model_config(tmp_path / "absent")
    (tmp_path / "other.txt").touch()
    with pytest.raises(CheckpointError, match=r"has no model\.json.*other\.txt"):
        read_model_config(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no hf/config\.json"):
        side_dir(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no hf/config\.json"):
        copy_side_files(tmp_path, tmp_path / "out")
    assert weights_dir(tmp_path) == tmp_path / "weights"


def test_a_model_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        read_model_config(tmp_path)
    (tmp_path / "model.json").write_text('{"architecture": "LlamaForCausalLM", "depth": 3}')
    with pytest.raises(ModelError, match="depth"):
        read_model_config(tmp_path)


def test_side_files_are_copied_whole(tmp_path: Path) -> None:
    source = tmp_path / "a" / "hf"
    (source / "sub").mkdir(parents=True)
    (source / "config.json").write_text("{}")
    (source / "sub" / "x").write_text("y")
    copy_side_files(tmp_path / "a", tmp_path / "b")
    assert (side_dir(tmp_path / "b") / "sub" / "x").read_text() == "y"


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ArtefactError, match="cannot write"):
        write_model_config(tmp_path / "file", MODEL)
