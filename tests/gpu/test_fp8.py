"""FP8 against bf16: a few steps of distillation, a teacher's forward pass, and its state in checkpoints."""

from pathlib import Path

import pytest
import torch

from minitron.checkpoint.folder import WEIGHTS_DIR
from minitron.checkpoint.model_io import load_model, save_model, sharded_weights
from minitron.checkpoint.store import CheckpointReader
from minitron.compat import te
from minitron.config.precision import Fp8Recipe, PrecisionConfig
from minitron.eval.logits import model_logits
from minitron.parallel.groups import Groups
from minitron.train.optim import Trainable
from minitron.train.state import load_state, save_state
from minitron.train.step import fill_fp8_history, train_step
from tests.gpu.models import BF16, SMALL, SMALLER, batches, build, distillation, fp8, lack_of, trainable

STEPS = 8


def _needs(recipe: Fp8Recipe) -> None:
    if reason := lack_of(recipe):
        pytest.skip(f"{torch.cuda.get_device_name()}: {reason}")


def _student(precision: PrecisionConfig, groups: Groups) -> Trainable:
    return trainable(build(SMALLER, precision, groups, seed=2), groups, num_steps=STEPS, num_microbatches=2)


def _losses(precision: PrecisionConfig, groups: Groups) -> list[float]:
    """Loss of every step of a short distillation on the same micro-batches."""
    objective = distillation(build(SMALL, BF16, groups), SMALL.vocab_size, groups)
    student, work = _student(precision, groups), batches(SMALL, 2)
    fill_fp8_history(student, objective, lambda: work)
    return [float(train_step(student, objective, work).terms["loss"]) for _ in range(STEPS)]


@pytest.mark.parametrize("recipe", list(Fp8Recipe))
def test_our_table_of_needs_is_transformer_engines(groups: Groups, recipe: Fp8Recipe) -> None:
    assert (lack_of(recipe) is None) == (te.unsupported(recipe) is None)


@pytest.mark.parametrize("recipe", list(Fp8Recipe))
def test_a_few_steps_follow_bf16(groups: Groups, recipe: Fp8Recipe) -> None:
    """Each loss within 3 % of bf16's."""
    _needs(recipe)
    exact, have = _losses(BF16, groups), _losses(fp8(recipe), groups)
    assert have != exact, "nothing ran in FP8"
    assert have == pytest.approx(exact, rel=0.03)
    assert have[-1] < have[0]


@pytest.mark.parametrize("recipe", [recipe for recipe in Fp8Recipe if recipe is not Fp8Recipe.delayed])
def test_a_teacher_in_fp8_says_nearly_the_same(groups: Groups, recipe: Fp8Recipe) -> None:
    """Its logits are within what rounding to FP8 makes of them, relative to their length.

    A value of 3 bits after the first is off by up to 1/16, evenly: 2.6 % at the middle of an octave, for both factors
    of a product 3.7 %; four layers of two branches add up eight such, as if by chance: 10 %.
    """
    _needs(recipe)
    [batch] = batches(SMALL, 1)
    plain, rounded = (
        model_logits(
            build(SMALL, precision, groups).eval(), batch.tokens_BS, groups, vocab_size=SMALL.vocab_size
        ).double()
        for precision in (BF16, BF16.for_teacher(None, recipe))
    )
    assert 0 < float((rounded - plain).norm() / plain.norm()) < 0.10


def test_history_is_kept_to_resume_and_left_out_of_weights(groups: Groups, tmp_path: Path) -> None:
    _needs(Fp8Recipe.delayed)
    objective = distillation(build(SMALL, BF16, groups), SMALL.vocab_size, groups)
    student, work = _student(fp8(Fp8Recipe.delayed), groups), batches(SMALL, 2)
    fill_fp8_history(student, objective, lambda: work)
    for _ in range(3):
        train_step(student, objective, work)
    save_state(student, tmp_path / "states", step=3)
    save_model(student.gpt, tmp_path / "model")
    unbroken = [float(train_step(student, objective, work).terms["loss"]) for _ in range(3)]

    resumed = _student(fp8(Fp8Recipe.delayed), groups)
    assert load_state(resumed, tmp_path / "states") == 3
    assert [float(train_step(resumed, objective, work).terms["loss"]) for _ in range(3)] == pytest.approx(
        unbroken, rel=1e-3
    )
    assert any(key.endswith("_extra_state") for key in sharded_weights(student.gpt)["model0"])
    stored = CheckpointReader(tmp_path / "model" / WEIGHTS_DIR)
    assert not [key for key in stored.tensors if "_extra_state" in key]
    load_model(build(SMALLER, BF16, groups), tmp_path / "model")
