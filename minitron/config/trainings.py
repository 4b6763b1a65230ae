"""Every run of the training loop in the line: what it starts from, what it minimises, and for how long."""

from dataclasses import dataclass, replace

from minitron.config.line import ChainStepConfig
from minitron.config.run import RunConfig
from minitron.config.train import TrainConfig


@dataclass(frozen=True)
class Training:
    """One run of the training loop.

    Attributes:
        start: Stage that leaves the checkpoint to start from; None draws random weights of the pruned shape.
        distills: Whether it learns from the teacher; else from the text alone, by cross-entropy.
        label: What it is, in tables and plots.
    """

    start: str | None
    distills: bool
    label: str


TRAININGS = {
    "correct": Training("import", False, "teacher correction"),
    "distill": Training("prune", True, "pruning + distillation"),
    "baseline": Training(None, False, "random init + cross-entropy"),
    "pruned_ce": Training("prune", False, "pruning + cross-entropy"),
    "random_pruned_kd": Training("prune_random", True, "random pruning + distillation"),
    "random_init_kd": Training(None, True, "random init + distillation"),
    "scratch_long": Training(None, False, "random init + cross-entropy, longer"),
}
"""By the name of their stage."""

ABLATION = ("distill", "random_pruned_kd", "pruned_ce", "random_init_kd", "baseline", "scratch_long")
"""The recipes that `minitron ablate` compares; all but the last at equal tokens (arXiv 2408.11796, figure 6)."""


def settings_of(config: RunConfig, stage: str) -> TrainConfig:
    """Batch, schedule and optimizer of a training run: those of ``distill.train``, but for what the run is about.

    Args:
        config: The run.
        stage: A key of `TRAININGS`.
    """
    train = config.distill.train
    if stage == "scratch_long":
        return replace(train, num_tokens=round(config.ablation.from_scratch_times * train.num_tokens))
    if stage == "correct":
        correction, warmup = config.correction, config.correction.lr_warmup_steps
        if warmup is not None:
            train = replace(train, lr_warmup_steps=warmup, lr_warmup_tokens=0)
        return replace(
            train,
            num_tokens=train.num_tokens if correction.num_tokens is None else correction.num_tokens,
            lr=correction.lr_scale * train.lr,
            min_lr=train.min_lr if correction.min_lr is None else correction.min_lr,  # not scaled: see the key
        )
    return train


def in_step(config: RunConfig, step: ChainStepConfig) -> RunConfig:
    """The run as one step of its chain has it."""
    num_tokens = config.distill.train.num_tokens if step.num_tokens is None else step.num_tokens
    train = replace(config.distill.train, num_tokens=num_tokens)
    return replace(config, prune=step.prune, distill=replace(config.distill, train=train), chain=[])
