"""SHA-256 of files; those of large ones are remembered for as long as the files stay as they are.

A run's text and model are hashed at every submission, to know what is done. That of hundreds of gigabytes takes minutes
even when nothing has changed, so a digest is kept with the file's size, times and inode, and holds while these do.
"""

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from minitron.errors import MinitronError
from minitron.runtime.artefact import write_whole
from minitron.runtime.env import cache_folder, num_cores

NOTES_NAME = "sha256.json"

REMEMBERED_FROM_BYTES = 64 * 2**20
"""Smaller files are read again: that is quick, and keeps the notes short."""

_SETTLED_AFTER_S = 60
"""A file changed more recently is not remembered: another change could leave its times equal."""

_MOST_FILES = 100_000
_FILES_AT_ONCE = 8
_BLOCK_BYTES = 2**20

Stamp = list[int]
Note = tuple[Stamp, str]


def sha256_of(files: Sequence[Path], *, unreadable: type[MinitronError]) -> list[str]:
    """Hash whole files, several at a time.

    Args:
        files: The files.
        unreadable: The error of a file that cannot be read.

    Returns:
        SHA-256 (hex) of each, in order.

    Raises:
        MinitronError: ``unreadable``.
    """
    remembered, notes, given_up = _remembered(), dict[str, Note](), threading.Event()

    def go_on() -> None:
        if given_up.is_set():
            raise CancelledError  # what is half read is not noted

    def digest(file: Path) -> str:
        try:
            with file.open("rb") as stream:  # opened also to be looked at: NFS asks its server then, and not before
                name, stamp = str(file.resolve()), _stamp(stream)
                known = remembered.get(name)
                if known is not None and known[0] == stamp:
                    return known[1]
                found = digest_of(stream, go_on)
                if stamp[0] >= REMEMBERED_FROM_BYTES and _is_settled(stream) and _stamp(stream) == stamp:
                    notes[name] = (stamp, found)
            return found
        except OSError as error:
            raise unreadable(f"{file} cannot be read: {error.strerror or error}; mend it, or name another") from error

    try:
        with ThreadPoolExecutor(min(_FILES_AT_ONCE, num_cores())) as threads:
            try:
                return list(threads.map(digest, files))
            except BaseException:  # Ctrl-C too: do not read on
                given_up.set()
                raise
    finally:
        if notes:
            _remember(dict(notes))


def digest_of(stream: BinaryIO, on_block: Callable[[], None]) -> str:
    """SHA-256 (hex) of what is left in a stream; ``on_block`` is called for every MiB and may end it by raising."""
    digest = hashlib.sha256()
    while block := stream.read(_BLOCK_BYTES):
        on_block()
        digest.update(block)
    return digest.hexdigest()


def _is_settled(stream: BinaryIO) -> bool:
    """Whether the file has not changed of late, and its file system has a time of change of its own.

    Images such as .sqsh give the time of the content for it, in whole seconds.
    """
    found = os.fstat(stream.fileno())
    own_time = found.st_ctime_ns != found.st_mtime_ns or found.st_ctime_ns % 10**9 != 0
    return own_time and time.time() - found.st_ctime > _SETTLED_AFTER_S


def _stamp(stream: BinaryIO) -> Stamp:
    """What changes with a file's content; programs cannot set back the time of the last change of its inode."""
    found = os.fstat(stream.fileno())
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _remembered() -> dict[str, Note]:
    try:
        notes = json.loads((cache_folder() / NOTES_NAME).read_text(encoding="utf-8"))
        return {name: (list(stamp), str(digest)) for name, (stamp, digest) in notes.items()}
    except (OSError, ValueError, TypeError, AttributeError):  # none yet, or of no use: hash again
        return {}


def _remember(notes: dict[str, Note]) -> None:
    """Add to the notes; two that write at once lose some, which are made again."""
    others = {name: note for name, note in _remembered().items() if name not in notes}
    kept = dict(list((others | notes).items())[-_MOST_FILES:])
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        write_whole(cache_folder() / NOTES_NAME, json.dumps(kept))
    except OSError:  # a home that cannot be written, or none: the next one hashes again
        return
