"""Held-out loss through the same parallel path as training."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor

from minitron.data.batch import Batch
from minitron.models.gpt import Chunks, FinalState, forward_to_final_state
from minitron.parallel.groups import Groups
from minitron.train.objective import CrossEntropy


@dataclass(frozen=True)
class HeldoutLoss:
    """Cross-entropy on held-out text.

    Attributes:
        loss: Nats per token.
        num_tokens: Tokens it is the mean of.
    """

    loss: float
    num_tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))


def groups_of(batches: Sequence[Batch], groups: Groups) -> Iterator[list[Batch]]:
    """Cut a long list of micro-batches into schedules: long enough to fill the pipeline, short enough to report."""
    size = 4 * groups.pp.size()
    for start in range(0, len(batches), size):
        yield [batches[index] for index in range(start, min(start + size, len(batches)))]


Collect = Callable[[FinalState, Batch], object]


def forward_only(
    gpt: Chunks,
    microbatches: Sequence[Batch],
    collect: Collect,
) -> list[Any]:
    """Run a forward-only pipeline schedule and keep what ``collect`` returns on the last stage.

    Args:
        gpt: The model.
        microbatches: This data-parallel rank's micro-batches, all of one shape; cut for context parallelism. An
            interleaved schedule takes a multiple of the pipeline's stages: the last one is repeated up to there, and
            the results are dropped.
        collect: Called on the last stage with the final state of each micro-batch.

    Returns:
        One object per micro-batch on the last stage, an empty list elsewhere.
    """
    batch, stages = microbatches[0], gpt.config.pipeline_model_parallel_size
    work: Sequence[Batch] = microbatches
    if len(gpt) > 1:
        work = [*microbatches, *[microbatches[-1]] * (-len(microbatches) % stages)]
    schedule = get_forward_backward_func(pp_size=stages, vp_size=gpt.config.virtual_pipeline_model_parallel_size)
    # The model's own groups: it may be built without the context parallelism of the job.
    collection = gpt.collection
    with torch.no_grad():
        results: list[Any] = schedule(
            forward_step_func=partial(_forward_step, collect),
            data_iterator=[iter(work) for _ in gpt],
            model=list(gpt),
            num_microbatches=len(work),
            seq_length=batch.seq_length,
            micro_batch_size=batch.tokens_BS.shape[0],
            forward_only=True,
            collect_non_loss_data=True,
            pg_collection=collection,
            p2p_communicator=P2PCommunicator(collection.pp, gpt.config),
        )
    return results[: len(microbatches)]


def _forward_step(collect: Collect, iterator: Iterator[Batch], model: torch.nn.Module) -> tuple[Any, Any]:
    batch = next(iterator)

    def keep(state: FinalState, non_loss_data: bool = True) -> object:
        return collect(state, batch)

    return forward_to_final_state(model, batch), keep


def heldout_loss(
    gpt: Chunks,
    microbatches: Sequence[Batch],
    objective: CrossEntropy,
    groups: Groups,
) -> HeldoutLoss:
    """Mean cross-entropy over all micro-batches of all data-parallel ranks, known on every rank.

    Args:
        gpt: The model; put in evaluation mode and back.
        microbatches: This data-parallel rank's part of the held-out text; cut for context parallelism.
        objective: Knows the vocabulary and the groups.
        groups: This rank's process groups.
    """
    was_training = gpt.training
    gpt.eval()
    losses = forward_only(gpt, microbatches, partial(_weighted_loss, objective))
    gpt.train(was_training)
    total: Tensor = torch.zeros(2, dtype=torch.float64)
    if losses:
        total = torch.stack(losses).sum(0).cpu()
    return _reduce(total, groups, microbatches[0].tokens_BS)


def _weighted_loss(objective: CrossEntropy, state: FinalState, batch: Batch) -> Tensor:
    """Summed loss and number of tokens of one micro-batch, in fp64."""
    mean = objective.loss(state, batch, None).total.double()
    return torch.stack([mean * batch.num_loss_tokens, batch.loss_mask_BS.sum().double()])


def _reduce(total: Tensor, groups: Groups, like: Tensor) -> HeldoutLoss:
    total = total.to(like.device)
    if groups.is_last_stage:
        torch.distributed.all_reduce(total, group=groups.dp_cp)
    torch.distributed.broadcast(total, src=groups.last_stage_source, group=groups.pp)
    summed, count = total.tolist()
    return HeldoutLoss(loss=summed / max(count, 1.0), num_tokens=int(count))
