"""What training costs and what pruning with distillation saves, by the papers' rules.

A training step takes 6 N FLOPs per token for N parameters, a teacher's forward pass 2 N (arXiv 2407.14679, section
4.1, counts the first only).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from minitron.errors import ConfigError

_TRAIN_FLOPS = 6.0
_FORWARD_FLOPS = 2.0


@dataclass(frozen=True, kw_only=True)
class TeacherCost:
    """What teaching takes, relative to the largest member of a family and to the tokens of one distillation.

    Attributes:
        size: Parameters of the teacher over those of the largest member.
        passes: Tokens of its forward pass over those of the distillation.
        shared: One pass serves every distilled member, as that of a cache; else the teacher runs beside each.
        correction: Tokens that the largest member is corrected on, once, over those of the distillation.
    """

    size: float = 1.0
    passes: float = 1.0
    shared: bool = False
    correction: float = 0.0


def six_nd(num_parameters: float, num_tokens: float) -> float:
    """FLOPs of training by the rule 6 N D: forward and backward of N parameters over D tokens."""
    return _TRAIN_FLOPS * num_parameters * num_tokens


def two_nd(num_parameters: float, num_tokens: float) -> float:
    """FLOPs of the forward pass alone, as a teacher's: 2 N D."""
    return _FORWARD_FLOPS * num_parameters * num_tokens


def family_saving(num_parameters: Sequence[float], token_saving: float, *, teacher: TeacherCost | None) -> float:
    """Training FLOPs of a family trained from scratch, over those of its largest member and the rest distilled.

    All members from scratch see the same tokens; a distilled one sees ``1 / token_saving`` of them.

    Args:
        num_parameters: Parameters of each member, the largest first; or their training FLOPs per step, which are
            proportional.
        token_saving: Tokens from scratch over tokens of the distillation.
        teacher: The teacher's forward passes and correction; None leaves them out, as the papers do.

    Raises:
        ConfigError: Fewer than two members, or a token saving that is not positive.

    Example:
        The papers' 15B, 8B and 4B by their FLOPs per step, with 40 times fewer tokens for the two small ones.

        >>> round(family_saving([4.4e17, 2.5e17, 1.2e17], 40, teacher=None), 1)
        1.8
    """
    if len(num_parameters) < 2 or not token_saving > 0:
        raise ConfigError(
            f"a family's saving needs two models or more and a token saving above 0, not {list(num_parameters)} "
            f"and {token_saving}"
        )
    largest, *others = num_parameters
    scratch = sum(six_nd(size, 1.0) for size in num_parameters)
    beside, once = 0.0, 0.0
    if teacher is not None:
        passes = two_nd(teacher.size * largest, teacher.passes)
        beside, once = (0.0, passes) if teacher.shared else (passes, 0.0)
        once += six_nd(largest, teacher.correction)
    distilled = sum((six_nd(size, 1.0) + beside) / token_saving for size in others)
    return scratch / (six_nd(largest, 1.0) + distilled + once / token_saving)
