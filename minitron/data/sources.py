"""Read documents from files, folders or the installed packages, one at a time.

Documents that hold only white space are skipped. A ``.txt`` file of up to ``SPLIT_ABOVE_BYTES`` is
one document. A longer one is cut at the first blank line after every ``PART_CHARS`` characters (or
at the end of a line after ``MAX_PART_CHARS``), so that it streams, spreads over the tokenizing
processes and can be divided between train and held-out; the parts joined give back the file.
"""

import gzip
import hashlib
import json
import math
import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from minitron.config.data import DataConfig, DataSource
from minitron.data.documents import START, Document, Position, make_document
from minitron.data.local_text import iter_local_text, site_packages
from minitron.errors import DataError
from minitron.runtime.digests import sha256_of

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
SPLIT_ABOVE_BYTES = 1024 * 1024
PART_CHARS = 64 * 1024
MAX_PART_CHARS = 1024 * 1024


def iter_documents(
    cfg: DataConfig, *, after: Position = START, on_skip: Callable[[], None] = lambda: None
) -> Iterator[Document]:
    """Yield the documents that ``cfg`` names, in a fixed order, up to ``cfg.max_bytes``.

    Args:
        cfg: the text.
        after: where to go on.
        on_skip: called for each document before that which has to be read again.

    Raises:
        DataError: a path is missing, of an unknown kind, broken, or nothing at all was found.
    """
    num_bytes, most = after.num_bytes, math.inf if cfg.max_bytes is None else cfg.max_bytes
    if num_bytes >= most:
        return
    for document in _iter_all(cfg, after, on_skip):
        yield document
        num_bytes += document.num_bytes
        if num_bytes >= most:
            return
    if num_bytes == 0:
        where = _where(cfg)
        raise DataError(f"{where}: no document with any text: check data.paths and data.text_key")


def check_enough_text(cfg: DataConfig, *, num_tokens: int) -> None:
    """Refuse a text that cannot give so many tokens, whatever the tokenizer.

    A token is at least one byte; a document adds at most a first and a last one. Reads no further than it must.

    Args:
        cfg: the text.
        num_tokens: the least that a run needs, over both splits.

    Raises:
        DataError: there are fewer; also as ``iter_documents``.
    """
    num_documents = num_bytes = 0
    for document in iter_documents(cfg):
        num_documents += 1
        num_bytes += document.num_bytes
        if num_bytes + 2 * num_documents >= num_tokens:
            return
    raise DataError(
        f"{_where(cfg)}: {num_bytes} bytes in {num_documents} documents are at most {num_bytes + 2 * num_documents} "
        f"tokens, but the first batch and one held-out sequence need {num_tokens}: give more text, or lower "
        "data.seq_length, distill.train.global_batch_size and score.num_samples"
    )


def source_fingerprint(cfg: DataConfig) -> str:
    """Return a SHA-256 (hex) of the content that ``iter_documents(cfg)`` would read.

    Whole files are hashed as they lie on disk (in order, with their kind and ``text_key``), which
    parses nothing. With ``max_bytes``, and for local text, the documents themselves are hashed.

    Raises:
        DataError: as ``iter_documents``.
    """
    digest = hashlib.sha256()
    if _reads_whole_files(cfg):
        files = list_files(cfg.paths)
        for path, content in zip(files, sha256_of(files, unreadable=DataError), strict=True):
            digest.update(f"{_suffix(path)} {cfg.text_key!r} {content}\n".encode())
    else:
        for document in iter_documents(cfg):
            digest.update(document.sha256)
    return digest.hexdigest()


def list_files(paths: list[str]) -> list[Path]:
    """Expand files and folders to files, folders recursively and sorted by path.

    Raises:
        DataError: a path is missing, a file has an unknown suffix, a folder has no known file.
    """
    files: list[Path] = []
    for name in paths:
        path = Path(name)
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if _suffix(p) is not None and p.is_file())
            if not inside:
                raise DataError(
                    f"{path}: the folder holds no {_kinds()} file: correct data.paths or convert "
                    "the text to one of these"
                )
            files.extend(inside)
        elif not path.exists():
            raise DataError(f"{path}: no such file or folder: correct data.paths")
        elif _suffix(path) is None:
            raise DataError(
                f"{path}: unknown kind of file (the name ends in {path.suffix!r}): data.paths "
                f"takes {_kinds()} files and folders of them"
            )
        else:
            files.append(path)
    return files


