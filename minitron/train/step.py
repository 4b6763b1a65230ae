"""One optimizer step around Megatron's pipeline schedule."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor

from minitron.data.batch import Batch
from minitron.errors import NumericsError
from minitron.models.gpt import FinalState, forward_to_final_state
from minitron.train.objective import Objective
from minitron.train.optim import Trainable

Work = tuple[Batch, object]
"""A micro-batch and the signal its loss reads."""


@dataclass(frozen=True)
class StepOutput:
    """What one step leaves behind.

    Attributes:
        terms: Loss and its parts, the mean over this rank's micro-batches. They add up over the pipeline stages;
            most come from the last one alone.
        grad_norm: Global gradient norm before clipping.
    """

    terms: dict[str, Tensor]
    grad_norm: float


def train_step(
    trainable: Trainable,
    objective: Objective,
    microbatches: Sequence[Batch],
    *,
    group_size: int = 0,
    clip_grad: float = 1.0,
) -> StepOutput:
    """Forward, backward, reduce, clip, update.

    Args:
        trainable: Model, optimizer and schedule.
        objective: Makes the signals and the loss.
        microbatches: This data-parallel rank's share of the global batch.
        group_size: Micro-batches whose signals are held at once; 0 means all of them. Each group is a
            pipeline schedule of its own, so a small group trades a larger bubble for less memory.
        clip_grad: Largest gradient norm; 0 turns clipping off.

    Raises:
        NumericsError: The gradient is not finite; nothing has been updated.
    """
    trainable.ddp.zero_grad_buffer()
    trainable.optimizer.zero_grad()
    terms = accumulate_gradients(trainable, objective, microbatches, group_size=group_size)
    trainable.optimizer.prepare_grads()
    grad_norm = float(trainable.optimizer.get_grad_norm())
    if not math.isfinite(grad_norm):
        raise NumericsError(
            f"gradient norm is {grad_norm}; the weights are unchanged. Lower lr, or train in fp32 to find out why"
        )
    if clip_grad > 0:
        clip_grad_by_total_norm_fp32(trainable.optimizer.get_parameters(), clip_grad, grad_norm)
    trainable.optimizer.step_with_ready_grads()
    trainable.scheduler.step(1)
    return StepOutput(terms, grad_norm)


def accumulate_gradients(
    trainable: Trainable, objective: Objective, microbatches: Sequence[Batch], *, group_size: int
) -> dict[str, Tensor]:
    """Run the schedule over all micro-batches and reduce the gradients once, after the last group."""
    group_size = group_size or len(microbatches)
    finalize = trainable.config.finalize_model_grads_func
    collected: list[dict[str, Tensor]] = []
    try:
        for start in range(0, len(microbatches), group_size):
            group = microbatches[start : start + group_size]
            last = start + group_size >= len(microbatches)
            trainable.config.finalize_model_grads_func = finalize if last else None
            work = list(zip(group, objective.signals(group), strict=True))
            share = len(group) / len(microbatches)
            collected += _run_schedule(trainable, objective, work, share)
    finally:
        trainable.config.finalize_model_grads_func = finalize
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
    schedule = get_forward_backward_func()
    collected: list[dict[str, Tensor]] = schedule(
        forward_step_func=partial(_forward_step, objective, share, len(work)),
        data_iterator=iter(work),
        model=[trainable.ddp],
        num_microbatches=len(work),
        seq_length=batch.tokens_BS.shape[1],
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
