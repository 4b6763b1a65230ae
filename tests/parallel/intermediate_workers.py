"""What the ranks run in the tests of intermediate losses. Imports no transformers: workers import this file."""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from minitron.checkpoint.folder import read_model_config
from minitron.checkpoint.model_io import TRAINING_ONLY, save_model
from minitron.config.intermediate import IntermediateConfig
from minitron.data.batch import Batch
from minitron.distill.intermediate import intermediate_losses
from minitron.distill.objective import Distillation
from minitron.distill.teacher import OnlineTeacher, Signal, Teacher, freeze
from minitron.models.gpt import FinalState
from minitron.parallel.groups import Groups
from minitron.train.optim import Trainable, make_trainable
from minitron.train.state import load_state, save_state
from minitron.train.step import accumulate_gradients, mean_terms, train_step
from tests.parallel import workers
from tests.parallel.workers import Work, microbatches

SEED = 5
"""Of the projection."""


@dataclass(frozen=True)
class Gradients:
    """The first step: its terms and gradient norm, and the projection's gradient; the others are in a folder."""

    terms: dict[str, float]
    grad_norm: float
    projection: Tensor | None


def first_gradients(work: Work, config: IntermediateConfig, out: Path, *, micro_batch_size: int = 1) -> Gradients:
    """Gradients of the first step, written under ``out`` as if they were weights."""
    with _distillation(work, config) as (trainable, objective, groups):
        batches = microbatches(work.tokens_NGT[0], groups, size=micro_batch_size)
        trainable.zero_grad()
        terms = accumulate_gradients(trainable, objective, batches, group_size=work.group_size)
        workers._gather_gradients(trainable, groups)
        trainable.optimizer.prepare_grads()
        norm = float(trainable.optimizer.get_grad_norm())
        with torch.no_grad():
            for parameter in trainable.gpt.parameters():
                parameter.copy_(parameter.main_grad)  # type: ignore[attr-defined]
        save_model(trainable.gpt, out)
        return Gradients(mean_terms(terms, groups), norm, _projection(trainable))


@dataclass(frozen=True)
class Steps:
    """Terms and gradient norm of each step, and the projection at the end."""

    terms: list[dict[str, float]]
    projection: Tensor | None


def distill(
    work: Work, config: IntermediateConfig, *, stop: int = 0, states: Path | None = None, save: bool = False
) -> Steps:
    """Distill from the newest state up to step ``stop`` (0: to the end)."""
    stop = stop or len(work.tokens_NGT)
    with _distillation(work, config) as (trainable, objective, groups):
        step = 0 if states is None else load_state(trainable, states)
        terms = []
        for tokens_GT in work.tokens_NGT[step:stop]:
            output = train_step(trainable, objective, microbatches(tokens_GT, groups), group_size=work.group_size)
            terms.append({**mean_terms(output.terms, groups), "grad_norm": output.grad_norm.item()})
        if save:
            assert states is not None
            save_state(trainable, states, step=stop)
        return Steps(terms, _projection(trainable))


def held_signals(work: Work, config: IntermediateConfig) -> list[int]:
    """Micro-batches whose teacher's states this rank holds when each group of every step was just made."""
    with _distillation(work, config) as (trainable, objective, groups):
        teacher = _Counting(objective.teacher)
        losses = objective.intermediate if config.enabled else None
        objective = replace(objective, teacher=teacher, intermediate=losses)
        for tokens_GT in work.tokens_NGT:
            train_step(trainable, objective, microbatches(tokens_GT, groups), group_size=work.group_size)
        return teacher.held


class _Counting:
    """A teacher whose signals are watched until nothing holds their tensors any more."""

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher
        self._made: list[list[weakref.ref[Tensor]]] = []
        self.held: list[int] = []

    def signals(self, microbatches: Sequence[Batch]) -> list[Signal]:
        made = self._teacher.signals(microbatches)
        for signal in made:
            final = [signal.final.hidden_SBH] if isinstance(signal.final, FinalState) else []
            self._made.append([weakref.ref(tensor) for tensor in (*final, *signal.states.values())])
        self.held.append(sum(any(tensor() is not None for tensor in tensors) for tensors in self._made))
        return made


def _projection(trainable: Trainable) -> Tensor | None:
    module = getattr(next(iter(trainable.gpt)), TRAINING_ONLY, None)
    return None if module is None else module.weight.detach().clone()


@contextmanager
def _distillation(work: Work, config: IntermediateConfig) -> Iterator[tuple[Trainable, Distillation, Groups]]:
    train = workers.train_config(work, lr=1e-2)
    models = read_model_config(work.teacher), read_model_config(work.student)
    with workers.in_layout(work.parallel) as groups:
        teacher = workers._load(work.teacher, work.parallel.for_teacher(models[0].num_layers), groups)
        student = workers._load(work.student, work.parallel, groups)
        with intermediate_losses(
            config,
            work.parallel,
            groups,
            teacher=(next(iter(freeze(teacher))), models[0]),
            student=(next(iter(student)), models[1]),
            seed=SEED,
            device=torch.device("cpu"),
        ) as (states, losses):
            trainable = make_trainable(student, train, work.parallel, groups, seq_length=work.tokens_NGT.shape[-1] - 1)
            source, split = OnlineTeacher(teacher, states), work.parallel.sequence_parallel
            objective = Distillation(source, models[1].vocab_size, groups, split, work.recipe, intermediate=losses)
            yield trainable, objective, groups
