"""Cross-entropy beside the logit loss, by a fixed weight or brought to its size, against a dense fp64 formula."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

from minitron.config.distill import CrossEntropyMixConfig, DistillConfig
from minitron.config.logit_loss import LogitLossConfig, TopKRest
from minitron.config.mixing import Mixing
from minitron.config.parallel import ParallelConfig
from minitron.models.hf_import import import_model
from tests.helpers.pool import WorkerPool
from tests.parallel import workers
from tests.parallel.reference import assert_gradients, dense, dense_logits, layout, norm_of, random_tokens

TOKENS_GT = random_tokens(4, 17, seed=8)
FIXED = DistillConfig(cross_entropy=CrossEntropyMixConfig(weight=0.3))
SCALED = DistillConfig(cross_entropy=CrossEntropyMixConfig(weight=0.3, mixing=Mixing.scaled))
DROP = DistillConfig(
    logit_loss=LogitLossConfig(top_k=2, top_k_rest=TopKRest.drop),
    cross_entropy=CrossEntropyMixConfig(weight=0.3, mixing=Mixing.scaled),
)
LAYOUTS = {"TP1": layout(), "TP2": layout(2), "PP2": layout(1, 2), "CP2": layout(cp=2)}


@dataclass(frozen=True)
class Dense:
    """Means of a step's terms, and the student's gradients."""

    terms: dict[str, float]
    gradients: dict[str, Tensor]


def dense_step(teacher: Path, student: Path, recipe: DistillConfig) -> Dense:
    """One step over micro-batches of one sequence: what is brought to size is each one's own cross-entropy."""
    model, mix = dense(student), recipe.cross_entropy
    sums: dict[str, float] = {}
    for tokens_T in TOKENS_GT:
        log_p = dense_logits(teacher, tokens_T[None, :-1]).log_softmax(-1)[0]
        log_q = model(tokens_T[None, :-1], use_cache=False).logits.log_softmax(-1)[0]
        if recipe.logit_loss.top_k:
            log_p, kept = log_p.topk(recipe.logit_loss.top_k)
            kl = (log_p.exp() * (log_p - log_q.gather(-1, kept))).sum(-1).mean()
        else:
            kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        plain = F.nll_loss(log_q, tokens_T[1:])
        weight = mix.weight if mix.mixing is Mixing.fixed else mix.weight * abs(kl.item()) / plain.item()
        loss = kl + weight * plain
        (loss / len(TOKENS_GT)).backward()
        terms = {"forward_kl": kl.item(), "cross_entropy": plain.item(), "loss": loss.item()}
        if mix.mixing is Mixing.scaled:
            terms["cross_entropy_weight"] = weight
        for name, value in terms.items():
            sums[name] = sums.get(name, 0.0) + value / len(TOKENS_GT)
    return Dense(sums, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})


def check(
    pool: WorkerPool, out: Path, teacher: Path, student: Path, recipe: DistillConfig, *, at: ParallelConfig, want: Dense
) -> None:
    job = workers.Work.between(
        teacher,
        student,
        at,
        TOKENS_GT[None].repeat(2, 1, 1),  # the first of two steps: the schedule warms up in one
        recipe=recipe,
    )
    norm = norm_of(want.gradients)
    for result in pool.run(workers.first_gradients, at.num_ranks, job, out):
        assert result.terms == pytest.approx(want.terms, rel=2e-6)
        assert result.step.grad_norm == pytest.approx(norm, rel=1e-5)
    assert_gradients(out, job.student, want.gradients)


@pytest.fixture(scope="module", params=[FIXED, SCALED], ids=["fixed", "scaled"])
def mixed(request: pytest.FixtureRequest, teacher: Path, student: Path) -> tuple[DistillConfig, Dense]:
    return request.param, dense_step(teacher / "hf", student / "hf", request.param)


@pytest.mark.parametrize("parallel", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_loss_and_gradients_are_those_of_the_dense_formula(
    pool: WorkerPool,
    teacher: Path,
    student: Path,
    tmp_path: Path,
    mixed: tuple[DistillConfig, Dense],
    parallel: ParallelConfig,
) -> None:
    recipe, want = mixed
    check(pool, tmp_path, teacher, student, recipe, at=parallel, want=want)


@pytest.fixture(scope="module")
def sure(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher with twice its logits: on the teacher's likely tokens it is surer than the teacher."""
    folder = tmp_path_factory.mktemp("sure")
    shutil.copytree(teacher / "hf", folder / "hf")
    llama = LlamaForCausalLM.from_pretrained(folder / "hf")
    with torch.no_grad():
        llama.model.norm.weight *= 2
    llama.save_pretrained(folder / "hf")
    import_model(folder / "hf", folder / "checkpoint")
    return folder


@pytest.mark.parametrize("name", ["TP1", "CP2"])
def test_a_negative_logit_loss_does_not_turn_the_cross_entropy_around(
    pool: WorkerPool, teacher: Path, sure: Path, tmp_path: Path, name: str
) -> None:
    want = dense_step(teacher / "hf", sure / "hf", DROP)
    assert want.terms["forward_kl"] < 0
    assert want.terms["loss"] > want.terms["forward_kl"]
    check(pool, tmp_path, teacher, sure, DROP, at=LAYOUTS[name], want=want)
