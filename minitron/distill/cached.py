"""A teacher that was run before: its distributions come from a cache, by sample index."""

from collections.abc import Sequence

import numpy as np
import torch

from minitron.config.teacher_logits import CacheMethod
from minitron.data.batch import NO_SAMPLE, Batch, to_device
from minitron.distill.cache_format import Array, Entries, LogitCache
from minitron.distill.teacher import Signal
from minitron.losses import SparseTarget
from minitron.parallel.context import context_positions


class CachedTeacher:
    """Reads a cache on the last pipeline stage, at any layout and batch size.

    Args:
        cache: The cache; it must have every sample that comes.
        is_last_stage: Whether this rank computes losses.
        cp_rank: Its place among the ranks that share the sequences.
        device: Where the entries go.
    """

    def __init__(self, cache: LogitCache, *, is_last_stage: bool, cp_rank: int, device: torch.device) -> None:
        self._cache = cache
        self._settings = cache.identity.settings
        self._is_last_stage = is_last_stage
        self._cp_rank = cp_rank
        self._device = device

    def signals(self, microbatches: Sequence[Batch]) -> list[Signal]:
        """Look the samples up; no rank needs another."""
        if not self._is_last_stage:
            return [Signal()] * len(microbatches)
        return [Signal(self._target(batch)) for batch in microbatches]

    def _target(self, batch: Batch) -> SparseTarget:
        """The entries of a micro-batch, its tokens in the order of a final state's [S, B]."""
        # This rank's part of the sequences; the batch's own positions are on the device, and reading them would wait.
        here = context_positions(batch.seq_length, rank=self._cp_rank, size=batch.context_parallel_size).numpy()
        rows = [self._read(sample) for sample in batch.sample_index_B.tolist()]
        slots = max(1, max(int(row.number_S.max()) for row in rows))
        padded = [row.padded(slots) for row in rows]
        ids_TK, weights_TK = (_flatten([pair[part][here] for pair in padded]) for part in (0, 1))
        entropy_T = None
        if self._settings.method is CacheMethod.sampled:
            weights_TK /= self._settings.num_draws
            entropy_T = self._to_device(_flatten([row.entropy_S[here] for row in rows]))
        return SparseTarget(self._to_device(ids_TK), self._to_device(weights_TK), entropy_T)

    def _read(self, sample: int) -> Entries:
        if sample != NO_SAMPLE:
            return self._cache.read(sample)
        empty = np.zeros(self._cache.identity.seq_length, np.int64)  # a row that only fills up weighs nothing
        return Entries(empty, empty[:0], empty[:0], empty.astype(np.float32))

    def _to_device(self, array: Array) -> torch.Tensor:
        return to_device(torch.from_numpy(array), self._device)


def _flatten(rows: list[Array]) -> Array:
    """[S, ...] of each row of the micro-batch to [S x B, ...]."""
    stacked = np.stack(rows, axis=1)
    return stacked.reshape(-1, *stacked.shape[2:])
