"""The training loop's settings: batch, schedule, optimizer, and how often things happen."""

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

    def __post_init__(self) -> None:
        """Check every value by itself."""
        for name in ("num_tokens", "micro_batch_size", "global_batch_size", "log_interval_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        for name in (
            "lr_warmup_steps",
            "lr_warmup_tokens",
            "eval_interval_steps",
            "eval_tokens",
            "save_interval_steps",
        ):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} must not be negative")
        if self.lr_warmup_steps and self.lr_warmup_tokens:
            raise ConfigError(
                f"lr_warmup_steps={self.lr_warmup_steps} and lr_warmup_tokens={self.lr_warmup_tokens} "
                "both set the warm-up; leave one of them 0"
            )
        if not 0 <= self.min_lr <= self.lr:
            raise ConfigError(f"min_lr={self.min_lr} must lie between 0 and lr={self.lr}")

    def num_microbatches(self, data_parallel_size: int) -> int:
        """Micro-batches of one step on one data-parallel rank.

        Raises:
            LayoutError: The global batch does not divide.
        """
        one = self.micro_batch_size * data_parallel_size
        if self.global_batch_size % one:
            raise LayoutError(
                f"global_batch_size={self.global_batch_size} is not a multiple of micro_batch_size="
                f"{self.micro_batch_size} x data_parallel_size={data_parallel_size} = {one}"
            )
        return self.global_batch_size // one

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


def check_train(train: TrainConfig, parallel: ParallelConfig, *, seq_length: int, who: str) -> None:
    """Check a training section against the layout and the sequence length.

    Raises:
        ConfigError: With the section's name in front.
    """
    try:
        train.num_microbatches(parallel.data_parallel_size)
    except LayoutError as error:
        raise LayoutError(f"{who}: {error}") from error
    num_microbatches, stages = (
        train.num_microbatches(parallel.data_parallel_size),
        parallel.pipeline_model_parallel_size,
    )
    if parallel.num_chunks > 1 and num_microbatches % stages:
        raise LayoutError(
            f"{who}: global_batch_size={train.global_batch_size} / (micro_batch_size={train.micro_batch_size} x "
            f"data_parallel_size={parallel.data_parallel_size}) = {num_microbatches} micro-batches are not a multiple "
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