def _iter_all(cfg: DataConfig, after: Position, on_skip: Callable[[], None]) -> Iterator[Document]:
    """Files are passed over whole where `source_fingerprint` knows them; where it does not, documents are counted."""
    if not _reads_whole_files(cfg):
        yield from _skipping(_iter_counted(cfg), after.num_documents, on_skip)
        return
    for number, path in enumerate(list_files(cfg.paths)):
        if number >= after.file:
            documents = _iter_file(path, number, cfg.text_key)
            yield from _skipping(documents, after.num_documents if number == after.file else 0, on_skip)


def _iter_counted(cfg: DataConfig) -> Iterator[Document]:
    if cfg.source is DataSource.local_text:
        yield from iter_local_text(site_packages())
        return
    for path in list_files(cfg.paths):
        yield from _iter_file(path, 0, cfg.text_key)


def _skipping(documents: Iterator[Document], number: int, on_skip: Callable[[], None]) -> Iterator[Document]:
    for _ in islice(documents, number):
        on_skip()
    yield from documents


def _reads_whole_files(cfg: DataConfig) -> bool:
    return cfg.source is DataSource.files and cfg.max_bytes is None


def _iter_file(path: Path, number: int, text_key: str) -> Iterator[Document]:
    readers = {".txt": _iter_txt, ".parquet": _iter_parquet}
    try:
        for doc_id, text in readers.get(_suffix(path) or "", _iter_jsonl)(path, text_key):
            if text.strip():
                yield make_document(doc_id, text, file=number)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 ({error.reason} near byte {error.start} of a block): convert it, "
            "for example with iconv -t UTF-8"
        ) from error
    except PermissionError as error:
        raise DataError(f"{path}: cannot be read (permission denied): change its mode") from error


def _iter_txt(path: Path, _text_key: str) -> Iterator[tuple[str, str]]:
    if path.stat().st_size <= SPLIT_ABOVE_BYTES:
        yield str(path), path.read_bytes().decode("utf-8-sig")
        return
    with path.open(encoding="utf-8-sig", newline="") as stream:
        part: list[str] = []
        size = first = 0
        for number, line in enumerate(stream):
            part.append(line)
            size += len(line)
            if size >= MAX_PART_CHARS or (size >= PART_CHARS and not line.strip()):
                yield f"{path}:{first + 1}", "".join(part)
                part, size, first = [], 0, number + 1
        yield f"{path}:{first + 1}", "".join(part)


def _iter_jsonl(path: Path, text_key: str) -> Iterator[tuple[str, str]]:
    number = 0
    opener = gzip.open if path.name.endswith(".gz") else open
    try:
        with opener(path, "rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield f"{path}:{number}", _jsonl_text(line, f"{path}:{number}", text_key)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}: broken gzip data after line {number} ({error}): fetch or compress it again"
        ) from error


def _jsonl_text(line: bytes, where: str, text_key: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        reason = str(error).replace("\n", " ")
        raise DataError(f"{where}: not a line of JSON in UTF-8 ({reason}): mend or remove it") from error
    if not isinstance(record, dict):
        raise DataError(
            f"{where}: a JSON {type(record).__name__}, not an object: each line must be an object "
            f"with the key {text_key!r}"
        )
    if text_key not in record:
        raise _missing_key(where, text_key, [str(key) for key in record])
    return _checked_text(record[text_key], where, text_key)


def _iter_parquet(path: Path, text_key: str) -> Iterator[tuple[str, str]]:
    import pyarrow as pa  # only this reader needs it
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as table:
            if text_key not in table.schema_arrow.names:
                raise _missing_key(str(path), text_key, list(table.schema_arrow.names))
            row = 0
            for batch in table.iter_batches(batch_size=1024, columns=[text_key]):
                for value in batch.column(0).to_pylist():
                    where = f"{path}:{row}"
                    row += 1
                    if value is not None:  # a null is an empty document
                        yield where, _checked_text(value, where, text_key)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{path}: not a readable parquet file ({reason}): fetch or write it again") from error


def _checked_text(value: Any, where: str, text_key: str) -> str:
    if not isinstance(value, str):
        raise DataError(
            f"{where}: {text_key!r} holds a {type(value).__name__}, not text: set data.text_key to "
            "the key that holds the text"
        )
    return value


def _missing_key(where: str, text_key: str, present: list[str]) -> DataError:
    return DataError(
        f"{where}: no key {text_key!r}; the keys are {', '.join(present) or 'none'}: set data.text_key to one of them"
    )


def _suffix(path: Path) -> str | None:
    return next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), None)


def _kinds() -> str:
    return ", ".join(SUFFIXES[:-1]) + f" or {SUFFIXES[-1]}"


def _where(cfg: DataConfig) -> str:
    if cfg.source is DataSource.local_text:
        return ", ".join(map(str, site_packages()))
    return ", ".join(cfg.paths)
