"""The training loop's settings: batch, schedule, optimizer, and how often things happen."""

import math
from dataclasses import dataclass

from minitron.config.parallel import ParallelConfig
from minitron.errors import ConfigError, LayoutError


@dataclass(kw_only=True)
class TrainConfig:
    """One run of the training loop, used by distillation and by plain cross-entropy training alike."""

    num_tokens: int = 1_000_000
    """Tokens to train on; rounded up to whole global batches."""
    micro_batch_size: int = 1
    """Sequences in one forward pass of one data-parallel rank."""
    global_batch_size: int = 8
    """Sequences in one optimizer step, over all data-parallel ranks."""
    lr: float = 1e-4
    """Peak learning rate."""
    min_lr: float = 1e-5
    """Learning rate at the end of the cosine."""
    lr_warmup_steps: int = 0
    """Linear warm-up, in optimizer steps. Give this or `lr_warmup_tokens`."""
    lr_warmup_tokens: int = 0
    """Linear warm-up, in tokens; rounded up to whole steps."""
    weight_decay: float = 0.1
    """Decoupled weight decay on matrices (not on norms)."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.95
    """Decay of the second moment."""
    adam_eps: float = 1e-8
    """Added to the root of the second moment."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    log_interval_steps: int = 1
    """Steps between two lines of metrics; the only steps that wait for a loss value."""
    eval_interval_steps: int = 50
    """Steps between two validations on held-out text; 0 means only at the end."""
    eval_tokens: int = 8192
    """Held-out tokens in one validation."""
    save_interval_steps: int = 100
    """Steps between two checkpoints to resume from."""

    def tokens_per_step(self, seq_length: int) -> int:
        """Tokens of one optimizer step."""
        return self.global_batch_size * seq_length

    def num_steps(self, seq_length: int) -> int:
        """Optimizer steps of the whole run."""
        return -(-self.num_tokens // self.tokens_per_step(seq_length))

    def warmup_steps(self, seq_length: int) -> int:
        """Warm-up in steps, whichever unit it was given in."""
        if self.lr_warmup_tokens:
            return -(-self.lr_warmup_tokens // self.tokens_per_step(seq_length))
        return self.lr_warmup_steps


def num_microbatches(global_batch_size: int, micro_batch_size: int, data_parallel_size: int) -> int:
    """Micro-batches of one step on one data-parallel rank.

    Raises:
        LayoutError: The global batch does not divide.
    """
    one = micro_batch_size * data_parallel_size
    if global_batch_size < 1 or global_batch_size % one:
        raise LayoutError(
            f"global_batch_size={global_batch_size} is not a multiple of micro_batch_size="
            f"{micro_batch_size} x data_parallel_size={data_parallel_size} = {one}; change one of them"
        )
    return global_batch_size // one


def check_train(train: TrainConfig, parallel: ParallelConfig, *, seq_length: int, who: str) -> None:
    """Check a training section: every value, then against the layout and the sequence length.

    The section does not know its own place, so this is not done where the dataclass is made.

    Args:
        train: The section.
        parallel: The layout.
        seq_length: Tokens of a sequence.
        who: The section's place in the run, such as ``distill.train``; every message starts with it.

    Raises:
        ConfigError: A value is out of range, or the warm-up is as long as the run.
        LayoutError: The global batch does not divide.
    """
    _check_ranges(train, who)
    try:
        microbatches = num_microbatches(train.global_batch_size, train.micro_batch_size, parallel.data_parallel_size)
    except LayoutError as error:
        raise LayoutError(f"{who}: {error}") from error
    if train.eval_tokens < seq_length:
        raise ConfigError(
            f"{who}.eval_tokens={train.eval_tokens} is less than one sequence of data.seq_length={seq_length} tokens"
        )
    stages = parallel.pipeline_model_parallel_size
    if parallel.num_chunks > 1 and microbatches % stages:
        raise LayoutError(
            f"{who}: global_batch_size={train.global_batch_size} / (micro_batch_size={train.micro_batch_size} x "
            f"data_parallel_size={parallel.data_parallel_size}) = {microbatches} micro-batches are not a multiple "
            f"of parallel.pipeline_model_parallel_size={stages}, which virtual_pipeline_model_parallel_size="
            f"{parallel.num_chunks} needs; change the batch, or set it to null"
        )
    warmup, steps = train.warmup_steps(seq_length), train.num_steps(seq_length)
    if warmup >= steps:
        raise ConfigError(
            f"{who}: warm-up of {warmup} steps is not shorter than the run of {steps} steps "
            f"(num_tokens={train.num_tokens} / ({train.global_batch_size} x {seq_length}) tokens a step); "
            "lower the warm-up or raise num_tokens"
        )


def _check_ranges(train: TrainConfig, who: str) -> None:
    """Every value by itself."""
    least = {
        "num_tokens": 1,
        "micro_batch_size": 1,
        "global_batch_size": 1,
        "log_interval_steps": 1,
        "lr_warmup_steps": 0,
        "lr_warmup_tokens": 0,
        "eval_interval_steps": 0,
        "save_interval_steps": 0,
        "clip_grad": 0,
        "weight_decay": 0,
    }
    for name, lowest in least.items():
        value = getattr(train, name)
        if not lowest <= value < math.inf:  # true for nan too
            raise ConfigError(f"{who}.{name}={value} must be at least {lowest}, and finite")
    if not train.adam_eps > 0:
        raise ConfigError(f"{who}.adam_eps={train.adam_eps} must be more than 0")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(train, name) < 1:
            raise ConfigError(f"{who}.{name}={getattr(train, name)} must lie in [0, 1)")
    if train.lr_warmup_steps and train.lr_warmup_tokens:
        raise ConfigError(
            f"{who}.lr_warmup_steps={train.lr_warmup_steps} and {who}.lr_warmup_tokens={train.lr_warmup_tokens} "
            "both set the warm-up; leave one of them 0"
        )
    if not 0 <= train.min_lr <= train.lr < math.inf:
        raise ConfigError(
            f"{who}.min_lr={train.min_lr} must lie between 0 and {who}.lr={train.lr}, which must be finite"
        )
