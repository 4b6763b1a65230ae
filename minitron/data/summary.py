"""``data.json``: what a built data folder holds, and whether that is enough."""

import json
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from minitron.errors import DataError

SUMMARY_NAME = "data.json"

PROGRESS_NAME = "progress.json"
"""How far an unfinished data folder is."""


class Split(StrEnum):
    """The two parts of a data folder; a value is the stem of its ``.bin`` and ``.idx``."""

    train = "train"
    heldout = "heldout"


@dataclass(frozen=True, kw_only=True)
class SplitSummary:
    """Size of one split. ``num_tokens`` counts the EOS after each document."""

    num_documents: int
    num_tokens: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class DatasetSummary:
    """Contents of ``data.json``.

    Attributes:
        train: size of the training split.
        heldout: size of the held-out split.
        eos_id: id after each document.
        vocab_size: vocabulary of the model it was built for.
        dtype: NumPy name of the ids' type in the ``.bin`` files.
        tokenizer_sha256: hash of the tokenizer.
        source_fingerprint: hash of the text (``minitron.data.sources.source_fingerprint``).
        heldout_fraction: share of the documents asked to be held out.
        train_sha256: hash of the training split's ids and document lengths. It names the dataset: with a length of
            sequences, sequence ``i`` of it is always the same.
    """

    train: SplitSummary
    heldout: SplitSummary
    eos_id: int
    vocab_size: int
    dtype: str
    tokenizer_sha256: str
    source_fingerprint: str
    heldout_fraction: float
    train_sha256: str

    def split(self, split: Split) -> SplitSummary:
        """Return the size of one split."""
        return self.train if split is Split.train else self.heldout


def save_summary(data_dir: Path, summary: DatasetSummary) -> None:
    """Write ``data.json``, whole or not at all."""
    partial = data_dir / f"{SUMMARY_NAME}.partial"
    partial.write_text(json.dumps(asdict(summary), indent=2) + "\n", encoding="utf-8")
    partial.replace(data_dir / SUMMARY_NAME)


def load_summary(data_dir: Path) -> DatasetSummary:
    """Read ``data.json``.

    Raises:
        DataError: the folder is not a finished data folder.
    """
    path = data_dir / SUMMARY_NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        values |= {split.value: SplitSummary(**values[split.value]) for split in Split}
        return DatasetSummary(**values)
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: not found, so {data_dir} is not a finished data folder: run `minitron data`"
        ) from error
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: not readable ({error}): remove {data_dir} and run `minitron data`") from error


def require_tokens(data_dir: Path, split: Split, *, num_sequences: int, seq_length: int) -> int:
    """Check that a split fills ``num_sequences`` sequences without repeating; return how many fit.

    Raises:
        DataError: it does not; the message shows the arithmetic.
    """
    present = load_summary(data_dir).split(split).num_tokens
    check_tokens(str(data_dir), split, present, num_sequences=num_sequences, seq_length=seq_length)
    return num_whole_sequences(present, seq_length)


def check_tokens(where: str, split: Split, num_tokens: int, *, num_sequences: int, seq_length: int) -> None:
    """Raise the DataError of ``require_tokens`` for a known number of tokens."""
    needed = num_sequences * seq_length + 1  # the last label is one further on
    if num_tokens < needed:
        change = "give more text" if split is Split.train else "give more text, raise heldout_fraction"
        raise DataError(
            f"{where}: split '{split}' has {num_tokens} tokens but {num_sequences} sequences x "
            f"{seq_length} tokens + 1 = {needed} are needed: {change}, or lower seq_length or the "
            "number of sequences"
        )


def num_whole_sequences(num_tokens: int, seq_length: int) -> int:
    """Return how many sequences with their shifted labels fit into a split."""
    return max(0, num_tokens - 1) // seq_length
