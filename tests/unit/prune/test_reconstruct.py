"""Least-squares reconstruction on Megatron's own layers, against a dense one in fp64."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minitron.config.parallel import ParallelConfig
from minitron.config.prune import PruneConfig
from minitron.config.reconstruct import Linear, ReconstructConfig
from minitron.config.run import RunConfig
from minitron.config.score import Aggregation
from minitron.prune.ranking import choose
from minitron.prune.scores import random_scores
from minitron.prune.slicer import apply_spec
from minitron.prune.spec import PruneSpec
from tests.helpers.pool import WorkerPool
from tests.unit.prune import workers
from tests.unit.prune.reconstruct_reference import FINAL_NORM, heads, norm, of_layer, reconstruct
from tests.unit.prune.reference import canonical, llama, read_checkpoint, restore, shape, tokens, write_checkpoint

MODEL = shape(vocab_size=48)
TARGET = PruneConfig(hidden_size=16, ffn_hidden_size=13, num_attention_heads=4, drop_layers=[0, 2])
DAMPING = 0.02
FITTED = tuple(Linear)
LAYOUTS = {
    "one rank": ParallelConfig(),
    "TP2": ParallelConfig(tensor_model_parallel_size=2),
    "PP2": ParallelConfig(pipeline_model_parallel_size=2),
    "DP2": ParallelConfig(data_parallel_size=2),
    "TP2 x CP2": ParallelConfig(tensor_model_parallel_size=2, context_parallel_size=2),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = canonical(llama(MODEL), MODEL)
    floats = {key: tensor.float() for key, tensor in tensors.items()}
    return write_checkpoint(tmp_path_factory.mktemp("source"), floats, MODEL)


def spec_of(target: PruneConfig) -> PruneSpec:
    return choose(MODEL, target, scores=random_scores(MODEL, Aggregation.l2_mean, 0), source_id="random")


def sequences() -> Tensor:
    return tokens(MODEL, batch=7, length=12)


def job(parallel: ParallelConfig, modules: tuple[Linear, ...] = FITTED) -> RunConfig:
    fit = ReconstructConfig(damping=DAMPING, modules=list(modules))
    return RunConfig(parallel=parallel, prune=replace(TARGET, reconstruct=fit))


def fitted_by(
    pool: WorkerPool, source: Path, out: Path, spec: PruneSpec, config: RunConfig, micro_batch_size: int = 2
) -> dict[str, Tensor]:
    pool.run(workers.reconstruct, config.parallel.num_ranks, spec, source, out, sequences(), config, micro_batch_size)
    weights, model = read_checkpoint(out)
    assert model == spec.target
    return weights


def sliced_by(source: Path, out: Path, spec: PruneSpec) -> dict[str, Tensor]:
    apply_spec(spec, source=source, out=out)
    return read_checkpoint(out)[0]


@pytest.fixture(scope="module")
def one_rank(pool: WorkerPool, source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return fitted_by(pool, source, tmp_path_factory.mktemp("fitted"), spec_of(TARGET), job(ParallelConfig()))


@pytest.mark.parametrize(
    "modules",
    [
        FITTED,
        (Linear.linear_fc2,),
        (Linear.linear_proj,),
        (Linear.linear_qkv, Linear.linear_fc1),
        (Linear.output_layer,),
    ],
    ids=lambda modules: "+".join(modules),
)
def test_weights_are_the_dense_solution(
    pool: WorkerPool, source: Path, tmp_path: Path, modules: tuple[Linear, ...]
) -> None:
    spec = spec_of(TARGET)
    have = fitted_by(pool, source, tmp_path / "fitted", spec, job(ParallelConfig(), modules))
    sliced = sliced_by(source, tmp_path / "sliced", spec)
    tensors, _ = read_checkpoint(source)
    want = reconstruct(tensors, sliced, spec, sequences(), damping=DAMPING, modules=modules)
    assert have.keys() == sliced.keys() > want.keys()
    for key, tensor in have.items():
        if key in want:
            torch.testing.assert_close(tensor.double(), want[key], rtol=1e-5, atol=3e-5)
        *_, module, name = key.split(".")
        fitted = module in modules and name == "weight"  # not a reader's layer_norm_weight
        assert torch.equal(tensor, sliced[key]) != fitted, key


def test_in_front_of_a_tied_embedding_the_final_norm_is_fitted(pool: WorkerPool, tmp_path: Path) -> None:
    model = shape(vocab_size=48, share_embeddings_and_output_weights=True)
    tensors = {key: tensor.float() for key, tensor in canonical(llama(model), model).items()}
    source = write_checkpoint(tmp_path / "source", tensors, model)
    scores = random_scores(model, Aggregation.l2_mean, 0)
    spec = choose(model, TARGET, scores=scores, source_id="random")
    have = fitted_by(pool, source, tmp_path / "fitted", spec, job(ParallelConfig(), (Linear.output_layer,)))
    sliced = sliced_by(source, tmp_path / "sliced", spec)
    want = reconstruct(tensors, sliced, spec, sequences(), damping=DAMPING, modules=[Linear.output_layer])
    assert [key for key in have if not torch.equal(have[key], sliced[key])] == [FINAL_NORM]
    torch.testing.assert_close(have[FINAL_NORM].double(), want[FINAL_NORM], rtol=1e-5, atol=3e-5)


def test_reference_is_transformers_attention() -> None:
    """The hand-written reference, held against a model that it knows nothing of."""
    reference = llama(MODEL)
    weights = of_layer(canonical(reference, MODEL), 0)
    seen: list[Tensor] = []
    reference.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.no_grad():
        reference(sequences())
        stream = reference.model.embed_tokens(sequences())
        normed = norm(stream, weights["self_attention.linear_qkv.layer_norm_weight"], MODEL)
    have = heads(normed, weights["self_attention.linear_qkv.weight"], MODEL)
    torch.testing.assert_close(have, seen[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one rank"])
def test_weights_do_not_depend_on_the_layout(
    pool: WorkerPool, source: Path, one_rank: dict[str, Tensor], tmp_path: Path, layout: str
) -> None:
    have = fitted_by(pool, source, tmp_path / "out", spec_of(TARGET), job(LAYOUTS[layout]))
    assert have.keys() == one_rank.keys()
    for key, tensor in one_rank.items():
        torch.testing.assert_close(have[key], tensor, rtol=1e-6, atol=1e-6)


def test_grouping_into_micro_batches_only_rounds_otherwise(
    pool: WorkerPool, source: Path, one_rank: dict[str, Tensor], tmp_path: Path
) -> None:
    have = fitted_by(pool, source, tmp_path / "out", spec_of(TARGET), job(ParallelConfig()), micro_batch_size=3)
    for key, tensor in one_rank.items():
        torch.testing.assert_close(have[key], tensor, rtol=1e-5, atol=3e-5)


def test_keeping_everything_changes_no_bit(pool: WorkerPool, source: Path, tmp_path: Path) -> None:
    spec = PruneSpec.identity(MODEL)
    have = fitted_by(pool, source, tmp_path / "out", spec, job(ParallelConfig(data_parallel_size=2)))
    before, _ = read_checkpoint(source)
    assert all(torch.equal(have[key], tensor) for key, tensor in before.items())


def test_fitted_model_is_closer_to_the_source(source: Path, one_rank: dict[str, Tensor], tmp_path: Path) -> None:
    """On the calibration text, seen by transformers: what the fit is for."""
    spec = spec_of(TARGET)
    tensors, _ = read_checkpoint(source)
    states = []
    for weights, model in ((tensors, MODEL), (sliced_by(source, tmp_path, spec), spec.target), (one_rank, spec.target)):
        with torch.no_grad():
            last = restore({key: tensor.double() for key, tensor in weights.items()}, model).model
            seen: list[Tensor] = []
            last.norm.register_forward_pre_hook(lambda _m, args, seen=seen: seen.append(args[0]))
            last(sequences())
            states.append(seen[0])
    whole, sliced, fitted = states
    kept = whole[..., spec.hidden]
    assert (fitted - kept).square().sum() < 0.5 * (sliced - kept).square().sum()
