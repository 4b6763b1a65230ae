"""What the ranks of the layout tests run: many layouts in one call, and what a layout's means did."""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from minitron.train import optim
from minitron.train.optim import Trainable
from minitron.train.step import mean_terms, train_step
from tests.parallel.workers import Step, Work, distill, distillation, in_layout, microbatches


def distill_each(works: Sequence[Work]) -> list[list[Step]]:
    """The steps of each distillation."""
    return [_distill(work, None) for work in works]


def distill_in_small_blocks(work: Work, states: Path, *, stop: int = 0) -> tuple[list[Step], int]:
    """Distill where a block of gradients ends after 2000 numbers, save at ``stop``; and the number of blocks."""
    made: list[DistributedDataParallel] = []

    def wrap(**kwargs: Any) -> DistributedDataParallel:
        made.append(DistributedDataParallel(**kwargs))
        return made[-1]

    small = partial(DistributedDataParallelConfig, bucket_size=2000)
    with mock.patch.multiple(optim, DistributedDataParallelConfig=small, DistributedDataParallel=wrap):
        steps = distill(work, states=states, stop=stop, save=stop > 0)
    return steps, sum(len(ddp.bucket_groups) for ddp in made)


def observed(work: Work) -> dict[str, int]:
    """What one rank did in the last of a distillation's steps.

    Returns:
        Number of chunks; forward passes of the first layer and of its attention; blocks of gradients, and those
        whose reduction was under way when the schedule had run its last backward pass; how often a gradient was
        announced as ready to be reduced.
    """
    counts: Counter[str] = Counter()
    _distill(work, counts)
    return dict(counts)


def _distill(work: Work, counts: Counter[str] | None) -> list[Step]:
    with in_layout(work.parallel) as groups:
        trainable, objective = distillation(work, groups)
        steps = []
        for number, tokens_GT in enumerate(work.tokens_NGT, start=1):
            if counts is not None and number == len(work.tokens_NGT):
                _count(trainable, counts)
            output = train_step(trainable, objective, microbatches(tokens_GT, groups), group_size=work.group_size)
            steps.append(Step(mean_terms(output.terms, groups)["loss"], output.grad_norm.item()))
        return steps


def _count(trainable: Trainable, counts: Counter[str]) -> None:
    layer = trainable.gpt[0].decoder.layers[0]
    for name, module in (("layer", layer), ("attention", layer.self_attention.core_attention)):
        module.register_forward_pre_hook(partial(_add, counts, name))
    finalize = trainable.config.finalize_model_grads_func
    blocks = [block for ddp in trainable.ddp for block in ddp.bucket_groups]
    counts.update(chunks=len(trainable.ddp), blocks=len(blocks), under_way=0)

    def count_blocks(*args: Any, **kwargs: Any) -> None:
        counts["under_way"] += sum(block.grad_reduce_handle is not None for block in blocks)
        announced = [number for block in blocks for number in block.per_param_grad_ready_counts.values()]
        counts["announced"] = max(announced, default=0)
        finalize(*args, **kwargs)

    trainable.config.finalize_model_grads_func = count_blocks


def _add(counts: Counter[str], name: str, *_: object) -> None:
    counts[name] += 1
