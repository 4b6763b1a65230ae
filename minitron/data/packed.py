"""Fixed-length sequences packed from documents, through Megatron's ``GPTDataset``.

``GPTDataset`` lays the documents (each ends with EOS) end to end and cuts the stream into sequences
of ``seq_length`` tokens and their shifted labels; attention and positions run across documents.

Only its index is made here instead, the same for every run: sequence ``i`` of a split depends on the
data folder and ``seq_length`` alone, so that its number, the *sample index*, names its content for
good. What a run reads first is decided by `minitron.data.order`. (Megatron makes the index from a
seed and the run's total number of samples, so that sequence ``i`` is another one in each run, and
caches it in files that only global rank 0 may write.) The index is cheap, so each process makes it
in memory: nothing is written, no rank waits for another, and the data folder may be read-only.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt
from megatron.core.datasets import helpers
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split as MegatronSplit

from minitron.data.order import random_state
from minitron.data.summary import DatasetSummary, Split, load_summary
from minitron.errors import DataError

Index = npt.NDArray[np.integer]

# Megatron's .idx: magic, version, dtype and two counts, then the arrays; the last one has a zero in front.
INDEX_MAGIC = b"MMIDIDX\0\0"
INDEX_HEAD_BYTES = len(INDEX_MAGIC) + 8 + 1 + 8 + 8 + 8
INDEX_DOCUMENT_BYTES = 4 + 8 + 8  # length, first byte, number of the sequence after it

DOCUMENT_ORDER_SEED = 20240719
"""Fixed for good: another one gives every sample index other content."""


class _TokenizerFacts:
    """The part of a tokenizer that ``GPTDataset`` looks at. No pad id: sequences are full."""

    def __init__(self, summary: DatasetSummary) -> None:
        self.eod = summary.eos_id
        self.vocab_size = summary.vocab_size
        self.unique_identifiers = {"tokenizer_sha256": summary.tokenizer_sha256}


class PackedSequences(GPTDataset):
    """A split's sequences by sample index. Item ``i`` holds ``tokens``, ``labels`` and ``loss_mask``, each [S].

    Args:
        tokens: the opened split.
        seq_length: S, in tokens.
        facts: what the data folder says about its tokenizer.
        shuffle_documents: lay the documents end to end in one fixed random order, so that neighbours
            in the file, which often came from one source, do not fill a sequence; False keeps the
            order of the file.
    """

    def __init__(
        self,
        tokens: IndexedDataset,
        *,
        seq_length: int,
        facts: DatasetSummary,
        shuffle_documents: bool,
    ) -> None:
        self._shuffle_documents = shuffle_documents
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
        """Order the documents and cut the sequences. Replaces Megatron's."""
        documents: npt.NDArray[np.int32] = self.indices.copy()
        if self._shuffle_documents:
            random_state(DOCUMENT_ORDER_SEED).shuffle(documents)
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
        return documents, samples, np.arange(len(samples) - 1, dtype=np.int64)


def open_split(data_dir: Path, split: Split) -> tuple[IndexedDataset, DatasetSummary]:
    """Open a split's ``.bin/.idx``, checked as `check_split` does."""
    summary = check_split(data_dir, split)
    return IndexedDataset(str(data_dir / split), multimodal=False, mmap=True), summary


def check_split(data_dir: Path, split: Split) -> DatasetSummary:
    """Check the sizes of a split's ``.bin/.idx`` against ``data.json``; what that says.

    Raises:
        DataError: a file is missing or is not the one that ``data.json`` describes.
    """
    summary = load_summary(data_dir)
    prefix = data_dir / split
    size = summary.split(split)
    num_bytes = size.num_tokens * np.dtype(summary.dtype).itemsize
    for suffix in (".bin", ".idx"):
        if not prefix.with_suffix(suffix).is_file():
            raise DataError(f"{prefix}{suffix}: no such file: remove {data_dir} and run `minitron data`")
    on_disk = prefix.with_suffix(".bin").stat().st_size
    if on_disk != num_bytes:
        raise DataError(
            f"{prefix}.bin: {on_disk} bytes but data.json counts {size.num_tokens} tokens of "
            f"{summary.dtype} = {num_bytes} bytes: remove {data_dir} and run `minitron data`"
        )
    _check_index(prefix.with_suffix(".idx"), size.num_documents)
    return summary


def _check_index(path: Path, num_documents: int) -> None:
    """Find what Megatron's reader would only trip over: the size follows from the number of documents."""
    expected = INDEX_HEAD_BYTES + num_documents * INDEX_DOCUMENT_BYTES
    with path.open("rb") as stream:
        head = stream.read(len(INDEX_MAGIC))
    if head != INDEX_MAGIC or path.stat().st_size != expected:
        raise DataError(
            f"{path}: {path.stat().st_size} bytes, not an index of {num_documents} documents "
            f"({expected} bytes): remove {path.parent} and run `minitron data`"
        )
