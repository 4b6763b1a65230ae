"""Importance by taking layers out, on Megatron-Core at several layouts, against transformers in fp64."""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from minitron.config.depth import DepthPlan
from minitron.config.model import ModelConfig
from minitron.config.parallel import ParallelConfig
from minitron.config.precision import Dtype
from minitron.config.score import DepthMetric
from minitron.prune.questions import Question
from tests.helpers.pool import WorkerPool
from tests.unit.prune import workers
from tests.unit.prune.reference import FAMILIES, canonical, hf_model, logits, shape, tokens, write_checkpoint

MODEL = shape(vocab_size=48, num_layers=5)
ON_TEXT = (DepthMetric.block_importance, DepthMetric.loss, DepthMetric.logit_mse)
QUESTIONS = [
    Question(["The sky is"] * 3, [" blue", "loud", " made of"], 0),
    Question(["Water"] * 2, ["runs", "walks up the hill"], 0),
    Question(["He was late, so he", "She was late, so he"], ["ran", "ran"], 1),
    Question(["Two and two"] * 2, ["make four", "make five"], 0),
    Question(["One"] * 2, ["a", "b"], 1),
]
LAYOUTS = {
    "one": ParallelConfig(),
    "tp2": ParallelConfig(tensor_model_parallel_size=2),
    "pp2": ParallelConfig(pipeline_model_parallel_size=2, num_layers_in_first_pipeline_stage=3),
    "dp2": ParallelConfig(data_parallel_size=2),
    "pp3": ParallelConfig(
        pipeline_model_parallel_size=3, num_layers_in_first_pipeline_stage=2, num_layers_in_last_pipeline_stage=1
    ),
    "tp2pp2": ParallelConfig(
        tensor_model_parallel_size=2, pipeline_model_parallel_size=2, num_layers_in_first_pipeline_stage=2
    ),
    "pp2dp2": ParallelConfig(
        pipeline_model_parallel_size=2, data_parallel_size=2, num_layers_in_first_pipeline_stage=4
    ),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint_of(MODEL, tmp_path_factory.mktemp("source"))


def checkpoint_of(model: ModelConfig, folder: Path) -> Path:
    tensors = canonical(hf_model(model).float().double(), model)
    return write_checkpoint(folder, {key: tensor.float() for key, tensor in tensors.items()}, model)


def sequences() -> Tensor:
    return tokens(MODEL, batch=7, length=12)


@functools.cache
def of_the_text(removed: frozenset[int]) -> list[Tensor]:
    return states_without(sorted(removed), sequences())


def states_without(removed: Sequence[int], tokens_BS: Tensor, model: ModelConfig = MODEL) -> list[Tensor]:
    """The input of every layer that is left, the last one's output before the final norm, and the logits."""
    reference = hf_model(model).float().double()
    left = [layer for number, layer in enumerate(reference.model.layers) if number not in removed]
    reference.model.layers = torch.nn.ModuleList(left)
    seen: list[Tensor] = []
    for layer in left:
        layer.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    reference.model.norm.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    last = logits(reference, tokens_BS)
    return [*seen, last]


def reference_value(metric: DepthMetric, removed: Sequence[int], block: Sequence[int]) -> float:
    """One metric by its formula: the model without ``removed`` and ``block``, against the model or its own states."""
    if metric is DepthMetric.block_importance:
        left = [layer for layer in range(MODEL.num_layers) if layer not in removed]
        states = of_the_text(frozenset(removed))
        before, after = states[left.index(block[0])], states[left.index(block[-1]) + 1]
        return float(1 - torch.cosine_similarity(before, after, dim=-1).mean())
    logits_BSV = of_the_text(frozenset([*removed, *block]))[-1]
    if metric is DepthMetric.loss:
        return float(cross_entropy(logits_BSV.flatten(0, 1), sequences().flatten()))
    if metric is DepthMetric.logit_mse:
        return float((logits_BSV - of_the_text(frozenset())[-1]).square().mean())
    wrong = 0
    for question in QUESTIONS:
        likelihoods = [log_likelihood(*pair, [*removed, *block]) for pair in joined(question)]
        wrong += int(np.argmax(likelihoods)) != question.answer
    return wrong / len(QUESTIONS)


def joined(question: Question) -> list[tuple[str, str]]:
    return [(c, f" {choice.lstrip()}") for c, choice in zip(question.contexts, question.choices, strict=True)]


def log_likelihood(context: str, choice: str, removed: Sequence[int]) -> float:
    ids = torch.tensor([workers.encode(context + choice)])
    predicted = states_without(removed, ids)[-1].log_softmax(-1)[0, len(context) - 1 : -1]
    return float(predicted.gather(1, ids[0, len(context) :, None]).sum())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_match_transformers_at_every_layout(pool: WorkerPool, source: Path, layout: str) -> None:
    parallel = LAYOUTS[layout]
    plan = DepthPlan(metrics=ON_TEXT, sizes=(1, 2, 3))
    ranks = pool.run(workers.depth, parallel.num_ranks, source, sequences(), parallel, plan, 2)
    for scores, _ in ranks:
        assert scores.whole_loss == pytest.approx(reference_value(DepthMetric.loss, [], []), rel=1e-7)
        assert (DepthMetric.block_importance, 1) not in scores.blocks  # that is the calibration pass's
        for (metric, size), values in scores.blocks.items():
            blocks = [range(first, first + size) for first in range(MODEL.num_layers - size + 1)]
            want = [reference_value(metric, [], block) for block in blocks]
            np.testing.assert_allclose(values, want, rtol=1e-6, err_msg=f"{metric} {size}")
        assert len(scores.blocks) == 8
    # Two micro-batches per rank with DP2, four without; TP ranks call their part of each layer. A pass is the whole
    # model, and for each block only the layers above it.
    layers = MODEL.num_layers
    above = sum(layers - first - size for size in plan.sizes for first in range(layers - size + 1))
    model_parallel = parallel.tensor_model_parallel_size * parallel.data_parallel_size
    micro_batches = 4 // parallel.data_parallel_size
    assert sum(calls for _, calls in ranks) == model_parallel * micro_batches * (layers + above)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_removal_in_every_family(pool: WorkerPool, tmp_path: Path, family: str) -> None:
    model = shape(vocab_size=48, **FAMILIES[family])
    plan = DepthPlan(metrics=(DepthMetric.loss, DepthMetric.logit_mse), sizes=(1, 2))
    parallel = ParallelConfig(pipeline_model_parallel_size=2)
    source = checkpoint_of(model, tmp_path / "source")
    (scores, _), _ = pool.run(workers.depth, 2, source, sequences(), parallel, plan, 4)
    whole = states_without([], sequences(), model)[-1]
    for size in plan.sizes:
        left = [states_without(range(k, k + size), sequences(), model)[-1] for k in range(model.num_layers - size + 1)]
        losses = [float(cross_entropy(logits_BSV.flatten(0, 1), sequences().flatten())) for logits_BSV in left]
        errors = [float((logits_BSV - whole).square().mean()) for logits_BSV in left]
        np.testing.assert_allclose(scores.blocks[DepthMetric.loss, size], losses, rtol=1e-6)
        np.testing.assert_allclose(scores.blocks[DepthMetric.logit_mse, size], errors, rtol=1e-6)


@pytest.mark.parametrize("family", ["llama", "nemotron"])
def test_bf16_states_travel_between_stages(pool: WorkerPool, tmp_path: Path, family: str) -> None:
    model = shape(vocab_size=48, **FAMILIES[family])
    source = checkpoint_of(model, tmp_path / "source")
    plan = DepthPlan(metrics=ON_TEXT, sizes=(1, 2))
    alone, both = (
        pool.run(workers.depth, stages, source, sequences(), parallel, plan, 4, (), Dtype.bf16)[0][0]
        for stages in (1, 2)
        for parallel in [ParallelConfig(pipeline_model_parallel_size=stages)]
    )
    for key, values in alone.blocks.items():
        np.testing.assert_allclose(both.blocks[key], values, rtol=1e-6, err_msg=str(key))
    reference = cross_entropy(states_without([], sequences(), model)[-1].flatten(0, 1), sequences().flatten())
    assert alone.whole_loss == pytest.approx(float(reference), rel=0.02)


def test_block_importance_alone_runs_no_layer_twice(pool: WorkerPool, source: Path) -> None:
    parallel = LAYOUTS["pp2"]
    plan = DepthPlan(metrics=(DepthMetric.block_importance,), sizes=(2, 4))
    ranks = pool.run(workers.depth, 2, source, sequences(), parallel, plan, 4)
    for scores, _ in ranks:
        for size in plan.sizes:
            blocks = [range(first, first + size) for first in range(MODEL.num_layers - size + 1)]
            want = [reference_value(DepthMetric.block_importance, [], block) for block in blocks]
            np.testing.assert_allclose(scores.blocks[DepthMetric.block_importance, size], want, rtol=1e-7)
    assert sum(calls for _, calls in ranks) == 2 * MODEL.num_layers


@pytest.mark.parametrize("metric", ON_TEXT)
@pytest.mark.parametrize("layout", ["one", "pp3"])
def test_greedy_removal_scores_again_after_each(
    pool: WorkerPool, source: Path, layout: str, metric: DepthMetric
) -> None:
    parallel = LAYOUTS[layout]
    ranks = pool.run(
        workers.depth, parallel.num_ranks, source, sequences(), parallel, DepthPlan(greedy=metric, num_greedy=3), 4
    )
    removed: list[int] = []
    values: list[float] = []
    for _ in range(3):
        left = [layer for layer in range(MODEL.num_layers) if layer not in removed]
        found = [reference_value(metric, removed, [layer]) for layer in left]
        removed.append(left[int(np.argmin(found))])
        values.append(min(found))
    for scores, _ in ranks:
        assert scores.greedy is not None
        assert scores.greedy.layers == removed
        np.testing.assert_allclose(scores.greedy.values, values, rtol=1e-6)


def test_a_greedy_round_shares_what_lies_below_the_removed_layers(pool: WorkerPool, source: Path) -> None:
    plan = DepthPlan(greedy=DepthMetric.logit_mse, num_greedy=2)
    ((scores, calls),) = pool.run(workers.depth, 1, source, sequences(), ParallelConfig(), plan, 7)
    assert scores.greedy is not None
    layers, first = MODEL.num_layers, scores.greedy.layers[0]
    # The whole model, and of each candidate what lies above it; then the whole model, the model without the first
    # removed layer from there on, and the candidates of that.
    one = layers + sum(range(layers))
    two = layers + (layers - 1 - first) + sum(range(layers - 1))
    assert calls == one + two


@pytest.mark.parametrize("layout", ["one", "tp2", "pp2", "dp2"])
def test_accuracy_matches_transformers(pool: WorkerPool, source: Path, layout: str) -> None:
    parallel = LAYOUTS[layout]
    plan = DepthPlan(metrics=(DepthMetric.accuracy,), sizes=(1, 3))
    ranks = pool.run(workers.depth, parallel.num_ranks, source, sequences(), parallel, plan, 3, QUESTIONS)
    for scores, _ in ranks:
        for size in plan.sizes:
            blocks = [range(first, first + size) for first in range(MODEL.num_layers - size + 1)]
            want = [reference_value(DepthMetric.accuracy, [], block) for block in blocks]
            assert scores.blocks[DepthMetric.accuracy, size].tolist() == pytest.approx(want)
            assert len(set(want)) > 1, "the reference tells blocks apart"
