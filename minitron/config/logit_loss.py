"""Which divergence between the teacher's and the student's distribution distillation minimises."""

import math
from dataclasses import dataclass
from enum import StrEnum

from minitron.errors import ConfigError

CUDA_CHUNK_BYTES = 2**30
"""Logits of one model that exist at a time on a GPU: a chunk of tokens."""
CUDA_BLOCK_BYTES = 64 * 2**20
"""Part of a chunk that a loss works on at a time on a GPU, in fp32."""


def chunk_tokens(num_tokens: int, *, row_bytes: int, budget_bytes: int) -> int:
    """Tokens per chunk of logits: a multiple of 16, all chunks of a length, so that no short one comes last.

    Args:
        num_tokens: Tokens in all.
        row_bytes: One token's logits on this rank.
        budget_bytes: Most bytes of a chunk, unless 16 tokens already have more.
    """
    most = max(16, budget_bytes // row_bytes // 16 * 16)
    num_chunks = max(1, math.ceil(num_tokens / most))
    return max(16, math.ceil(num_tokens / (16 * num_chunks)) * 16)


class LogitLossKind(StrEnum):
    """The papers' losses on p = softmax(teacher / T) and q = softmax(student / T)."""

    forward_kl = "forward_kl"
    """KL(p || q), the papers' choice."""
    reverse_kl = "reverse_kl"
    """KL(q || p)."""
    jensen_shannon = "jensen_shannon"
    """beta * KL(p || m) + (1 - beta) * KL(q || m), m = beta * p + (1 - beta) * q."""
    mse = "mse"
    """Mean over the vocabulary of (p - q)^2."""
    cosine = "cosine"
    """1 - cos(p, q)."""


class TopKRest(StrEnum):
    """What becomes of the probability outside the teacher's K most likely tokens."""

    drop = "drop"
    """It is left out; the K keep their true probabilities. The loss can be negative."""
    renormalize = "renormalize"
    """It is left out; both distributions are made to sum to 1 over the K."""
    ghost = "ghost"
    """It counts as one more token, in both distributions."""


@dataclass(kw_only=True)
class LogitLossConfig:
    """The loss on the logits (arXiv 2407.14679, section 3). The default is the papers' best.

    Every kind is multiplied by the square of the temperature, so that gradients keep their size when it changes
    (arXiv 1503.02531, section 2.1).
    """

    kind: LogitLossKind = LogitLossKind.forward_kl
    """Which divergence."""
    temperature: float = 1.0
    """T: both models' logits are divided by it."""
    beta: float = 0.5
    """Weight of the teacher in `LogitLossKind.jensen_shannon`."""
    top_k: int = 0
    """Compare on the teacher's K most likely tokens only; 0 for the full vocabulary. Forward KL only."""
    top_k_rest: TopKRest = TopKRest.ghost
    """What becomes of the rest of the vocabulary under `top_k`, or beside the tokens that a cache of
    ``teacher_logits.method=top_k`` or ``top_p`` has; a cache of random draws stands for the whole."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: a value outside its range, or one that the chosen kind does not have.
        """
        section = "distill.logit_loss"
        if not 0 < self.temperature < math.inf:  # false for nan too
            raise ConfigError(f"{section}.temperature={self.temperature} must be a finite number more than 0")
        if not 0 < self.beta < 1:
            raise ConfigError(
                f"{section}.beta={self.beta} must lie between 0 and 1, both excluded; the limits are "
                f"{section}.kind=forward_kl and reverse_kl"
            )
        if self.beta != 0.5 and self.kind is not LogitLossKind.jensen_shannon:
            raise ConfigError(
                f"{section}.beta={self.beta} has no meaning for {section}.kind={self.kind}; leave it out, or set "
                f"{section}.kind=jensen_shannon"
            )
        if self.top_k < 0:
            raise ConfigError(f"{section}.top_k={self.top_k} must be at least 1, or 0 for the full vocabulary")
        if self.top_k and self.kind is not LogitLossKind.forward_kl:
            raise ConfigError(
                f"{section}.top_k={self.top_k} goes with {section}.kind=forward_kl only, not with {self.kind}; set "
                f"one of the two"
            )

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse to compare on more tokens than there are.

        Args:
            vocab_size: Tokens that teacher and student both have.

        Raises:
            ConfigError: K is larger.
        """
        if self.top_k > vocab_size:
            raise ConfigError(
                f"distill.logit_loss.top_k={self.top_k} is more than the {vocab_size} tokens of the vocabulary that "
                "teacher and student share; set 0 for all of them"
            )
