"""Text to Megatron ``.bin/.idx`` files: ``train``, ``heldout`` and ``data.json``."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from minitron.config.data import DataConfig
from minitron.data.documents import is_heldout
from minitron.data.sources import iter_documents, source_fingerprint
from minitron.data.summary import (
    SUMMARY_NAME,
    DatasetSummary,
    Split,
    SplitSummary,
    check_tokens,
    save_summary,
)
from minitron.data.tokenize import Ids, encode_documents, load_tokenizer_spec


class _SplitWriter:
    """One ``.bin/.idx`` pair and its counts; each document is one Megatron sequence."""

    def __init__(self, out_dir: Path, split: Split, dtype: type[np.number]) -> None:
        self._idx_path = out_dir / f"{split}.idx"
        self._builder = IndexedDatasetBuilder(str(out_dir / f"{split}.bin"), dtype=dtype)
        self.num_documents = self.num_tokens = self.num_bytes = 0

    def add(self, ids: Ids, num_bytes: int) -> None:
        self._builder.add_document(ids, [len(ids)])
        self.num_documents += 1
        self.num_tokens += len(ids)
        self.num_bytes += num_bytes

    def finish(self) -> SplitSummary:
        self._builder.finalize(str(self._idx_path))
        return SplitSummary(num_documents=self.num_documents, num_tokens=self.num_tokens, num_bytes=self.num_bytes)


def build_dataset(
    cfg: DataConfig,
    *,
    tokenizer_dir: Path,
    vocab_size: int,
    out_dir: Path,
    on_progress: Callable[[int, int], None] | None = None,
) -> DatasetSummary:
    """Tokenize the text that ``cfg`` names and write both splits into ``out_dir``.

    A document goes to train or held-out by the hash of its text. The same text, tokenizer and
    ``cfg`` give the same bytes, whatever ``num_workers`` is. ``data.json`` is written last: a
    folder without it is unfinished.

    Args:
        cfg: the text, the split and the number of processes.
        tokenizer_dir: local folder of a Hugging Face tokenizer.
        vocab_size: the model's vocabulary; every id must lie below it.
        out_dir: made if missing; files of an earlier build are replaced.
        on_progress: called with (documents, bytes of text) done so far, about every 0.5 MB.

    Raises:
        DataError: the text is missing or broken, or a split is shorter than one sequence.
        ModelError: the tokenizer cannot be used or does not fit the model.
        PlatformError: a tokenizing process died.
    """
    spec = load_tokenizer_spec(tokenizer_dir, vocab_size=vocab_size, parse_special_tokens=cfg.parse_special_tokens)
    fingerprint = source_fingerprint(cfg)
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / SUMMARY_NAME).unlink(missing_ok=True)
    dtype = DType.optimal_dtype(vocab_size)
    writers = {split: _SplitWriter(out_dir, split, dtype) for split in Split}

    num_documents = num_bytes = 0
    for batch in encode_documents(iter_documents(cfg), spec, num_workers=cfg.num_workers):
        for document, ids in batch:
            heldout = is_heldout(document, cfg.heldout_fraction)
            writers[Split.heldout if heldout else Split.train].add(ids, document.num_bytes)
            num_documents += 1
            num_bytes += document.num_bytes
        if on_progress is not None:
            on_progress(num_documents, num_bytes)

    splits = {split: writer.finish() for split, writer in writers.items()}
    for split, size in splits.items():
        check_tokens(str(out_dir), split, size.num_tokens, num_sequences=1, seq_length=cfg.seq_length)
    summary = DatasetSummary(
        train=splits[Split.train],
        heldout=splits[Split.heldout],
        eos_id=spec.eos_id,
        vocab_size=vocab_size,
        dtype=np.dtype(dtype).name,
        tokenizer_sha256=spec.sha256,
        source_fingerprint=fingerprint,
        train_sha256=_content_sha256(out_dir / Split.train),
    )
    save_summary(out_dir, summary)
    return summary


def _content_sha256(prefix: Path) -> str:
    """Hash of a split's ids and of its index, which has the documents' lengths."""
    digest = hashlib.sha256()
    for suffix in (".bin", ".idx"):
        with prefix.with_suffix(suffix).open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
