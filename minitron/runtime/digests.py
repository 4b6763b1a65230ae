"""SHA-256 of files; those of large ones are remembered for as long as the files stay as they are.

A run's text and model are hashed at every submission, to know what is done. That of hundreds of gigabytes takes minutes
even when nothing has changed, so a digest is kept with the file's size, times and inode, and holds while these do.
"""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from minitron.errors import MinitronError
from minitron.runtime.artefact import write_whole
from minitron.runtime.env import cache_folder, num_cores

REMEMBERED_FROM_BYTES = 64 * 2**20
"""Smaller files are read again: that is quick, and keeps the notes short."""

_SETTLED_AFTER_S = 60
"""A file changed more recently is not remembered: another change could leave its times equal."""

_MOST_FILES = 100_000
_FILES_AT_ONCE = 8

Stamp = list[int]


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
    remembered = _remembered()
    notes: dict[str, tuple[Stamp, str]] = {}

    def digest(file: Path) -> str:
        with file.open("rb") as stream:  # opened also to be looked at: NFS asks its server then, and not before
            name, stamp = str(file.resolve()), _stamp(stream)
            known = remembered.get(name)
            if known is not None and known[0] == stamp:
                return known[1]
            found = hashlib.file_digest(stream, "sha256").hexdigest()
            settled = time.time() - os.fstat(stream.fileno()).st_ctime > _SETTLED_AFTER_S
            if stamp[0] >= REMEMBERED_FROM_BYTES and settled and _stamp(stream) == stamp:
                notes[name] = (stamp, found)
        return found

    with ThreadPoolExecutor(min(_FILES_AT_ONCE, num_cores())) as threads:
        try:
            digests = list(threads.map(digest, files))
        except OSError as error:
            raise unreadable(f"{error.filename} cannot be read: {error.strerror}; mend it, or name another") from error
    if notes:
        _remember(notes)
    return digests


def _stamp(stream: BinaryIO) -> Stamp:
    """What changes with a file's content; the time of the last change of its inode cannot be set back."""
    found = os.fstat(stream.fileno())
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _notes_file() -> Path:
    return cache_folder() / "sha256.json"


def _remembered() -> dict[str, tuple[Stamp, str]]:
    try:
        notes = json.loads(_notes_file().read_text(encoding="utf-8"))
        return {name: (list(stamp), str(digest)) for name, (stamp, digest) in notes.items()}
    except (OSError, ValueError, TypeError, AttributeError):  # none yet, or of no use: hash again
        return {}


def _remember(notes: dict[str, tuple[Stamp, str]]) -> None:
    """Add to the notes; two that write at once lose some, which are made again."""
    others = {name: note for name, note in _remembered().items() if name not in notes}
    kept = dict(list((others | notes).items())[-_MOST_FILES:])
    try:
        _notes_file().parent.mkdir(parents=True, exist_ok=True)
        write_whole(_notes_file(), json.dumps(kept))
    except OSError:  # a home that cannot be written, or none: the next one hashes again
        return
