"""What the line may do besides its one distillation: correct the teacher, go down in steps, compare recipes."""

import math
import re
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise

from minitron.config.prune import PruneConfig
from minitron.errors import ConfigError


@dataclass(kw_only=True)
class CorrectionConfig:
    """Teacher correction: the unpruned model is trained on the distillation text before it teaches.

    Pruning still takes the original, which the papers found to be as good (arXiv 2408.11796, figure 5). Batch and
    optimizer are those of ``distill.train``.
    """

    enabled: bool = False
    """Correct the teacher, and distill from the result."""
    num_tokens: int | None = None
    """Tokens to correct on; null takes ``distill.train.num_tokens``."""
    lr_scale: float = 0.2
    """Peak learning rate relative to ``distill.train.lr``. The papers' is a fifth of the original training's peak."""
    min_lr: float | None = None
    """Last learning rate; null takes ``distill.train.min_lr``. The papers' is that of the original training, unscaled
    (arXiv 2408.11796, section on teacher correction)."""
    lr_warmup_steps: int | None = None
    """Linear warm-up, in optimizer steps (the papers: 120); null takes that of ``distill.train``."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        if not (self.lr_scale > 0 and math.isfinite(self.lr_scale)):
            raise ConfigError(f"correction.lr_scale={self.lr_scale} must be a number above 0, such as 0.2")
        if self.num_tokens is not None and self.num_tokens < 1:
            raise ConfigError(f"correction.num_tokens={self.num_tokens} must be at least 1, or null")
        if self.lr_warmup_steps is not None and self.lr_warmup_steps < 0:
            raise ConfigError(f"correction.lr_warmup_steps={self.lr_warmup_steps} must be at least 0, or null")


@dataclass(kw_only=True)
class AblationConfig:
    """`minitron ablate`: the recipes of paper 2's figure 6 at equal tokens, and a longer run from scratch."""

    from_scratch_times: float = 4.0
    """Tokens of the longer from-scratch run, as a multiple of ``distill.train.num_tokens``."""
    family: list[int] = field(default_factory=list)
    """Parameter counts of a family of models, largest first, for the FLOPs saved; empty takes teacher and student."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        if not (self.from_scratch_times >= 1 and math.isfinite(self.from_scratch_times)):
            raise ConfigError(f"ablation.from_scratch_times={self.from_scratch_times} must be at least 1")
        family = list(self.family)
        if family and (len(family) < 2 or sorted(family, reverse=True) != family or family[-1] < 1):
            raise ConfigError(
                f"ablation.family={family} must list at least two parameter counts above 0, the largest first"
            )


class Ancestor(StrEnum):
    """A model that a step of a chain builds on."""

    original = "original"
    previous = "previous"


@dataclass(kw_only=True)
class ChainStepConfig:
    """One step down of a chain such as 15B -> 8B -> 4B."""

    name: str = ""
    """Folder of the step inside the run's."""
    prune: PruneConfig = field(default_factory=PruneConfig)
    """Target shape of the step."""
    source: Ancestor = Ancestor.previous
    """What is scored and pruned: the model that the step before left, or the original."""
    teacher: Ancestor = Ancestor.original
    """What teaches: the original (corrected, with correction.enabled), which the papers found to be the better one,
    or the model that the step before left."""
    num_tokens: int | None = None
    """Tokens of the step; null takes ``distill.train.num_tokens``, 0 only prunes: the next step scores and prunes what
    this one left, so that axes are pruned one after the other."""


def check_chain(chain: list[ChainStepConfig]) -> None:
    """Check the names of a chain's steps, which become folders, and that steps that only prune lead somewhere.

    Raises:
        ConfigError: A step without a usable name, two of one name, or nothing that is distilled after pruning.
    """
    for number, step in enumerate(chain):
        if not re.fullmatch(r"\w[\w.-]*", step.name):
            raise ConfigError(f"chain.{number}.name={step.name!r} must be a plain folder name, such as 8b")
    names = [step.name for step in chain]
    if len(set(names)) < len(names):
        raise ConfigError(f"chain has two steps of one name ({', '.join(names)}); name each once")
    if chain and chain[-1].num_tokens == 0:
        raise ConfigError(
            f"chain.{len(chain) - 1} ({names[-1]}) only prunes (num_tokens=0), but the last step distills"
        )
    for before, step in pairwise(chain):
        if before.num_tokens == 0 and step.teacher is Ancestor.previous:
            raise ConfigError(
                f"chain step {step.name} asks for teacher=previous, but {before.name} only prunes (num_tokens=0): a "
                "model that was not distilled teaches nothing; set teacher=original"
            )
