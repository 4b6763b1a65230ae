"""Digests of files: those of hashlib, and remembered for as long as a file stays as it is."""

import errno
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO

import pytest

from minitron.errors import DataError
from minitron.runtime import digests
from minitron.runtime.digests import sha256_of


@pytest.fixture(autouse=True)
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where digests are kept; here those of every file, however small and new."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "REMEMBERED_FROM_BYTES", 1)
    monkeypatch.setattr(digests, "_SETTLED_AFTER_S", -1)
    return tmp_path / "cache" / "minitron" / "sha256.json"


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Some files."""
    made = [tmp_path / f"{number}.bin" for number in range(5)]
    for file in made:
        file.write_bytes(os.urandom(3 * 2**20))
    return made


def hashed(files: list[Path]) -> list[str]:
    """Digests; none of the files is unreadable."""
    return sha256_of(files, unreadable=DataError)


def real(files: list[Path]) -> list[str]:
    """The same, each file read."""
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


def test_digests_are_those_of_the_content_in_order(files: list[Path]) -> None:
    assert hashed(files) == real(files) == hashed(files)
    assert hashed(files[::-1]) == real(files)[::-1]
    assert hashed([]) == []


def test_a_file_that_stays_is_not_read_again(files: list[Path], notes: Path) -> None:
    hashed(files)
    kept = json.loads(notes.read_text())
    assert set(kept) == {str(file) for file in files}
    kept[str(files[1])][1] = "remembered"
    notes.write_text(json.dumps(kept))
    assert hashed(files)[1] == "remembered"


@pytest.mark.parametrize("change", ["rewritten", "replaced", "longer"])
def test_a_changed_file_is_read_again_though_its_time_is_set_back(files: list[Path], change: str) -> None:
    hashed(files)
    before, content = files[1].stat(), os.urandom(3 * 2**20)
    if change == "rewritten":
        files[1].write_bytes(content)
    elif change == "replaced":
        (files[1].parent / "new").write_bytes(content)
        (files[1].parent / "new").rename(files[1])
    else:
        with files[1].open("ab") as stream:
            stream.write(b"1")
    os.utime(files[1], ns=(before.st_atime_ns, before.st_mtime_ns))
    assert hashed(files) == real(files)


def test_small_and_new_files_are_not_remembered(
    files: list[Path], notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "_SETTLED_AFTER_S", 60)
    hashed(files)
    monkeypatch.setattr(digests, "_SETTLED_AFTER_S", -1)
    monkeypatch.setattr(digests, "REMEMBERED_FROM_BYTES", 4 * 2**20)
    hashed(files)
    assert not notes.exists()


@pytest.mark.parametrize("content", ["no JSON", "[]", '{"a": 1}', "\xff"])
def test_broken_notes_are_of_no_use(files: list[Path], notes: Path, content: str) -> None:
    notes.parent.mkdir(parents=True)
    notes.write_text(content, encoding="latin-1")
    assert hashed(files) == real(files)


def test_a_cache_that_cannot_be_written(files: list[Path], notes: Path) -> None:
    notes.parent.parent.write_text("in the way")
    assert hashed(files) == real(files)


def test_an_unreadable_file_is_the_callers_error(files: list[Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone.bin cannot be read: No such file or directory; mend it"):
        hashed([*files, tmp_path / "gone.bin"])


def test_a_disk_that_fails_is_named_and_what_was_hashed_is_kept(
    files: list[Path], notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_digest = digests.digest_of

    def failing(stream: BinaryIO, on_block: Callable[[], None]) -> str:
        if stream.name == str(files[4]):
            raise OSError(errno.EIO, "Input/output error")
        return real_digest(stream, on_block)

    monkeypatch.setattr(digests, "digest_of", failing)
    with pytest.raises(DataError, match=r"4.bin cannot be read: Input/output error; mend it"):
        hashed(files)
    assert str(files[0]) in json.loads(notes.read_text())


def test_a_file_system_without_a_time_of_change_is_not_trusted(files: list[Path], notes: Path) -> None:
    """Which gives whole seconds of the content's time for it; the clock of these files is finer."""
    second = files[0].stat().st_ctime_ns // 10**9 * 10**9
    settled = SimpleNamespace(st_ctime_ns=second, st_mtime_ns=second, st_ctime=second / 1e9)
    with files[0].open("rb") as stream, pytest.MonkeyPatch.context() as patch:
        patch.setattr(digests.os, "fstat", lambda _number: settled)
        assert not digests._is_settled(stream)
    with files[0].open("rb") as stream:
        assert digests._is_settled(stream)


def test_a_user_without_a_home(files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as where neither HOME nor passwd has one
    monkeypatch.chdir(tmp_path)
    assert hashed(files) == real(files)
    assert not (tmp_path / "~").exists()


def test_what_was_half_read_is_not_noted(files: list[Path], tmp_path: Path) -> None:
    large = tmp_path / "large.bin"
    large.write_bytes(bytes(2**28))
    interrupted = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(large), *map(str, files)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert interrupted.stdout == "interrupted\n", interrupted.stderr
    assert hashed([large, *files]) == real([large, *files])


INTERRUPTED = """
import os, signal, sys
from pathlib import Path
from minitron.errors import DataError
from minitron.runtime import digests

digests.REMEMBERED_FROM_BYTES, digests._SETTLED_AFTER_S = 1, -1
digests._BLOCK_BYTES = 2**12  # slow
digest, kills = digests.digest_of, iter([lambda: os.kill(os.getpid(), signal.SIGINT)])

def interrupting(stream, on_block):
    next(kills, lambda: None)()  # as the first file, the large one, begins to be read
    return digest(stream, on_block)

digests.digest_of = interrupting
try:
    digests.sha256_of([Path(name) for name in sys.argv[1:]], unreadable=DataError)
except KeyboardInterrupt:
    print("interrupted")
"""
