"""Artefacts of a run: one folder per stage, named by what went into it, complete or absent.

A stage works in ``runs/<name>/.partial/<stage>`` and gets its place ``runs/<name>/<stage>`` by one rename, so a folder
that is there is whole. Its ``meta.json`` holds the stage's identity: the configuration values that decide the result
and the identities of its inputs. A stage whose artefact has the same identity is done; the layout, the device and
how often metrics are logged are not part of it.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron.config.run import OnChange
from minitron.errors import ArtefactError

RESOLVED_FILE = "resolved.yaml"
"""The configuration that every rank loads, in the run's folder."""

OUTSIDE_FILE = "outside.json"
"""Hashes of what the stages read outside the run's folder, made once by the process that starts the ranks."""

WANTED_FILE = "wanted.json"
"""Names of the stages that the last command asked for, in the run's folder: status shows those not begun, too."""

META_FILE = "meta.json"

PARTIAL_DIR = ".partial"
"""Folder of the stages that are not done, in the run's folder."""

_LOCKS_DIR = ".locks"


@dataclass(frozen=True)
class StageIdentity:
    """What a stage's result depends on.

    Attributes:
        stage: Name of the stage.
        values: Configuration values by dotted key.
        inputs: Identity of each input by name: another stage's `digest`, or a hash of outside content.
    """

    stage: str
    values: dict[str, Any]
    inputs: dict[str, str]

    @property
    def digest(self) -> str:
        """Hash over everything: equal digests mean equal results."""
        text = json.dumps([self.stage, self.values, self.inputs], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def differences(self, meta: dict[str, Any]) -> list[str]:
        """What a finished artefact was made with, where it was something else."""
        found = []
        for kind, now in (("values", self.values), ("inputs", self.inputs)):
            before = meta.get(kind, {})
            for key in sorted(before.keys() | now.keys()):
                if before.get(key) != now.get(key):
                    was, new = before.get(key), now.get(key)
                    if kind == "inputs":
                        found.append(f"input {key} has changed")
                    else:
                        found.append(f"{key}: {was} -> {new}")
        return found


class RunFolder:
    """The folder of one run.

    Args:
        path: ``<runs_dir>/<name>``; made when the first stage starts.
        place: Where a stage lies in it, by name; None where every stage has the folder of its name.
    """

    def __init__(self, path: Path, place: Callable[[str], str] | None = None) -> None:
        self.path = path
        self._place = place

    def stage(self, name: str) -> Path:
        """Place of a finished stage."""
        return self.path / (name if self._place is None else self._place(name))

    def meta(self, stage: str) -> dict[str, Any] | None:
        """Metadata of a finished stage, None when it is not done.

        Raises:
            ArtefactError: The folder is there and its metadata cannot be read.
        """
        folder = self.stage(stage)
        if not folder.exists():
            return None
        try:
            meta: dict[str, Any] = json.loads((folder / META_FILE).read_text(encoding="utf-8"))
            if not isinstance(meta, dict) or "digest" not in meta:
                raise ValueError("it has no digest")
        except (OSError, ValueError) as error:
            raise ArtefactError(
                f"{folder} is not a finished stage ({META_FILE}: {error}); move it away, or use another name="
            ) from error
        return meta

    def is_done(self, identity: StageIdentity, on_change: OnChange) -> tuple[bool, list[str]]:
        """Whether a stage can be skipped, and what has changed if it must be run again.

        Raises:
            ArtefactError: It was made with other inputs, and ``on_change`` is ``error``; or the run folder belongs
                to another model.
        """
        meta = self.meta(identity.stage)
        if meta is None:
            return False, []
        if meta["digest"] == identity.digest:
            return True, []
        changed = identity.differences(meta)
        if identity.stage == "import":
            raise ArtefactError(
                f"{self.path} belongs to another model ({_few(changed)}); use another name=, or remove the folder"
            )
        if on_change is OnChange.error:
            raise ArtefactError(
                f"{self.stage(identity.stage)} was made with other inputs ({_few(changed)}); "
                "set on_change=rerun to run it again (the old result is kept aside), or use another name="
            )
        return False, changed

    @contextmanager
    def in_use(self, stage: str) -> Iterator[None]:
        """Keep other jobs from a stage for the length of a block; the system lifts it when this process dies.

        Raises:
            ArtefactError: Another job is at work on it.
        """
        file = self.path / _LOCKS_DIR / stage.replace("/", "_")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            lock = file.open("a")
        except OSError as error:
            raise storage_error(error, file) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ArtefactError(
                    f"another minitron is at work on {self.stage(stage)}; wait for its end, or take another name="
                ) from error
            except OSError as error:
                if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):  # a file system without locks
                    raise storage_error(error, file) from error
            yield

    def begin(self, identity: StageIdentity, *, resumable: bool) -> Path:
        """Make (or find again) the working folder of a stage.

        Args:
            identity: What is about to be made.
            resumable: Keep what an earlier attempt with the same identity left behind; a finished artefact of the
                same identity, which lacks something, becomes the working folder again.
        """
        folder = self.path / PARTIAL_DIR / identity.stage
        meta = self.meta(identity.stage)
        try:
            if resumable and meta is not None and meta["digest"] == identity.digest:
                shutil.rmtree(folder, ignore_errors=True)
                folder.parent.mkdir(parents=True, exist_ok=True)
                self.stage(identity.stage).rename(folder)
                (folder / "digest").write_text(identity.digest)
            mark = folder / "digest"
            same = mark.exists() and mark.read_text() == identity.digest
            if not (resumable and same):
                shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
            mark.write_text(identity.digest)
        except OSError as error:
            raise storage_error(error, folder) from error
        return folder

    def finish(
        self,
        identity: StageIdentity,
        *,
        summary: dict[str, Any],
        seconds: float,
        environment: dict[str, str],
    ) -> Path:
        """Write the metadata and give the working folder its place.

        An older result of the stage moves to ``superseded/``; it is never deleted.
        """
        partial = self.path / PARTIAL_DIR / identity.stage
        final = self.stage(identity.stage)
        meta = {
            "stage": identity.stage,
            "digest": identity.digest,
            "values": identity.values,
            "inputs": identity.inputs,
            "summary": summary,
            "seconds": round(seconds, 2),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "environment": environment,
        }
        try:
            write_json(partial / META_FILE, meta)
            (partial / "digest").unlink(missing_ok=True)
            if final.exists():
                self._set_aside(final)
            final.parent.mkdir(parents=True, exist_ok=True)
            partial.rename(final)
        except OSError as error:
            raise storage_error(error, partial) from error
        return final

    def _set_aside(self, folder: Path) -> None:
        old = json.loads((folder / META_FILE).read_text(encoding="utf-8"))
        place = self.path / "superseded" / f"{folder.name}-{old['digest'][:12]}"
        place.parent.mkdir(exist_ok=True)
        shutil.rmtree(place, ignore_errors=True)  # the same digest: the same result
        folder.rename(place)


def read_wanted(run: Path) -> list[str]:
    """The stages that the last command asked for, in the order of the line; none where it has not said."""
    file = run / WANTED_FILE
    names: list[str] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    return names


def write_json(path: Path, content: Any) -> None:
    """Write JSON by `write_whole`."""
    write_whole(path, json.dumps(content, indent=1, sort_keys=False) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a file through a temporary name, so that it is whole or absent, also when several hosts write it."""
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def storage_error(error: OSError, path: Path) -> ArtefactError:
    """One line for a file system that refuses."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free_gb = shutil.disk_usage(_existing(path)).free / 1e9
        return ArtefactError(
            f"no space left for {path} ({free_gb:.1f} GB free); the stage is not done. Free space, or set runs_dir="
        )
    return ArtefactError(f"cannot write {path}: {error.strerror or error}; set runs_dir= to a writable folder")


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _few(changes: list[str]) -> str:
    shown = ", ".join(changes[:3])
    return shown + (f" and {len(changes) - 3} more" if len(changes) > 3 else "")
