"""The teacher's distributions on disk: what is kept of them, and how many bytes that takes."""

from dataclasses import dataclass
from enum import StrEnum

from minitron.errors import ConfigError

FIXED_BYTES = 4
"""Bytes per token whatever is kept: the distribution's entropy, fp32."""


class CacheMethod(StrEnum):
    """What is kept of each distribution."""

    sampled = "sampled"
    top_k = "top_k"
    top_p = "top_p"


@dataclass(kw_only=True)
class TeacherLogitsConfig:
    """What `minitron teacher-logits` writes, and in what pieces."""

    method: CacheMethod = CacheMethod.sampled
    """``sampled``: random draws, whose mean is the distribution itself. ``top_k``: the likeliest tokens.
    ``top_p``: the fewest tokens that hold a probability of ``top_p``."""
    num_draws: int = 50
    """``sampled``: draws per token."""
    top_k: int = 48
    """``top_k``: tokens kept. ``top_p``: the most that are kept."""
    top_p: float = 0.95
    """``top_p``: probability to hold."""
    micro_batch_size: int = 4
    """Sequences in one forward pass."""
    shard_mb: int = 256
    """Size of a file, in 10^6 bytes; a file is also closed after a minute, so that little is lost when killed."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        for name, most in (("num_draws", 65_535), ("top_k", 65_535), ("micro_batch_size", None), ("shard_mb", None)):
            value = getattr(self, name)
            if value < 1 or (most is not None and value > most):
                limits = "at least 1" if most is None else f"between 1 and {most}"
                raise ConfigError(f"teacher_logits.{name}={value} must be {limits}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"teacher_logits.top_p={self.top_p} must lie in (0, 1]")

    @property
    def max_entries(self) -> int:
        """Most ids kept for one token."""
        return self.num_draws if self.method is CacheMethod.sampled else self.top_k

    def parameters(self) -> dict[str, str | int | float]:
        """The method and those of its parameters that count for it."""
        names = {
            CacheMethod.sampled: ("num_draws",),
            CacheMethod.top_k: ("top_k",),
            CacheMethod.top_p: ("top_p", "top_k"),
        }[self.method]
        return {"method": self.method.value} | {name: getattr(self, name) for name in names}

    def entry_bytes(self, vocab_size: int) -> tuple[int, int, int]:
        """Bytes of a token's number of entries, of an id, and of its weight.

        A sampled weight is a count of draws; the others are fp16 probabilities.
        """
        id_bytes = 2 if vocab_size <= 1 << 16 else 3 if vocab_size <= 1 << 24 else 4
        small = 1 if self.max_entries <= 255 else 2
        return small, id_bytes, small if self.method is CacheMethod.sampled else 2

    def max_bytes_per_token(self, vocab_size: int) -> int:
        """The most that one token takes; exactly what it takes with ``top_k``."""
        number, id_bytes, weight_bytes = self.entry_bytes(vocab_size)
        return FIXED_BYTES + number + min(self.max_entries, vocab_size) * (id_bytes + weight_bytes)
