"""The start of a run from scratch: distributed as Megatron-Core's, and the same at every layout."""

from dataclasses import replace
from math import sqrt
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minitron.checkpoint.folder import weights_dir
from minitron.checkpoint.store import CheckpointReader
from minitron.config.model import Architecture, ModelConfig
from minitron.config.parallel import ParallelConfig
from tests.helpers.pool import WorkerPool
from tests.unit.models import workers

LLAMA = ModelConfig(
    architecture=Architecture.llama,
    num_layers=4,
    hidden_size=64,
    ffn_hidden_size=160,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=16,
    vocab_size=99,  # padded under tensor parallelism
    max_position_embeddings=32,
    layernorm_epsilon=1e-6,
    rotary_base=10000.0,
    share_embeddings_and_output_weights=False,
    init_method_std=0.05,
)
MODELS = {
    "llama": LLAMA,
    "tied": replace(LLAMA, share_embeddings_and_output_weights=True),
    "biases": replace(LLAMA, architecture=Architecture.qwen2),
    "zero-centred norms": replace(LLAMA, architecture=Architecture.nemotron),
    "experts": replace(LLAMA, architecture=Architecture.qwen3_moe, num_moe_experts=3, moe_router_topk=2),
}
LAYOUTS = {
    "tp2": ParallelConfig(tensor_model_parallel_size=2),
    "pp2": ParallelConfig(pipeline_model_parallel_size=2),
    "interleaved": ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
    "dp2": ParallelConfig(data_parallel_size=2),
}


def weights(folder: Path) -> dict[str, Tensor]:
    reader = CheckpointReader(weights_dir(folder))
    return {key: reader.read(key, [0] * len(info.shape), info.shape) for key, info in reader.tensors.items()}


def start(
    pool: WorkerPool, folder: Path, model: ModelConfig, parallel: ParallelConfig, seed: int = 3
) -> dict[str, Tensor]:
    pool.run(workers.save_random_start, parallel.num_ranks, model, parallel, seed, folder / "work", folder / "out")
    assert not list((folder / "work" / "stage").iterdir())  # nothing is left of what was loaded
    return weights(folder / "out")


@pytest.mark.parametrize("name", MODELS)
def test_is_distributed_as_megatrons(pool: WorkerPool, tmp_path: Path, name: str) -> None:
    pool.run(workers.save_megatrons_start, 1, MODELS[name], tmp_path / "megatron")
    have, want = start(pool, tmp_path, MODELS[name], ParallelConfig()), weights(tmp_path / "megatron")
    assert have.keys() == want.keys()
    for key, theirs in want.items():
        ours = have[key]
        assert ours.shape == theirs.shape
        if theirs.std() == 0:  # norms and biases
            assert torch.equal(ours, theirs), key
            continue
        # Five standard errors of the difference of two such estimates.
        assert ours.mean().abs() < 5 * theirs.std() / sqrt(ours.numel()), key
        assert abs(ours.std() / theirs.std() - 1) < 5 / sqrt(ours.numel()), key


@pytest.fixture(scope="module")
def one(pool: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return start(pool, tmp_path_factory.mktemp("one"), LLAMA, ParallelConfig())


@pytest.mark.parametrize("name", LAYOUTS)
def test_is_the_same_at_every_layout(pool: WorkerPool, tmp_path: Path, one: dict[str, Tensor], name: str) -> None:
    other = start(pool, tmp_path / "other", LLAMA, LAYOUTS[name])
    for key, tensor in one.items():
        assert torch.equal(other[key][: len(tensor)], tensor), key  # further rows of an embedding are padding


def test_seeds_and_places_draw_their_own(pool: WorkerPool, tmp_path: Path, one: dict[str, Tensor]) -> None:
    other = start(pool, tmp_path / "other", LLAMA, ParallelConfig(), seed=4)
    qkv = "decoder.layers.self_attention.linear_qkv.weight"
    drawn = [*one[qkv], *other[qkv], one["embedding.word_embeddings.weight"], one["output_layer.weight"]]
    values = torch.cat([tensor.flatten() for tensor in drawn])
    assert len(values.unique()) > 0.95 * len(values)  # the same draw twice would halve it
