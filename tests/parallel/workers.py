"""What the ranks of the multi-process tests run. Imports no transformers: workers import this file."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from minitron.checkpoint.folder import read_model_config
from minitron.checkpoint.model_io import load_model, save_model
from minitron.compat.cpu import CPU_LAYER
from minitron.config.distill import DistillConfig
from minitron.config.parallel import ParallelConfig
from minitron.config.precision import PrecisionConfig
from minitron.config.run import Device
from minitron.config.train import TrainConfig
from minitron.data.batch import NO_SAMPLE, Batch
from minitron.distill.objective import Distillation
from minitron.distill.teacher import OnlineTeacher, freeze
from minitron.eval.logits import model_logits
from minitron.models.gpt import Chunks, build_gpt
from minitron.parallel.groups import Groups, model_parallel
from minitron.train.heldout import HeldoutLoss, heldout_loss
from minitron.train.objective import CrossEntropy, Objective
from minitron.train.optim import Trainable, make_trainable
from minitron.train.state import load_state, save_state
from minitron.train.step import accumulate_gradients, mean_terms, train_step


@dataclass(frozen=True, kw_only=True)
class Work:
    """A distillation: models, layout, and the same tokens on every rank.

    Attributes:
        tokens_NGT: Token ids of N steps of G sequences; T is one more than the sequence length.
        group_size: Micro-batches whose teacher states are held at once.
        cross_entropy: Train on the tokens themselves instead.
        recipe: Losses of the distillation.
    """

    teacher: Path
    student: Path
    parallel: ParallelConfig
    tokens_NGT: Tensor
    group_size: int = 0
    cross_entropy: bool = False
    recipe: DistillConfig = field(default_factory=DistillConfig)

    @classmethod
    def between(cls, teacher: Path, student: Path, parallel: ParallelConfig, tokens_NGT: Tensor, **values: Any) -> Self:
        """Of two models that `tests.parallel.reference.make_model` made."""
        teacher, student = teacher / "checkpoint", student / "checkpoint"
        return cls(teacher=teacher, student=student, parallel=parallel, tokens_NGT=tokens_NGT, **values)


@dataclass(frozen=True)
class Step:
    """What one optimizer step reports, known on every rank."""

    loss: float
    grad_norm: float


@dataclass(frozen=True)
class FirstGradients:
    """The first step's loss and its parts; its gradients are in a checkpoint folder. Whether the teacher got any."""

    step: Step
    terms: dict[str, float]
    teacher_has_gradients: bool
    teacher_changed: bool


def distill(work: Work, *, stop: int = 0, states: Path | None = None, save: bool = False) -> list[Step]:
    """Distill from the newest state up to step ``stop`` (0: to the end)."""
    stop = stop or len(work.tokens_NGT)
    with in_layout(work.parallel) as groups:
        trainable, objective = _training(work, groups)
        step = 0 if states is None else load_state(trainable, states)
        steps = []
        for tokens_GT in work.tokens_NGT[step:stop]:
            batches = microbatches(tokens_GT, groups)
            output = train_step(trainable, objective, batches, group_size=work.group_size)
            steps.append(Step(mean_terms(output.terms, groups)["loss"], output.grad_norm.item()))
        if save:
            assert states is not None
            save_state(trainable, states, step=stop)
        return steps


def first_gradients(work: Work, out: Path) -> FirstGradients:
    """Gradients of the first step, written under ``out`` as if they were weights."""
    with in_layout(work.parallel) as groups:
        trainable, objective = distillation(work, groups)
        teacher = objective.teacher.gpt
        before = [p.clone() for p in teacher.parameters()]
        trainable.zero_grad()
        batches = microbatches(work.tokens_NGT[0], groups)
        mine = accumulate_gradients(trainable, objective, batches, group_size=work.group_size)
        _gather_gradients(trainable, groups)
        trainable.optimizer.prepare_grads()
        terms = mean_terms(mine, groups)
        step = Step(terms["loss"], float(trainable.optimizer.get_grad_norm()))
        with torch.no_grad():
            for parameter in trainable.gpt.parameters():
                parameter.copy_(parameter.main_grad)  # type: ignore[attr-defined]
        save_model(trainable.gpt, out)
        pairs = zip(before, teacher.parameters(), strict=True)
        return FirstGradients(
            step,
            terms,
            any(p.requires_grad or p.grad is not None or hasattr(p, "main_grad") for p in teacher.parameters()),
            not all(torch.equal(a, b) for a, b in pairs),
        )


