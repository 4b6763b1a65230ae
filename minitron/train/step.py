"""One optimizer step around Megatron's pipeline schedule."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor

from minitron.config.precision import Fp8Recipe
from minitron.data.batch import Batch
from minitron.models.gpt import FinalState, forward_to_final_state
from minitron.parallel.groups import Groups
from minitron.train.objective import Objective
from minitron.train.optim import Trainable

Work = tuple[Batch, object]
"""A micro-batch and the signal its loss reads."""


@dataclass(frozen=True)
class StepOutput:
    """What one step leaves behind.

    Attributes:
        terms: Loss and its parts, the mean over this rank's micro-batches (under context parallelism its share of
            that mean). They add up over context-parallel ranks and over pipeline stages; most come from the last
            stage alone.
        grad_norm: Global gradient norm before clipping, a scalar on the device.
    """

    terms: dict[str, Tensor]
    grad_norm: Tensor


def train_step(
    trainable: Trainable,
    objective: Objective,
    microbatches: Sequence[Batch],
    *,
    group_size: int = 0,
    clip_grad: float = 1.0,
) -> StepOutput:
    """Forward, backward, reduce, clip, update; the host waits for nothing.

    A gradient that is not finite changes no weight; ``trainable.guard.check`` says so.

    Args:
        trainable: Model, optimizer and schedule.
        objective: Makes the signals and the loss.
        microbatches: This data-parallel rank's share of the global batch.
        group_size: Micro-batches whose signals are held at once; 0 means all of them. Each group is a
            pipeline schedule of its own, so a small group trades a larger bubble for less memory.
        clip_grad: Largest gradient norm; 0 turns clipping off.
    """
    trainable.zero_grad()
    terms = accumulate_gradients(trainable, objective, microbatches, group_size=group_size)
    trainable.optimizer.prepare_grads()
    step = trainable.scheduler.num_steps  # counts from 1: see `make_trainable`
    grad_norm = trainable.guard.update(trainable.optimizer, step=step, clip_grad=clip_grad)
    trainable.scheduler.step(1)
    return StepOutput(terms, grad_norm)


def fill_fp8_history(
    trainable: Trainable, objective: Objective, first: Callable[[], Sequence[Batch]], *, group_size: int = 0
) -> None:
    """Show delayed scaling the sizes of its tensors before the first step; nothing is done for other precisions.

    Without history Transformer Engine scales by 1, and gradients vanish in FP8: in the second product of a branch when
    they come from the residual stream, and then in the first, which has seen none. So three micro-batches pass.

    Args:
        trainable: Model, optimizer and schedule; its weights stay as they are.
        objective: Makes the signals and the loss.
        first: Gives the micro-batches of the first step; not called for other precisions.
        group_size: As in `train_step`.
    """
    config = trainable.config
    if not config.fp8 or config.fp8_recipe != Fp8Recipe.delayed:
        return
    microbatches = first()
    for _ in range(math.ceil(3 / len(microbatches))):
        trainable.zero_grad()
        accumulate_gradients(trainable, objective, microbatches, group_size=group_size)


def accumulate_gradients(
    trainable: Trainable, objective: Objective, microbatches: Sequence[Batch], *, group_size: int
) -> dict[str, Tensor]:
    """Run the schedule over all micro-batches and reduce the gradients once, in or after the last group."""
    group_size = group_size or len(microbatches)
    config, finalize = trainable.config, trainable.config.finalize_model_grads_func
    collected: list[dict[str, Tensor]] = []
    try:
        for start in range(0, len(microbatches), group_size):
            group = microbatches[start : start + group_size]
            last = start + group_size >= len(microbatches)
            # The last group's schedule ends the block in time for its last backward pass. No other schedule may see
            # the function: one that only runs forward enters the block and does not leave it.
            config.finalize_model_grads_func = finalize if last else None
            work = list(zip(group, objective.signals(group), strict=True))
            share = len(group) / len(microbatches)
            config.no_sync_func = trainable.no_sync if last else None
            with contextlib.nullcontext() if last else trainable.no_sync():
                collected += _run_schedule(trainable, objective, work, share)
            del work  # its signals: the teacher makes the next group's before the name would be bound again
    finally:
        config.finalize_model_grads_func, config.no_sync_func = finalize, None
    names = collected[0].keys() if collected else ()
    terms = {name: torch.stack([terms[name] for terms in collected]).mean() for name in names}
    for name, total in objective.drain().items():
        mean = total / len(microbatches)
        terms[name] = terms[name] + mean if name in terms else mean
    return terms


def _run_schedule(
    trainable: Trainable, objective: Objective, work: Sequence[Work], share: float
) -> list[dict[str, Tensor]]:
    batch = work[0][0]
    config = trainable.config
    schedule = get_forward_backward_func(
        pp_size=config.pipeline_model_parallel_size, vp_size=config.virtual_pipeline_model_parallel_size
    )
    collected: list[dict[str, Tensor]] = schedule(
        forward_step_func=partial(_forward_step, objective, share, len(work)),
        data_iterator=[iter(work) for _ in trainable.ddp],
        model=trainable.ddp,
        num_microbatches=len(work),
        seq_length=batch.seq_length,
        micro_batch_size=batch.tokens_BS.shape[0],
        forward_only=False,
    )
    return collected


def _forward_step(
    objective: Objective, share: float, num_microbatches: int, iterator: Iterator[Work], model: torch.nn.Module
) -> tuple[Any, Any]:
    batch, signal = next(iterator)
    with objective.watch(batch, signal, share / num_microbatches):
        output = forward_to_final_state(model, batch)

    def loss_of(state: FinalState) -> tuple[Tensor, dict[str, Tensor]]:
        loss = objective.loss(state, batch, signal)
        # Megatron divides the loss by the schedule's micro-batches, in place: the terms must not share storage.
        return loss.total * share, {"loss": loss.total.detach().clone(), **loss.terms}

    return output, loss_of


def mean_terms(terms: Mapping[str, Tensor], groups: Groups) -> dict[str, float]:
    """A step's loss and its parts, over all ranks and known on every rank.

    Args:
        terms: This rank's (see `StepOutput`): averaged over data-parallel ranks, summed over stages; the shares of
            context-parallel ranks add up.
        groups: This rank's process groups.
    """
    names = sorted(terms)
    mine: dict[str, float] = {}
    if names:
        values = torch.stack([terms[name].double() for name in names])
        torch.distributed.all_reduce(values, group=groups.dp_cp)
        values /= groups.dp.size()
        mine = dict(zip(names, values.tolist(), strict=True))
    stages: list[dict[str, float]] = [{}] * groups.pp.size()
    torch.distributed.all_gather_object(stages, mine, group=groups.pp)
    summed: dict[str, float] = {}
    for stage in stages:
        for name, value in stage.items():
            summed[name] = summed.get(name, 0.0) + value
    return summed
