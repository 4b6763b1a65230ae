"""Micro-batches for training, calibration and held-out evaluation.

Which sequences make up a batch never depends on the layout. Position ``p`` of a global batch goes
to micro-batch ``p // (micro_batch_size * dp_size)``, and inside it to the DP ranks in turn,
``micro_batch_size`` positions each. Ranks that differ only in TP or PP get the same micro-batches.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import overload

import numpy as np
import torch

from minitron.config.train import num_microbatches
from minitron.data.batch import NO_SAMPLE, Batch
from minitron.data.order import Indices, epoch_order
from minitron.data.packed import PackedSequences, open_split
from minitron.data.summary import Split, require_tokens
from minitron.errors import ConfigError

Sample = dict[str, torch.Tensor]


class TrainBatches:
    """The micro-batches of every training step, as a pure function of the step number.

    The sequences themselves are the same in every run; each epoch reads them in an order of its own,
    made from (seed, epoch). Step ``s`` takes the sequences ``s * global_batch_size`` and following of that
    endless list, so neither ``num_steps`` nor the layout nor where a run was resumed matters.

    Args:
        data_dir: a folder written by ``build_dataset``.
        seq_length: tokens per sequence.
        micro_batch_size: sequences per micro-batch and DP rank.
        global_batch_size: sequences per step, over all DP ranks and micro-batches.
        dp_rank: this process's data-parallel rank.
        dp_size: number of data-parallel ranks.
        seed: decides the order.
        num_steps: steps in the whole run.

    Raises:
        DataError: the data folder is not finished, or holds less than one global batch.
        LayoutError: the global batch does not divide over ranks and micro-batches.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        seq_length: int,
        micro_batch_size: int,
        global_batch_size: int,
        dp_rank: int,
        dp_size: int,
        seed: int,
        num_steps: int,
    ) -> None:
        self.num_microbatches = num_microbatches(global_batch_size, micro_batch_size, dp_size)
        self.global_batch_size = global_batch_size
        self.num_steps = num_steps
        self.samples_per_epoch = require_tokens(
            data_dir, Split.train, num_sequences=global_batch_size, seq_length=seq_length
        )
        self._slots = _rank_slots(micro_batch_size, dp_rank=dp_rank, dp_size=dp_size)
        self._seed = seed
        self._sequences = training_sequences(data_dir, seq_length)
        self._epochs: dict[int, Indices] = {}
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="train-batches")
        self._ahead: dict[int, Future[list[Batch]]] = {}

    def microbatches(self, step: int) -> list[Batch]:
        """Return this DP rank's micro-batches of a step, counted from 0.

        Those of the next step are read in a thread meanwhile: a sequence is made of several documents from anywhere in
        the file, and each takes a network file system some milliseconds.
        """
        assert 0 <= step < self.num_steps, f"step {step} of {self.num_steps}"
        asked = [number for number in (step, step + 1) if number < self.num_steps]
        for number in asked:
            if number not in self._ahead:
                self._ahead[number] = self._reader.submit(self._read, number)
        self._ahead = {number: self._ahead[number] for number in asked}
        return self._ahead.pop(step).result()

    def _read(self, step: int) -> list[Batch]:
        first = step * self.global_batch_size
        return [
            _stack(self._sequences, [self._sample_index(first + slot) for slot in self._slots(micro)])
            for micro in range(self.num_microbatches)
        ]

    def _sample_index(self, position: int) -> int:
        epoch, index = divmod(position, self.samples_per_epoch)
        if epoch not in self._epochs:
            # A global batch reaches into the next epoch at most: keep that and the one before.
            self._epochs = {e: kept for e, kept in self._epochs.items() if e == epoch - 1}
            self._epochs[epoch] = epoch_order(self.samples_per_epoch, seed=self._seed, epoch=epoch)
        return int(self._epochs[epoch][index])


