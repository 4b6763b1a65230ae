"""A folder of sparse teacher distributions, found by sample index. NumPy only: planning reads it too.

``cache.json`` says what the distributions belong to (`CacheIdentity`). Each ``*.shard`` beside it holds
records of whole sequences: a head, a table of (sample index, offset, length, CRC-32), the records. A shard gets
its name when it is complete, so a killed writer leaves whole shards. Little-endian throughout.

A record has, for S tokens with n_s entries each: the n_s, the entropies (fp32), all ids, all weights. An id takes
2, 3 or 4 bytes, as the vocabulary needs; a weight is a count of draws, or an fp16 probability.
"""

import json
import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from minitron.config.teacher_logits import CacheMethod, TeacherLogitsConfig
from minitron.data.order import Indices
from minitron.errors import ArtefactError
from minitron.runtime.artefact import write_json

FORMAT = 1
INFO_FILE = "cache.json"
SHARD_SUFFIX = ".shard"
PARTIAL_SUFFIX = ".partial"

_MAGIC = b"MTLOGITS"
_HEAD = struct.Struct("<8sQQQ")  # magic, records, bytes of records, CRC-32 of the table
_TABLE = np.dtype([("sample", "<i8"), ("offset", "<i8"), ("length", "<i8"), ("crc32", "<i8")])
_AGAIN = "remove it and run `minitron teacher-logits` again, which writes what is missing"

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class CacheIdentity:
    """What the distributions of a cache belong to.

    Attributes:
        dataset: Hash of the training split (``train_sha256`` in ``data.json``).
        seq_length: Tokens of a sequence.
        vocab_size: Ids that the teacher and the data's tokenizer both have (`common_vocab_size`): the distributions
            are over these.
        teacher: Identity of the teacher's weights.
        dtype: Number format the teacher ran in (`PrecisionConfig.label`).
        parameters: What is kept of each distribution (`TeacherLogitsConfig.parameters`).
    """

    dataset: str
    seq_length: int
    vocab_size: int
    teacher: str
    dtype: str
    parameters: dict[str, Any]

    @property
    def settings(self) -> TeacherLogitsConfig:
        """The method as a configuration section."""
        return TeacherLogitsConfig(**self.parameters | {"method": CacheMethod(self.parameters["method"])})


@dataclass(frozen=True)
class Entries:
    """The kept part of the distributions of one sequence.

    Attributes:
        number_S: Entries of each token.
        ids: The entries' token ids, one token after the other.
        weights: Their counts of draws, or probabilities.
        entropy_S: Entropy of each token's whole distribution, in nats.
    """

    number_S: Array
    ids: Array
    weights: Array
    entropy_S: Array

    def padded(self, num_slots: int) -> tuple[Array, Array]:
        """Ids [S, slots] (int64, -1 where a slot is not used) and weights [S, slots] (fp32, 0 there)."""
        used_SK = np.arange(num_slots) < self.number_S[:, None]
        ids_SK = np.full(used_SK.shape, -1, np.int64)
        weights_SK = np.zeros(used_SK.shape, np.float32)
        ids_SK[used_SK], weights_SK[used_SK] = self.ids, self.weights
        return ids_SK, weights_SK


class Codec:
    """Entries to bytes and back.

    Args:
        settings: What is kept.
        vocab_size: True size of the vocabulary.
        seq_length: Tokens of a sequence (S).
    """

    def __init__(self, settings: TeacherLogitsConfig, vocab_size: int, seq_length: int) -> None:
        number, self._id_bytes, weight = settings.entry_bytes(vocab_size)
        self._number = np.dtype(f"<u{number}")
        self._weight = np.dtype(f"<u{weight}" if settings.method is CacheMethod.sampled else "<f2")
        self._seq_length = seq_length

    def encode(self, entries: Entries) -> bytes:
        """One record."""
        id_bytes = entries.ids.astype("<u4").view(np.uint8).reshape(-1, 4)[:, : self._id_bytes]
        parts = (
            entries.number_S.astype(self._number),
            entries.entropy_S.astype("<f4"),
            id_bytes,
            entries.weights.astype(self._weight),
        )
        return b"".join(part.tobytes() for part in parts)

    def decode(self, record: bytes) -> Entries:
        """The entries of one record."""
        length = self._seq_length
        number_S = np.frombuffer(record, self._number, length).astype(np.int64)
        offset = length * self._number.itemsize
        entropy_S = np.frombuffer(record, "<f4", length, offset)
        offset, total = offset + entropy_S.nbytes, int(number_S.sum())
        id_bytes = np.zeros((total, 4), np.uint8)
        stored = np.frombuffer(record, np.uint8, total * self._id_bytes, offset)
        id_bytes[:, : self._id_bytes] = stored.reshape(total, self._id_bytes)
        weights = np.frombuffer(record, self._weight, total, offset + total * self._id_bytes)
        return Entries(number_S, id_bytes.view("<u4").ravel().astype(np.int64), weights, entropy_S)


