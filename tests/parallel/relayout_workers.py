"""What the ranks of the own-layout and vocabulary tests run. Imports no transformers: workers import this file."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor

from minitron.compat.cpu import CPU_LAYER
from minitron.config.distill import CrossEntropyMixConfig, DistillConfig, TeacherConfig, TeacherParallelConfig
from minitron.config.parallel import ParallelConfig
from minitron.config.precision import Dtype
from minitron.config.run import Device, RunConfig
from minitron.config.teacher_layout import own_layout
from minitron.config.train import TrainConfig
from minitron.data.batch import Batch
from minitron.distill.objective import Distillation
from minitron.distill.run import online_teacher
from minitron.distill.teacher import Signal
from minitron.models.gpt import FinalState
from minitron.models.load import load_gpt
from minitron.parallel.groups import Groups, model_parallel
from minitron.runtime.artefact import RunFolder
from minitron.runtime.session import Session
from minitron.train.optim import Trainable, make_trainable
from minitron.train.step import accumulate_gradients
from tests.helpers.batch import batch_of
from tests.parallel.workers import microbatches


@dataclass(frozen=True, kw_only=True)
class Own:
    """A teacher's layout, beside the student's of a test; None takes the student's."""

    tp: int | None = None
    pp: int | None = None
    sp: bool | None = None
    micro_batch_size: int | None = None
    group_size: int = 0
    dtype: Dtype = Dtype.fp32


@dataclass(frozen=True)
class Outcome:
    """Loss and gradient norm of one global batch, and whether the teacher really had a layout of its own."""

    loss: float
    grad_norm: float
    own: bool


def outcomes(
    teacher: Path,
    student: Path,
    parallel: ParallelConfig,
    tokens_GT: Tensor,
    teachers: Sequence[Own],
    *,
    micro_batch_size: int = 1,
    common_vocab_size: int | None = None,
    cross_entropy: float = 0.0,
) -> list[Outcome]:
    """The first step's loss and gradient norm for each way to lay out the teacher; nothing is updated."""
    with CPU_LAYER.in_force(), model_parallel(parallel, seed=1) as groups:
        sizes = {"micro_batch_size": micro_batch_size, "global_batch_size": len(tokens_GT)}
        length = tokens_GT.shape[1] - 1
        train = TrainConfig(num_tokens=2 * len(tokens_GT) * length, **sizes)
        config = RunConfig(parallel=parallel, distill=DistillConfig(train=train))
        session = Session(config, RunFolder(Path("unused")), groups, Device.cpu, Console())
        gpt, model = load_gpt(student, session, parallel=parallel)
        trainable = make_trainable(gpt, train, parallel, groups, seq_length=length)
        batches = microbatches(tokens_GT, groups, size=micro_batch_size)
        results = []
        for own in teachers:
            own_session = replace(session, config=replace(config, distill=_distill(own, train)))
            recipe = DistillConfig(cross_entropy=CrossEntropyMixConfig(weight=cross_entropy))
            with online_teacher(own_session, teacher, student_vocab_size=model.vocab_size) as source:
                objective = Distillation(
                    source, model.vocab_size, groups, parallel.sequence_parallel, recipe, common_vocab_size
                )
                loss, norm = _step(trainable, objective, batches, own.group_size, groups)
            is_own = own_layout(own_session.config.distill, parallel) is not None
            results.append(Outcome(loss, norm, is_own))
        return results


def output_gradient(
    teacher: Path, student: Path, parallel: ParallelConfig, tokens_GT: Tensor, common_vocab_size: int
) -> Tensor:
    """Gradient of this rank's rows of an untied student's output layer."""
    with CPU_LAYER.in_force(), model_parallel(parallel, seed=1) as groups:
        session = Session(RunConfig(parallel=parallel), RunFolder(Path("unused")), groups, Device.cpu, Console())
        gpt, model = load_gpt(student, session, parallel=parallel)
        trainable = make_trainable(gpt, TrainConfig(), parallel, groups, seq_length=tokens_GT.shape[1] - 1)
        with online_teacher(session, teacher, student_vocab_size=model.vocab_size) as source:
            objective = Distillation(source, model.vocab_size, groups, False, DistillConfig(), common_vocab_size)
            _step(trainable, objective, microbatches(tokens_GT, groups, size=1), 0, groups)
        gradient: Tensor = list(gpt)[-1].output_layer.weight.main_grad
        return gradient.clone()


def losses_of_split_and_whole_states(seed: int) -> list[tuple[float, Tensor]]:
    """On 2 tensor-parallel ranks with the student's sequence split: loss and the student's gradient with the
    teacher's state split as well, and with it whole."""
    with CPU_LAYER.in_force(), model_parallel(ParallelConfig(tensor_model_parallel_size=2), seed=1) as groups:
        generator = torch.Generator().manual_seed(seed)
        hidden_SBH, teacher_SBK = (torch.randn(6, 2, width, generator=generator) for width in (8, 12))
        weight_VH, weight_VK = (torch.randn(20, width, generator=generator) for width in (8, 12))
        batch = batch_of(torch.zeros(2, 7, dtype=torch.int64))
        rows, part = (
            slice(10 * groups.tp_rank, 10 * groups.tp_rank + 10),
            slice(3 * groups.tp_rank, 3 * groups.tp_rank + 3),
        )
        objective = Distillation(None, 20, groups, True, DistillConfig())  # type: ignore[arg-type]
        found = []
        for signal in (
            Signal(FinalState(teacher_SBK[part], weight_VK[rows])),
            Signal(FinalState(teacher_SBK, weight_VK[rows]), whole=True),
        ):
            mine_sBH = hidden_SBH[part].clone().requires_grad_()
            loss = objective.loss(FinalState(mine_sBH, weight_VH[rows]), batch, signal).total
            loss.backward()
            assert mine_sBH.grad is not None
            found.append((float(loss), mine_sBH.grad))
        return found


def _distill(own: Own, train: TrainConfig) -> DistillConfig:
    parallel = TeacherParallelConfig(
        tensor_model_parallel_size=own.tp, pipeline_model_parallel_size=own.pp, sequence_parallel=own.sp
    )
    teacher = TeacherConfig(parallel=parallel, micro_batch_size=own.micro_batch_size, dtype=own.dtype)
    return DistillConfig(train=train, teacher=teacher, teacher_microbatches=own.group_size)


def _step(
    trainable: Trainable, objective: Distillation, batches: list[Batch], group_size: int, groups: Groups
) -> tuple[float, float]:
    trainable.zero_grad()
    terms = accumulate_gradients(trainable, objective, batches, group_size=group_size)
    trainable.optimizer.prepare_grads()
    loss = torch.zeros((), dtype=torch.float64)
    if groups.is_last_stage:
        loss += terms["loss"].double()
        dist.all_reduce(loss, group=groups.dp)
    dist.broadcast(loss, src=groups.last_stage_source, group=groups.pp)
    return float(loss) / groups.dp.size(), float(trainable.optimizer.get_grad_norm())