class FixedBatches(Sequence[Batch]):
    """A fixed list of sequences, each exactly once over all DP ranks, cut into micro-batches.

    Every DP rank has the same number of micro-batches. Where the sequences do not fill the last
    ones, rows whose ``loss_mask_BS`` is 0 do.

    Args:
        sequences: the split.
        indices: the sample indices to go through, in this order.
        seq_length: tokens per sequence.
        micro_batch_size: sequences per micro-batch and DP rank.
        dp_rank: this process's data-parallel rank.
        dp_size: number of data-parallel ranks.

    Attributes:
        num_sequences: sequences over all ranks, filling rows not counted.
        num_tokens: their tokens.
    """

    def __init__(
        self,
        sequences: PackedSequences,
        *,
        indices: Indices,
        seq_length: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
    ) -> None:
        self.num_sequences = len(indices)
        self.num_tokens = self.num_sequences * seq_length
        self._sequences = sequences
        self._indices = indices
        self._slots = _rank_slots(micro_batch_size, dp_rank=dp_rank, dp_size=dp_size)
        self._num_microbatches = -(-self.num_sequences // (micro_batch_size * dp_size))

    def __len__(self) -> int:
        """Number of this rank's micro-batches (the same on every rank)."""
        return self._num_microbatches

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> list[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | list[Batch]:
        """Return one micro-batch, or several."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"micro-batch {index} of {len(self)}")
        slots = self._slots(index % len(self))
        chosen = [int(self._indices[slot]) if slot < self.num_sequences else NO_SAMPLE for slot in slots]
        return _stack(self._sequences, chosen)


def training_sequences(data_dir: Path, seq_length: int) -> PackedSequences:
    """Open the training split; item ``i`` is the sequence of sample index ``i``, in every run."""
    tokens, summary = open_split(data_dir, Split.train)
    return PackedSequences(tokens, seq_length=seq_length, facts=summary, shuffle_documents=True)


def heldout_batches(
    data_dir: Path,
    *,
    seq_length: int,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    max_tokens: int | None,
) -> FixedBatches:
    """Return the start of the held-out split, in the order of the file.

    The set is the first ``max_tokens // seq_length`` sequences (all that are full, where the split
    has fewer or ``max_tokens`` is None); ``num_tokens`` of the result says how much that is.

    Raises:
        ConfigError: ``max_tokens`` is less than one sequence.
        DataError: the split is shorter than one sequence.
    """
    available = require_tokens(data_dir, Split.heldout, num_sequences=1, seq_length=seq_length)
    if max_tokens is not None:
        if max_tokens < seq_length:
            raise ConfigError(f"max_tokens={max_tokens} is less than one sequence of seq_length={seq_length}: raise it")
        available = min(available, max_tokens // seq_length)
    tokens, summary = open_split(data_dir, Split.heldout)
    return FixedBatches(
        PackedSequences(tokens, seq_length=seq_length, facts=summary, shuffle_documents=False),
        indices=np.arange(available, dtype=np.int64),
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        dp_rank=dp_rank,
        dp_size=dp_size,
    )


def calibration_batches(
    data_dir: Path,
    *,
    num_samples: int,
    seq_length: int,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    seed: int,
) -> FixedBatches:
    """Return ``num_samples`` sequences of the training split: the first that a run of this seed reads.

    Raises:
        DataError: the split holds fewer.
    """
    available = require_tokens(data_dir, Split.train, num_sequences=num_samples, seq_length=seq_length)
    return FixedBatches(
        training_sequences(data_dir, seq_length),
        indices=epoch_order(available, seed=seed, epoch=0)[:num_samples],
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        dp_rank=dp_rank,
        dp_size=dp_size,
    )


def _rank_slots(micro_batch_size: int, *, dp_rank: int, dp_size: int) -> Callable[[int], range]:
    """Map a micro-batch to the positions that this DP rank takes in it."""
    assert 0 <= dp_rank < dp_size, f"dp_rank {dp_rank} of {dp_size}"

    def slots(micro: int) -> range:
        first = (micro * dp_size + dp_rank) * micro_batch_size
        return range(first, first + micro_batch_size)

    return slots


def _stack(sequences: PackedSequences, indices: list[int]) -> Batch:
    # GPTDataset gives its first sequence with a zero mask for the index None.
    samples: list[Sample] = [sequences[None if index == NO_SAMPLE else index] for index in indices]
    tokens_BS = torch.stack([sample["tokens"] for sample in samples])
    return Batch(
        tokens_BS=tokens_BS,
        labels_BS=torch.stack([sample["labels"] for sample in samples]),
        position_ids_BS=torch.arange(tokens_BS.shape[1]).repeat(len(samples), 1),
        loss_mask_BS=torch.stack([sample["loss_mask"] for sample in samples]),
        sample_index_B=torch.tensor(indices, dtype=torch.int64),
    )