class LogitCache:
    """A cache open for reading: which samples it has, and their entries.

    Args:
        folder: The cache's folder.

    Attributes:
        identity: What it belongs to.
        samples: The sample indices it has, ascending.
        num_bytes: Size of all shards.

    Raises:
        ArtefactError: There is none, it is of another format, or a shard is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.identity = read_identity(folder)
        self._codec = Codec(self.identity.settings, self.identity.vocab_size, self.identity.seq_length)
        self._shards = sorted(folder.glob(f"*{SHARD_SUFFIX}"))
        tables = [_read_table(shard) for shard in self._shards]
        self._rows = np.concatenate(tables) if tables else np.empty(0, _TABLE)
        self._shard_of_row = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
        self.samples, self._row_of_sample = np.unique(self._rows["sample"], return_index=True)
        self.num_bytes = sum(shard.stat().st_size for shard in self._shards)

    def missing(self, needed: Indices) -> Indices:
        """Those of some sample indices that it does not have."""
        found: Indices = np.setdiff1d(needed, self.samples)
        return found

    def check(self, expected: CacheIdentity, *, to_extend: bool) -> None:
        """Refuse to serve anything but what the cache was made for.

        Args:
            expected: What this run has.
            to_extend: Whether samples are to be added; to read it, the teacher's number format and what was kept
                may be others than this run would choose.

        Raises:
            ArtefactError: With both values.
        """
        for name, here in asdict(expected).items():
            there = getattr(self.identity, name)
            if name in ("dtype", "parameters") and not to_extend:
                continue
            if there != here:
                raise ArtefactError(
                    f"{self.folder} holds another teacher's or dataset's distributions: {name} is {there} there and "
                    f"{here} here; use the same, or make a cache for this run with `minitron teacher-logits`"
                )

    def read(self, sample: int) -> Entries:
        """The entries of one sequence.

        Raises:
            ArtefactError: The record's bytes are not those that were written.
        """
        place = int(np.searchsorted(self.samples, sample))
        assert self.samples[place : place + 1].tolist() == [sample], f"sample {sample} is not in the cache"
        row = self._row_of_sample[place]
        with self._shards[self._shard_of_row[row]].open("rb") as file:  # not kept open: there may be thousands
            return self._codec.decode(_read_record(file, self._rows[row]))

    def check_records(self, *, rank: int, world_size: int) -> None:
        """Read a rank's share of the shards from end to end, and see whether every record is what was written.

        One rank took 1.0 s per GB that was in memory (a core of an AMD EPYC), and 1.1 to 6 s per GB from disk: 1.02 GB
        in 4 shards, read twice each way.

        Args:
            rank: This rank.
            world_size: Number of ranks that share the work.

        Raises:
            ArtefactError: One is not.
        """
        for number in range(rank, len(self._shards), world_size):
            first, last = np.searchsorted(self._shard_of_row, [number, number + 1])
            with self._shards[number].open("rb") as file:
                for row in self._rows[first:last]:
                    _read_record(file, row)


def write_identity(folder: Path, identity: CacheIdentity) -> None:
    """Write ``cache.json``."""
    write_json(folder / INFO_FILE, {"format": FORMAT, **asdict(identity)})


def write_shard(path: Path, records: Sequence[tuple[int, bytes]]) -> None:
    """Write a shard, whole or not at all.

    Args:
        path: Its place.
        records: Sample index and bytes of each record.
    """
    table = np.zeros(len(records), _TABLE)
    offset = _HEAD.size + table.nbytes
    for row, (sample, record) in enumerate(records):
        table[row] = (sample, offset, len(record), zlib.crc32(record))
        offset += len(record)
    partial = path.with_suffix(PARTIAL_SUFFIX)
    with partial.open("wb") as file:
        size = offset - _HEAD.size - table.nbytes
        file.write(_HEAD.pack(_MAGIC, len(records), size, zlib.crc32(table.tobytes())))
        file.write(table.tobytes())
        file.writelines(record for _, record in records)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_identity(folder: Path) -> CacheIdentity:
    """Read ``cache.json``.

    Raises:
        ArtefactError: There is none, or it is of another format.
    """
    path = folder / INFO_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        return CacheIdentity(**values)
    except FileNotFoundError as error:
        raise ArtefactError(f"{path} does not exist, so {folder} is no cache; run `minitron teacher-logits`") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArtefactError(
            f"{path} cannot be read ({error}); remove {folder} and run `minitron teacher-logits` in the run that it "
            "belongs to, which writes it again; or give the folder of another cache as distill.teacher.cache"
        ) from error


def _read_record(file: BinaryIO, row: Any) -> bytes:
    """The record that a row of a shard's table names, as it was written."""
    sample, offset, length, crc32 = row.tolist()
    file.seek(offset)
    record = file.read(length)
    if zlib.crc32(record) != crc32:
        raise ArtefactError(f"{file.name}: the record of sample {sample} is damaged; {_AGAIN}")
    return record


def _read_table(path: Path) -> Array:
    """A shard's table, after checks that find a truncated or foreign file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_HEAD.size)
        if len(head) < _HEAD.size or not head.startswith(_MAGIC):
            raise ArtefactError(f"{path} ({size} bytes) is not a shard; {_AGAIN}")
        _, num_records, num_bytes, crc32 = _HEAD.unpack(head)
        whole = _HEAD.size + num_records * _TABLE.itemsize + num_bytes
        if size != whole:
            raise ArtefactError(f"{path} is truncated: {size} bytes of {whole}; {_AGAIN}")
        table = file.read(num_records * _TABLE.itemsize)
    if zlib.crc32(table) != crc32:
        raise ArtefactError(f"{path}: the table is damaged; {_AGAIN}")
    return np.frombuffer(table, _TABLE)
