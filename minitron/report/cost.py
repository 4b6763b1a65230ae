"""What training costs and what pruning with distillation saves, by the papers' rules.

A training step takes 6 N FLOPs per token for N parameters, a teacher's forward pass 2 N (arXiv 2407.14679, section
4.1, counts the first only).
"""

from collections.abc import Sequence

from minitron.errors import ConfigError

_TRAIN_FLOPS = 6.0
_FORWARD_FLOPS = 2.0


def training_flops(num_parameters: float, num_tokens: float) -> float:
    """Forward and backward of a model over its training tokens."""
    return _TRAIN_FLOPS * num_parameters * num_tokens


def forward_flops(num_parameters: float, num_tokens: float) -> float:
    """Forward pass alone, as a teacher's."""
    return _FORWARD_FLOPS * num_parameters * num_tokens


def family_saving(num_parameters: Sequence[float], token_saving: float, *, count_teacher: bool) -> float:
    """Training FLOPs of a family trained from scratch, over those of its largest member and the rest distilled.

    All members from scratch see the same tokens; a distilled one sees ``1 / token_saving`` of them.

    Args:
        num_parameters: Parameters of each member, the largest (the teacher) first; or their training FLOPs per step,
            which are proportional.
        token_saving: Tokens from scratch over tokens of the distillation.
        count_teacher: Add the teacher's forward passes; the papers leave them out.

    Raises:
        ConfigError: Fewer than two members, or a token saving that is not positive.

    Example:
        The papers' 15B, 8B and 4B by their FLOPs per step, with 40 times fewer tokens for the two small ones.

        >>> round(family_saving([4.4e17, 2.5e17, 1.2e17], 40, count_teacher=False), 1)
        1.8
    """
    if len(num_parameters) < 2 or not token_saving > 0:
        raise ConfigError(
            f"a family's saving needs two models or more and a token saving above 0, not {list(num_parameters)} "
            f"and {token_saving}"
        )
    teacher, *others = num_parameters
    scratch = sum(training_flops(size, 1.0) for size in num_parameters)
    passes = forward_flops(teacher, 1.0) if count_teacher else 0.0
    distilled = sum((training_flops(size, 1.0) + passes) / token_saving for size in others)
    return scratch / (training_flops(teacher, 1.0) + distilled)
