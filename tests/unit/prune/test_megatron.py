"""Real Megatron-Core layers at several layouts, against transformers."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from minitron.config.parallel import ParallelConfig
from minitron.config.prune import HeadResidual, PruneConfig
from minitron.config.score import Aggregation, HeadNorm, ScoreConfig
from minitron.prune.ranking import choose
from minitron.prune.scores import Scores, random_scores
from minitron.prune.slicer import apply_spec
from tests.helpers.pool import WorkerPool
from tests.unit.prune import workers
from tests.unit.prune.reference import (
    canonical,
    llama,
    logits,
    read_checkpoint,
    shape,
    tokens,
    write_checkpoint,
)

MODEL = shape(vocab_size=48)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = canonical(teacher(), MODEL)
    floats = {key: tensor.float() for key, tensor in tensors.items()}
    return write_checkpoint(tmp_path_factory.mktemp("source"), floats, MODEL)


@pytest.fixture(scope="module")
def one_rank(pool: WorkerPool, source: Path) -> Scores:
    return pool.run(workers.score, 1, source, sequences(), ParallelConfig(), config(4))[0]


def config(micro_batch_size: int) -> ScoreConfig:
    return ScoreConfig(micro_batch_size=micro_batch_size, aggregations=list(Aggregation))


def teacher() -> LlamaForCausalLM:
    """Weights that fp32 holds exactly, computing in fp64."""
    return llama(MODEL).float().double()


def sequences() -> Tensor:
    return tokens(MODEL, batch=7, length=12)


def seen_by_transformers() -> tuple[dict[str, list[Tensor]], list[Tensor]]:
    """Activations [B, S, X] by module, in layer order; and the hidden states around the layers."""
    reference = teacher()
    seen: dict[str, list[Tensor]] = {}
    states: list[Tensor] = []

    def keep(name: str, what: str) -> object:
        def hook(_module: object, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen.setdefault(name, []).append(args[0] if what == "input" else output)

        return hook

    for layer in reference.model.layers:
        layer.input_layernorm.register_forward_hook(keep("norm", "output"))
        layer.post_attention_layernorm.register_forward_hook(keep("norm", "output"))
        layer.self_attn.o_proj.register_forward_hook(keep("head", "input"))
        layer.mlp.down_proj.register_forward_hook(keep("ffn", "input"))
        layer.register_forward_pre_hook(lambda _m, args: states.append(args[0]))
    reference.model.norm.register_forward_pre_hook(lambda _m, args: states.append(args[0]))
    logits(reference, sequences())
    return seen, states


def test_scores_match_transformers(one_rank: Scores) -> None:
    seen, states = seen_by_transformers()
    assert one_rank.num_samples == 7
    width = one_rank.width[Aggregation.l2_mean]

    def l2_mean(activations: list[Tensor]) -> np.ndarray:
        return np.stack([a.abs().mean(1).norm(dim=0).numpy() for a in activations])

    heads = [a.unflatten(2, (MODEL.num_attention_heads, -1)).norm(dim=3) for a in seen["head"]]
    cosine = [torch.cosine_similarity(a, b, dim=-1) for a, b in pairwise(states)]
    np.testing.assert_allclose(width.hidden, l2_mean(seen["norm"]), rtol=1e-7)
    np.testing.assert_allclose(width.ffn, l2_mean(seen["ffn"]), rtol=1e-7)
    np.testing.assert_allclose(width.head, l2_mean(heads), rtol=1e-7)
    layer = np.array([float(1 - c.mean()) for c in cosine])
    np.testing.assert_allclose(one_rank.layer, layer, rtol=1e-7)


@pytest.mark.parametrize(
    ("tp", "pp", "cp", "dp"), [(2, 1, 1, 2), (1, 2, 1, 2), (2, 2, 1, 1), (1, 3, 1, 1), (1, 2, 2, 1), (1, 1, 2, 2)]
)
def test_scores_do_not_depend_on_the_layout(
    pool: WorkerPool, source: Path, one_rank: Scores, tp: int, pp: int, cp: int, dp: int
) -> None:
    parallel = ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        data_parallel_size=dp,
    )
    by_rank = pool.run(workers.score, parallel.num_ranks, source, sequences(), parallel, config(2))
    for scores in by_rank:
        assert scores.num_samples == 7
        np.testing.assert_allclose(scores.layer, one_rank.layer, rtol=1e-9)
        for aggregation, want in one_rank.width.items():
            have = scores.width[aggregation]
            for axis in ("ffn", "head", "hidden"):
                np.testing.assert_allclose(
                    getattr(have, axis), getattr(want, axis), rtol=1e-9, err_msg=str(aggregation)
                )


def test_channel_norm_joins_over_tensor_parallel_ranks(pool: WorkerPool, source: Path) -> None:
    seen, _ = seen_by_transformers()
    parallel = ParallelConfig(tensor_model_parallel_size=2)
    by_channel = ScoreConfig(head_norm=HeadNorm.channel)
    scores = pool.run(workers.score, 2, source, sequences(), parallel, by_channel)[0]
    channels = [a.abs().mean(1).norm(dim=0) for a in seen["head"]]
    want = np.stack([c.unflatten(0, (MODEL.num_attention_heads, -1)).norm(dim=1) for c in channels])
    np.testing.assert_allclose(scores.width[Aggregation.l2_mean].head, want, rtol=1e-7)


def test_any_number_of_ranks_prunes_to_the_same_bits(pool: WorkerPool, source: Path, tmp_path: Path) -> None:
    target = PruneConfig(
        num_layers=3, hidden_size=12, ffn_hidden_size=9, num_attention_heads=4, head_residual=HeadResidual.paper
    )
    scores = random_scores(MODEL, Aggregation.l2_mean, 0)
    spec = choose(MODEL, target, scores=scores, source_id="random")
    apply_spec(spec, source=source, out=tmp_path / "one")
    pool.run(workers.prune, 3, spec, source, tmp_path / "three")
    (one, model), (three, other) = (read_checkpoint(tmp_path / n) for n in ("one", "three"))
    assert model == other == spec.target
    assert one.keys() == three.keys()
    assert all(torch.equal(three[key], tensor) for key, tensor in one.items())