def logits(
    folder: Path, parallel: ParallelConfig, tokens_BS: Tensor, *, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, int]:
    """Logits of a checkpoint folder computed in ``dtype``, and how many layers this rank holds."""
    with in_layout(parallel) as groups:
        gpt = _load(folder, parallel, groups).eval().to(dtype)
        gpt.config.pipeline_dtype = dtype
        vocab_size = read_model_config(folder).vocab_size
        num_layers = sum(len(chunk.decoder.layers) for chunk in gpt)
        return model_logits(gpt, tokens_BS, groups, vocab_size=vocab_size), num_layers


def heldout(folder: Path, parallel: ParallelConfig, tokens_BT: Tensor, *, micro_batch_size: int) -> HeldoutLoss:
    """Held-out loss of a checkpoint folder; sequences of weight 0 fill up the last micro-batches."""
    with in_layout(parallel) as groups:
        gpt = _load(folder, parallel, groups)
        objective = CrossEntropy(read_model_config(folder).vocab_size, groups, parallel.sequence_parallel)
        batches = microbatches(tokens_BT, groups, size=micro_batch_size)
        return heldout_loss(gpt, batches, objective, groups)


def microbatches(tokens_GT: Tensor, groups: Groups, *, size: int = 1) -> list[Batch]:
    """Sequences dealt to the data-parallel ranks, micro-batch by micro-batch."""
    ranks = groups.dp.size()
    missing = -len(tokens_GT) % (size * ranks)
    mask_G = torch.ones(len(tokens_GT) + missing)
    mask_G[len(tokens_GT) :] = 0
    tokens_GT = torch.cat([tokens_GT, tokens_GT[:1].expand(missing, -1)])
    length = tokens_GT.shape[1] - 1
    return [
        Batch(
            tokens_BS=tokens_GT[first : first + size, :-1].contiguous(),
            labels_BS=tokens_GT[first : first + size, 1:].contiguous(),
            position_ids_BS=torch.arange(length).repeat(size, 1),
            loss_mask_BS=mask_G[first : first + size, None].expand(-1, length).contiguous(),
            sample_index_B=torch.full((size,), NO_SAMPLE),
        ).on_rank(groups, torch.device("cpu"))
        for first in range(groups.dp_rank * size, len(tokens_GT), size * ranks)
    ]


@contextmanager
def in_layout(parallel: ParallelConfig) -> Iterator[Groups]:
    with CPU_LAYER.in_force(), model_parallel(parallel, seed=1) as groups:
        yield groups


def _load(folder: Path, parallel: ParallelConfig, groups: Groups) -> Chunks:
    gpt = build_gpt(read_model_config(folder), parallel, PrecisionConfig(), groups, device=Device.cpu)
    load_model(gpt, folder)
    return gpt


def _training(work: Work, groups: Groups) -> tuple[Trainable, Objective]:
    trainable, objective = distillation(work, groups)
    if not work.cross_entropy:
        return trainable, objective
    return trainable, CrossEntropy(objective.vocab_size, groups, work.parallel.sequence_parallel)


def train_config(work: Work, *, lr: float) -> TrainConfig:
    """A step for each batch of the work, after one of warm-up, down to a tenth of the rate."""
    num_steps, size, length = work.tokens_NGT.shape
    return TrainConfig(
        num_tokens=num_steps * size * (length - 1), global_batch_size=size, lr=lr, min_lr=lr / 10, lr_warmup_steps=1
    )


def distillation(work: Work, groups: Groups) -> tuple[Trainable, Distillation]:
    teacher = OnlineTeacher(freeze(_load(work.teacher, work.parallel.for_teacher(4), groups)))
    train = train_config(work, lr=1e-3)
    student = _load(work.student, work.parallel, groups)
    trainable = make_trainable(student, train, work.parallel, groups, seq_length=work.tokens_NGT.shape[-1] - 1)
    vocab_size = read_model_config(work.student).vocab_size
    return trainable, Distillation(teacher, vocab_size, groups, work.parallel.sequence_parallel, work.recipe)


def _gather_gradients(trainable: Trainable, groups: Groups) -> None:
    """Undo the distributed optimizer's scatter: every data-parallel rank gets the whole gradient."""
    for bucket in (bucket for ddp in trainable.ddp for buffer in ddp.buffers for bucket in buffer.buckets):
        shard = bucket.grad_data.view(groups.dp_cp.size(), -1)[groups.dp_cp.rank()].clone()
        dist.all_gather_into_tensor(bucket.grad_data, shard, group=groups.dp_cp)
