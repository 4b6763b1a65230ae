"""Real text that is on every machine: READMEs and sources of the installed packages.

Prose is the README inside each ``*.dist-info/METADATA`` and the ``.md`` and ``.rst`` files that are
not licences; code is every ``.py`` file, docstrings included. Left out: test folders, generated
protobuf modules, files outside the size limits, files that are not UTF-8, code with a very long
line (data tables), and exact duplicates.

Order: each kind by the SHA-256 of its path relative to site-packages, so that any prefix is a fair
sample over all packages whatever their names and sizes. The two kinds are interleaved by bytes:
the next document is prose while prose makes up less than ``PROSE_SHARE`` of what was given out,
until one kind is used up.
"""

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from minitron.data.documents import Document, make_document

PROSE_SHARE = 1 / 3
MIN_FILE_BYTES = 256
MAX_FILE_BYTES = 128 * 1024
MAX_LINE_CHARS = 1000
_SKIPPED_FOLDERS = frozenset({"__pycache__", "licenses", "test", "testing", "tests"})
_NOT_PROSE = ("AUTHORS", "COPYING", "LICENSE", "LICENCE", "NOTICE")


def site_packages() -> list[Path]:
    """Return the site-packages folders of the running environment, pure Python first."""
    found = sysconfig.get_paths()
    return list(dict.fromkeys(Path(found[name]) for name in ("purelib", "platlib")))


def iter_local_text(roots: list[Path]) -> Iterator[Document]:
    """Yield prose and code documents in the order that the module's docstring describes."""
    prose_files: list[tuple[bytes, str, Path]] = []
    code_files: list[tuple[bytes, str, Path]] = []
    for root in roots:
        for relative, path in _walk(root, root):
            rank = hashlib.sha256(os.fsencode(relative)).digest()
            files = code_files if path.suffix == ".py" else prose_files
            files.append((rank, relative, path))
    prose = _read_all(sorted(prose_files))
    code = _read_all(sorted(code_files))
    yield from _interleave(prose, code)


def _walk(folder: Path, root: Path) -> Iterator[tuple[str, Path]]:
    """Yield (path relative to root, path) of the files worth reading; the order does not matter."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                if entry.name not in _SKIPPED_FOLDERS and not entry.name.startswith("."):
                    yield from _walk(Path(entry.path), root)
            elif (
                _is_wanted(entry.name) and entry.is_file() and MIN_FILE_BYTES <= entry.stat().st_size <= MAX_FILE_BYTES
            ):
                path = Path(entry.path)
                yield path.relative_to(root).as_posix(), path


def _is_wanted(name: str) -> bool:
    if name.endswith(".py"):
        return not name.endswith(("_pb2.py", "_pb2_grpc.py"))
    if name.endswith((".md", ".rst")):
        return not any(word in name.upper() for word in _NOT_PROSE)
    return name == "METADATA"


def _read_all(files: list[tuple[bytes, str, Path]]) -> Iterator[Document]:
    seen: set[bytes] = set()
    for _, relative, path in files:
        text = _read(path)
        if text is None:
            continue
        document = make_document(relative, text)
        if document.sha256 not in seen:
            seen.add(document.sha256)
            yield document


def _read(path: Path) -> str | None:
    """Read one file; None when it is not text that one would want to learn from."""
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return None
    if path.name == "METADATA":
        text = text.replace("\r\n", "\n").partition("\n\n")[2]  # the README follows the header
    elif path.suffix == ".py" and max(map(len, text.split("\n"))) > MAX_LINE_CHARS:
        return None
    return text if len(text.strip()) >= MIN_FILE_BYTES else None


def _interleave(prose: Iterator[Document], code: Iterator[Document]) -> Iterator[Document]:
    prose_bytes = total_bytes = 0
    while True:
        want_prose = prose_bytes <= PROSE_SHARE * total_bytes
        document = next(prose if want_prose else code, None)
        if document is None:
            break
        prose_bytes += document.num_bytes if want_prose else 0
        total_bytes += document.num_bytes
        yield document
    yield from prose
    yield from code
