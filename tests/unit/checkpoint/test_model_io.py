"""Megatron's sharded checkpoints of a real GPTModel against `store`, at several layouts, bit for bit."""

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minitron.checkpoint.folder import read_model_config, weights_dir, write_model_config
from minitron.checkpoint.store import CheckpointReader, CheckpointWriter
from minitron.config.model import Architecture, ModelConfig
from minitron.config.parallel import ParallelConfig
from minitron.models.axes import global_shape, params_of
from tests.helpers.pool import WorkerPool
from tests.unit.checkpoint import workers

MODEL = ModelConfig(
    architecture=Architecture.llama,
    num_layers=4,
    hidden_size=12,
    ffn_hidden_size=10,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=4,  # 4 x 4 != 12
    vocab_size=15,  # TP2 pads it to 16
    max_position_embeddings=16,
    layernorm_epsilon=1e-5,
    rotary_base=10000.0,
)
TIED = replace(MODEL, share_embeddings_and_output_weights=True)
FC2 = "decoder.layers.mlp.linear_fc2.weight"
EMBEDDING = "embedding.word_embeddings.weight"


def write_random(folder: Path, model: ModelConfig) -> dict[str, Tensor]:
    """Write a checkpoint folder; tensors are cut unevenly along their first dimension."""
    generator = torch.Generator().manual_seed(0)
    writer = CheckpointWriter(weights_dir(folder))
    tensors = {}
    for param in params_of(model):
        shape = global_shape(param, model)
        tensor = tensors[param.key] = torch.randn(shape, generator=generator)
        rest = (0,) * (len(shape) - 1)
        for first, last in ((0, 1), (1, shape[0])):
            writer.write(param.key, tensor[first:last], global_shape=shape, offsets=(first, *rest))
    writer.finish()
    write_model_config(folder, model)
    return tensors


def layout(tp: int, pp: int, vp: int | None = None) -> ParallelConfig:
    return ParallelConfig(
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, virtual_pipeline_model_parallel_size=vp
    )


@pytest.mark.parametrize(
    ("model", "tp", "pp", "vp"),
    [
        (MODEL, 1, 1, None),
        (MODEL, 2, 1, None),
        (MODEL, 1, 2, None),
        (TIED, 1, 2, None),
        (TIED, 2, 2, None),
        (TIED, 1, 2, 2),
        (replace(MODEL, num_layers=6), 2, 2, 2),  # chunks of 2, 1, 2 and 1 layers
    ],
    ids=["1x1", "tp2", "pp2", "tied-pp2", "tied-tp2-pp2", "tied-pp2-vp2", "tp2-pp2-vp2"],
)
def test_every_layout_saves_what_it_loaded(
    tmp_path: Path, pool: WorkerPool, model: ModelConfig, tp: int, pp: int, vp: int | None
) -> None:
    tensors = write_random(tmp_path / "written", model)
    pool.run(workers.load_and_save, tp * pp, tmp_path / "written", tmp_path / "saved", layout(tp, pp, vp))
    assert read_model_config(tmp_path / "saved") == model
    reader = CheckpointReader(weights_dir(tmp_path / "saved"))
    assert reader.tensors.keys() == tensors.keys()
    padded = model.vocab_size + model.vocab_size % tp
    for key, tensor in tensors.items():
        have = reader.read(key)
        if len(tensor) == model.vocab_size:
            assert have.shape == (padded, model.hidden_size)
            have = have[: model.vocab_size]
        assert torch.equal(have, tensor), key
    # A box across the borders of both the stages and the ranks' columns.
    assert torch.equal(reader.read(FC2, (1, 3, 2), (2, 5, 7)), tensors[FC2][1:3, 3:8, 2:9])


def drop_key(folder: Path) -> None:
    file = weights_dir(folder) / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    del metadata.state_dict_metadata[FC2]
    file.write_bytes(pickle.dumps(metadata))


def cut_short(folder: Path) -> None:
    file = weights_dir(folder) / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:3000])


def remove_file(folder: Path) -> None:
    (weights_dir(folder) / "__0_0.distcp").unlink()


def remove_metadata(folder: Path) -> None:
    (weights_dir(folder) / ".metadata").unlink()


def other_shape(folder: Path) -> None:
    write_model_config(folder, replace(MODEL, ffn_hidden_size=8))


@pytest.mark.parametrize("breakage", [drop_key, cut_short, remove_file, remove_metadata, other_shape])
def test_what_cannot_be_loaded_is_said_in_one_line(tmp_path: Path, pool: WorkerPool, breakage: object) -> None:
    folder = tmp_path / "c"
    write_random(folder, MODEL)
    assert callable(breakage)
    breakage(folder)
    words = {drop_key: FC2, other_shape: "mlp.linear_fc", cut_short: "cut short", remove_file: "__0_0.distcp"}
    for said in pool.run(workers.load_error, 2, folder, layout(2, 1)):
        assert str(weights_dir(folder)) in said
        assert "\n" not in said
        assert words.get(breakage, "") in said
