"""Fixed-length sequences packed from documents, through Megatron's ``GPTDataset``.

``GPTDataset`` lays the documents (each ends with EOS) end to end and cuts the stream into sequences
of ``seq_length`` tokens and their shifted labels; attention and positions run across documents.

Only its index is made here instead: one epoch, from a seed of its own. Megatron makes the order of
a run from its total number of samples, so that a longer run would see other data from the first
step, and caches the index in files that only global rank 0 may write. One epoch is cheap to order,
so each process does it in memory: nothing is written, no rank waits for another, and the data
folder may be read-only.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt
from megatron.core.datasets import helpers
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split as MegatronSplit

from minitron.data.summary import DatasetSummary, Split, load_summary
from minitron.errors import DataError

Index = npt.NDArray[np.integer]

# Megatron's .idx: magic, version, dtype and two counts, then the arrays; the last one has a zero in front.
INDEX_MAGIC = b"MMIDIDX\0\0"
INDEX_HEAD_BYTES = len(INDEX_MAGIC) + 8 + 1 + 8 + 8 + 8
INDEX_DOCUMENT_BYTES = 4 + 8 + 8  # length, first byte, number of the sequence after it


class _TokenizerFacts:
    """The part of a tokenizer that ``GPTDataset`` looks at. No pad id: sequences are full."""

    def __init__(self, summary: DatasetSummary) -> None:
        self.eod = summary.eos_id
        self.vocab_size = summary.vocab_size
        self.unique_identifiers = {"tokenizer_sha256": summary.tokenizer_sha256}


class PackedSequences(GPTDataset):
    """One epoch of a split. Item ``i`` holds ``tokens``, ``labels`` and ``loss_mask``, each [S].

    Args:
        tokens: the opened split.
        seq_length: S, in tokens.
        facts: what the data folder says about its tokenizer.
        order: seed and epoch that decide the order of documents and of sequences; None keeps the
            order of the file.
    """

    def __init__(
        self,
        tokens: IndexedDataset,
        *,
        seq_length: int,
        facts: DatasetSummary,
        order: tuple[int, int] | None,
    ) -> None:
        self._order = order
        config = GPTDatasetConfig(
            random_seed=0,  # not read: the index is made below
            sequence_length=seq_length,
            tokenizer=_TokenizerFacts(facts),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        documents = np.arange(len(tokens), dtype=np.int32)
        super().__init__(tokens, tokens.path_prefix, documents, None, MegatronSplit.train, config)

    def _build_document_sample_shuffle_indices(self) -> tuple[Index, Index, Index]:
        """Order the documents, cut the sequences, order the sequences. Replaces Megatron's."""
        documents: npt.NDArray[np.int32] = self.indices.copy()
        random = None if self._order is None else _random_state(*self._order)
        if random is not None:
            random.shuffle(documents)
        lengths = self.dataset.sequence_lengths
        samples = helpers.build_sample_idx(
            lengths.copy(),  # out of the memory map, which the C++ loop reads at random
            documents,
            self.config.sequence_length,
            1,  # epoch
            int(lengths.sum(dtype=np.int64)),
            True,  # drop the last sequence if it is not full
            True,  # one token more, for the labels
        )
        sequences = np.arange(len(samples) - 1, dtype=np.int64)
        if random is not None:
            random.shuffle(sequences)
        return documents, samples, sequences


def open_split(data_dir: Path, split: Split) -> tuple[IndexedDataset, DatasetSummary]:
    """Open a split's ``.bin/.idx`` and check it against ``data.json``.

    Raises:
        DataError: a file is missing or is not the one that ``data.json`` describes.
    """
    summary = load_summary(data_dir)
    prefix = data_dir / split
    size = summary.split(split)
    num_bytes = size.num_tokens * np.dtype(summary.dtype).itemsize
    for suffix in (".bin", ".idx"):
        if not prefix.with_suffix(suffix).is_file():
            raise DataError(f"{prefix}{suffix}: no such file: run `minitron data` again")
    on_disk = prefix.with_suffix(".bin").stat().st_size
    if on_disk != num_bytes:
        raise DataError(
            f"{prefix}.bin: {on_disk} bytes but data.json counts {size.num_tokens} tokens of "
            f"{summary.dtype} = {num_bytes} bytes: run `minitron data` again"
        )
    _check_index(prefix.with_suffix(".idx"), size.num_documents)
    tokens = IndexedDataset(str(prefix), multimodal=False, mmap=True)
    return tokens, summary


def _check_index(path: Path, num_documents: int) -> None:
    """Find what Megatron's reader would only trip over: the size follows from the number of documents."""
    expected = INDEX_HEAD_BYTES + num_documents * INDEX_DOCUMENT_BYTES
    with path.open("rb") as stream:
        head = stream.read(len(INDEX_MAGIC))
    if head != INDEX_MAGIC or path.stat().st_size != expected:
        raise DataError(
            f"{path}: {path.stat().st_size} bytes, not an index of {num_documents} documents "
            f"({expected} bytes): run `minitron data` again"
        )


def _random_state(seed: int, epoch: int) -> np.random.RandomState:
    # SeedSequence keeps (seed 0, epoch 1) apart from (seed 1, epoch 0); RandomState is the one
    # generator whose stream NumPy promises never to change, which an exact resume depends on.
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed, epoch])))
