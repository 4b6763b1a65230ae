"""Every family through the parallel path: transformers' logits, and the dense formula's gradients."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron.checkpoint.folder import read_model_config
from minitron.config.prune import PruneConfig
from minitron.config.score import Aggregation
from minitron.models.hf_export import export_model
from minitron.prune.ranking import choose
from minitron.prune.scores import random_scores
from minitron.prune.slicer import apply_spec
from tests.helpers.hf_experts import per_expert
from tests.helpers.pool import WorkerPool
from tests.parallel import workers
from tests.parallel.reference import (
    assert_gradients,
    dense_kl,
    dense_logits,
    layout,
    make_model,
    norm_of,
    random_tokens,
)

TOKENS_BS = random_tokens(2, 24, seed=3)
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 12, "tie_word_embeddings": False},
    "nemotron": {"model_type": "nemotron", "tie_word_embeddings": False},
}
EXPERTS: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "norm_topk_prob": True,
}
PRUNED = PruneConfig(
    num_layers=3, hidden_size=50, ffn_hidden_size=90, num_attention_heads=4, num_query_groups=4
)  # hidden is no multiple of the heads
PRUNED_EXPERTS = replace(PRUNED, ffn_hidden_size=40, num_moe_experts=4)


@dataclass(frozen=True)
class Family:
    """Hugging Face and checkpoint folders of one family's teacher and of what pruning leaves of it."""

    teacher: Path
    student: Path


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp(request.param), FAMILIES[request.param], PRUNED)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("qwen3_moe"), EXPERTS, PRUNED_EXPERTS)


def make_family(root: Path, values: dict[str, Any], target: PruneConfig) -> Family:
    (root / "teacher").mkdir()
    teacher = make_model(root / "teacher", seed=5, std=0.15, **values)
    model = read_model_config(teacher / "checkpoint")
    scores = random_scores(model, Aggregation.l2_mean, 1)
    spec = choose(model, target, scores=scores, source_id=scores.source_id)
    student = root / "student"
    apply_spec(spec, source=teacher / "checkpoint", out=student / "checkpoint")
    export_model(student / "checkpoint", student / "hf", dtype=torch.float32)
    return Family(teacher, student)


@pytest.mark.parametrize("axes", [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1)])
@pytest.mark.parametrize("who", ["teacher", "student"])
def test_logits_are_transformers(pool: WorkerPool, family: Family, who: str, axes: tuple[int, int, int]) -> None:
    check_logits(pool, getattr(family, who), axes)


@pytest.mark.parametrize("axes", [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1)])
@pytest.mark.parametrize("who", ["teacher", "student"])
def test_logits_of_experts_are_transformers(
    pool: WorkerPool, mixture: Family, who: str, axes: tuple[int, int, int]
) -> None:
    check_logits(pool, getattr(mixture, who), axes)


def check_logits(pool: WorkerPool, folder: Path, axes: tuple[int, int, int]) -> None:
    want = dense_logits(folder / "hf", TOKENS_BS)
    assert want.std() > 0.5
    job = (folder / "checkpoint", layout(*axes), TOKENS_BS)
    for logits, _ in pool.run(workers.logits, math.prod(axes), *job):
        assert float((logits - want).abs().max()) < 1e-4
    for logits, _ in pool.run(workers.logits, math.prod(axes), *job, dtype=torch.float64):
        assert float((logits - want).abs().max()) < 5e-6  # rounding of the rotary table and of the logits to fp32


@pytest.mark.parametrize(("axes", "sp"), [((2, 1, 1), True), ((2, 2, 1), False), ((1, 2, 2), False)])
def test_gradients_are_those_of_the_dense_formula(
    pool: WorkerPool, family: Family, tmp_path: Path, axes: tuple[int, int, int], sp: bool
) -> None:
    check_gradients(pool, family, tmp_path, axes, sp)


@pytest.mark.parametrize("axes", [(1, 2, 2), (2, 1, 1), (2, 2, 1)])
def test_gradients_of_experts_are_those_of_the_dense_formula(
    pool: WorkerPool, mixture: Family, tmp_path: Path, axes: tuple[int, int, int]
) -> None:
    check_gradients(pool, mixture, tmp_path, axes, sp=axes[0] > 1)


def check_gradients(
    pool: WorkerPool, family: Family, tmp_path: Path, axes: tuple[int, int, int], sp: bool = False
) -> None:
    tokens_NGT = random_tokens(3, 4, 17)
    loss, gradients = dense_kl(family.teacher / "hf", family.student / "hf", tokens_NGT[0, :, :-1])
    job = workers.Work.between(family.teacher, family.student, layout(*axes, sp=sp), tokens_NGT)
    results = pool.run(workers.first_gradients, math.prod(axes), job, tmp_path)
    assert loss > 0.05
    norm = norm_of(gradients)
    for result in results:
        assert result.step.loss == pytest.approx(loss, rel=1e-5)
        assert result.step.grad_norm == pytest.approx(norm, rel=1e-4)
    assert_gradients(tmp_path, job.student, per_expert(gradients), vanishing=1e-4)
