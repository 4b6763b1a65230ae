"""A data folder that is being written: both splits, and how far they are, so that a build can go on.

``.bin`` holds the ids, ``.lengths`` those of the documents; both only grow, and are cut back to what ``progress.json``
says. Megatron's index is made of the lengths in the end.
"""

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from minitron.data.documents import START, Document, Position, is_heldout
from minitron.data.summary import PROGRESS_NAME, Split, SplitSummary
from minitron.data.tokenize import Ids
from minitron.runtime.artefact import write_json

SAVE_EVERY_BYTES = 256 * 2**20
"""Bytes of text between two notes of how far it is."""

_LENGTH = np.dtype(np.int32)  # as in Megatron's index


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Contents of ``progress.json``.

    Attributes:
        source: What is read and how it is divided; other text starts anew.
        position: How far the text has been read.
        splits: What both splits hold.
    """

    source: str
    position: Position
    splits: dict[Split, SplitSummary]

    @property
    def num_documents(self) -> int:
        """Documents of both splits."""
        return sum(size.num_documents for size in self.splits.values())


class GrowingDataset:
    """Both splits on the way; what an earlier build of the same source has left is kept.

    Args:
        out_dir: The data folder.
        dtype: NumPy name of the type of the ids.
        source: See `Progress`.
        heldout_fraction: Share of the documents that are held out.

    Attributes:
        progress: What it holds.
    """

    def __init__(self, out_dir: Path, dtype: str, *, source: str, heldout_fraction: float) -> None:
        self._out_dir, self._dtype, self._heldout_fraction = out_dir, np.dtype(dtype), heldout_fraction
        none = {split: SplitSummary(num_documents=0, num_tokens=0, num_bytes=0) for split in Split}
        saved = _read(out_dir / PROGRESS_NAME)
        self.progress = Progress(source=source, position=START, splits=none)
        if saved is not None and saved.source == source and self._is_there(saved):
            self.progress = saved
        else:  # what is written from here on must not be taken for what it says
            (out_dir / PROGRESS_NAME).unlink(missing_ok=True)
        self._saved_at = self.progress.position.num_bytes
        self._ids = {split: _cut(self._path(split, "bin"), self._sizes(split)[0]) for split in Split}
        self._lengths = {split: _cut(self._path(split, "lengths"), self._sizes(split)[1]) for split in Split}

    def add(self, document: Document, ids: Ids) -> None:
        """Append a document to the split that its text decides."""
        split = Split.heldout if is_heldout(document, self._heldout_fraction) else Split.train
        self._ids[split].write(ids.astype(self._dtype).tobytes())
        self._lengths[split].write(_LENGTH.type(len(ids)).tobytes())
        size = self.progress.splits[split]
        self.progress.splits[split] = SplitSummary(
            num_documents=size.num_documents + 1,
            num_tokens=size.num_tokens + len(ids),
            num_bytes=size.num_bytes + document.num_bytes,
        )
        self.progress = replace(self.progress, position=self.progress.position.after(document))

    def save(self, *, every_bytes: int = 0) -> None:
        """Bring all to the disk, if so much text was added since the last time."""
        if self.progress.position.num_bytes - self._saved_at < every_bytes:
            return
        for stream in (*self._ids.values(), *self._lengths.values()):
            stream.flush()
            os.fsync(stream.fileno())
        write_json(self._out_dir / PROGRESS_NAME, asdict(self.progress))
        self._saved_at = self.progress.position.num_bytes

    def write_indices(self) -> None:
        """Write Megatron's ``.idx`` of both splits."""
        self.save()
        for split in Split:
            lengths = np.fromfile(self._path(split, "lengths"), _LENGTH)
            index = IndexedDatasetBuilder(os.devnull, dtype=self._dtype.type)  # the ids are where they belong
            index.sequence_lengths, index.document_indices = lengths, np.arange(len(lengths) + 1)
            index.finalize(str(self._path(split, "idx")))

    def close(self) -> None:
        """Close the files."""
        for stream in (*self._ids.values(), *self._lengths.values()):
            stream.close()

    def _path(self, split: Split, suffix: str) -> Path:
        return self._out_dir / f"{split}.{suffix}"

    def _sizes(self, split: Split, progress: Progress | None = None) -> tuple[int, int]:
        """Bytes of a split's ids and lengths."""
        size = (progress or self.progress).splits[split]
        return size.num_tokens * self._dtype.itemsize, size.num_documents * _LENGTH.itemsize

    def _is_there(self, saved: Progress) -> bool:
        """Whether the files hold what was noted: a disk may have lost it."""
        files = [self._path(split, suffix) for split in Split for suffix in ("bin", "lengths")]
        sizes = [size for split in Split for size in self._sizes(split, saved)]
        return all(file.is_file() and file.stat().st_size >= size for file, size in zip(files, sizes, strict=True))


def forget_progress(out_dir: Path) -> None:
    """Remove what only a build needs, once the folder is finished."""
    for name in (PROGRESS_NAME, *(f"{split}.lengths" for split in Split)):
        (out_dir / name).unlink(missing_ok=True)


def _read(file: Path) -> Progress | None:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        splits = {split: SplitSummary(**values["splits"][split]) for split in Split}
        return Progress(source=values["source"], position=Position(**values["position"]), splits=splits)
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # none, or another version's
        return None


def _cut(file: Path, size: int) -> BinaryIO:
    """Open a file to append at ``size`` bytes; what lies beyond is given up."""
    stream = file.open("ab")
    stream.truncate(size)
    return stream
