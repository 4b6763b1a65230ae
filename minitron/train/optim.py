"""Megatron's DDP, distributed optimizer and cosine schedule around one model."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.transformer_config import TransformerConfig

from minitron.config.parallel import ParallelConfig
from minitron.config.train import TrainConfig
from minitron.models.gpt import Chunks
from minitron.parallel.groups import Groups
from minitron.train.guard import UpdateGuard


@dataclass(frozen=True)
class Trainable:
    """A model ready to be trained.

    Attributes:
        gpt: The model.
        ddp: Each of its chunks inside Megatron's data-parallel wrapper.
        optimizer: Megatron's distributed optimizer: each data-parallel rank holds a part of its state.
        scheduler: Learning rate and weight decay, stepped once per optimizer step.
        config: The model's Megatron configuration.
        guard: Keeps bad gradients from the weights.
    """

    gpt: Chunks
    ddp: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    config: TransformerConfig
    guard: UpdateGuard = field(default_factory=UpdateGuard)

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def zero_grad(self) -> None:
        """Forget the gradients of the last step."""
        for ddp in self.ddp:
            ddp.zero_grad_buffer()
        self.optimizer.zero_grad()

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes in this block only add up gradients; overlapped reduction does not start."""
        with contextlib.ExitStack() as stack:
            for ddp in self.ddp:
                stack.enter_context(ddp.no_sync())
            yield


def make_trainable(
    gpt: Chunks, train: TrainConfig, parallel: ParallelConfig, groups: Groups, *, seq_length: int
) -> Trainable:
    """Wrap a model for training.

    Args:
        gpt: This rank's part of the model, its weights already in place.
        train: Schedule and optimizer settings.
        parallel: The layout; says whether gradients are reduced during the backward pass.
        groups: This rank's process groups.
        seq_length: Tokens of a sequence, to turn token counts into steps.
    """
    config = gpt.config
    ddp = [
        DistributedDataParallel(
            config=config,
            ddp_config=DistributedDataParallelConfig(
                use_distributed_optimizer=True,
                grad_reduce_in_fp32=True,
                overlap_grad_reduce=parallel.overlap_grad_reduce and groups.dp_cp.size() > 1,
            ),
            module=chunk,
            disable_bucketing=index > 0,  # the other chunks' backward passes hide the reduction of these
            pg_collection=groups.collection,
        )
        for index, chunk in enumerate(gpt)
    ]
    for wrapper in ddp:
        _count_padding_between_buckets(wrapper)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=train.lr,
            min_lr=train.min_lr,
            weight_decay=train.weight_decay,
            adam_beta1=train.adam_beta1,
            adam_beta2=train.adam_beta2,
            adam_eps=train.adam_eps,
            clip_grad=train.clip_grad,
            bf16=config.bf16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=True,
        ),
        ddp,
        use_gloo_process_groups=False,
        pg_collection=groups.collection,
    )
    config.finalize_model_grads_func = partial(finalize_model_grads, pg_collection=groups.collection)
    return Trainable(gpt, ddp, optimizer, _scheduler(optimizer, train, seq_length), config)


def _count_padding_between_buckets(ddp: DistributedDataParallel) -> None:
    """Let the optimizer's state be saved from where its parameters are.

    Megatron-Core 0.19 joins the buckets' states without the padding at their ends, then cuts the parameters out at
    positions that count it. A tied embedding on the last pipeline stage has a bucket of its own, so every other state
    of that stage would be saved shifted when the embedding's size is not a multiple of the padding.
    """
    for buffer in ddp.buffers:
        for bucket in buffer.buckets[:-1]:
            bucket.numel_unpadded = bucket.grad_data.numel()
        buffer.numel_unpadded = sum(bucket.numel_unpadded for bucket in buffer.buckets)


def _scheduler(optimizer: MegatronOptimizer, train: TrainConfig, seq_length: int) -> OptimizerParamScheduler:
    """Linear warm-up to ``lr``, then a cosine that reaches ``min_lr`` at the last step."""
    steps = train.num_steps(seq_length)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=train.lr,
        min_lr=train.min_lr,
        lr_warmup_steps=train.warmup_steps(seq_length),
        lr_decay_steps=steps,
        lr_decay_style="cosine",
        start_wd=train.weight_decay,
        end_wd=train.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
    )
    scheduler.step(1)  # the first step already trains: without this its learning rate is 0
    return scheduler
