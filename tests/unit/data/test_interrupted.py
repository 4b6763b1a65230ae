"""A build that is stopped or killed goes on where it was, to the same bytes."""

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from minitron.config.data import DataConfig, DataSource
from minitron.data.build import _tokenize as tokenized
from minitron.data.build import build_dataset
from minitron.data.sources import source_fingerprint
from minitron.data.summary import DatasetSummary
from minitron.errors import DataError, StoppedError

from .conftest import VOCAB_SIZE, make_text

FILES = ("train.bin", "train.idx", "heldout.bin", "heldout.idx", "data.json")
TEXTS = [make_text(n, 20 + n % 40) for n in range(90)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """90 documents in files of every kind."""
    root = tmp_path_factory.mktemp("corpus")
    lines = [json.dumps({"text": text}) + "\n" for text in TEXTS]
    (root / "a.jsonl").write_text("".join(lines[:30]))
    (root / "b.txt").write_text(TEXTS[30])
    with gzip.open(root / "c.jsonl.gz", "wt") as stream:
        stream.writelines(lines[31:50])
    pq.write_table(pa.table({"text": TEXTS[50:88]}), root / "d.parquet")
    (root / "e.txt").write_text(TEXTS[88])
    (root / "f.txt").write_text(TEXTS[89])
    return root


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two to four documents a batch, and a note after each."""
    monkeypatch.setattr("minitron.data.tokenize.BATCH_BYTES", 1000)
    monkeypatch.setattr("minitron.data.build.SAVE_EVERY_BYTES", 1)


Tokenize = Callable[..., DatasetSummary]


@pytest.fixture
def tokenize(corpus: Path, tokenizer_dir: Path) -> Tokenize:
    """``tokenize(out_dir, after_batches, **config fields)``: stopped after so many batches."""

    def run(out_dir: Path, batches: int | None = None, **fields: object) -> DatasetSummary:
        values = {"paths": [str(corpus)], "seq_length": 16, "heldout_fraction": 0.3, "num_workers": 1} | fields
        done: list[int] = []
        return build_dataset(
            DataConfig(source=DataSource.files, **values),
            tokenizer_dir=tokenizer_dir,
            vocab_size=VOCAB_SIZE,
            out_dir=out_dir,
            on_progress=lambda documents, _bytes: done.append(documents),
            should_stop=lambda: batches is not None and len(done) >= batches,
        )

    return run


def content(folder: Path) -> dict[str, bytes]:
    """The files of a finished data folder; there are no others."""
    assert {path.name for path in folder.iterdir()} == set(FILES)
    return {name: (folder / name).read_bytes() for name in FILES}


@pytest.mark.parametrize("fields", [{}, {"num_workers": 2}, {"max_bytes": 12_000}])
def test_stopped_again_and_again(tmp_path: Path, tokenize: Tokenize, fields: dict[str, object]) -> None:
    tokenize(tmp_path / "whole", **fields)
    for _ in range(3):
        with pytest.raises(StoppedError, match=r"documents, saved; the same command goes on from there$"):
            tokenize(tmp_path / "parts", batches=3, **fields)
        assert not (tmp_path / "parts" / "data.json").exists()
    tokenize(tmp_path / "parts", **fields)
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


def test_what_was_read_is_not_read_again(
    tmp_path: Path, tokenize: Tokenize, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenize(tmp_path / "whole")
    parts, copy = tmp_path / "parts", tmp_path / "copy"
    shutil.copytree(corpus, copy)
    with pytest.raises(StoppedError):
        tokenize(parts, batches=15, paths=[str(copy)])
    saved = json.loads((parts / "progress.json").read_text())
    assert saved["position"]["file"] == 3, "the stop was to fall into d.parquet"
    for name in ("a.jsonl", "b.txt", "c.jsonl.gz"):
        (copy / name).write_bytes(b"\xff cannot be read")
    monkeypatch.setattr("minitron.data.build.source_fingerprint", lambda _cfg: source_fingerprint_of(corpus))
    tokenize(parts, paths=[str(copy)])
    assert content(parts) == content(tmp_path / "whole")


def source_fingerprint_of(folder: Path) -> str:
    """Of all files in a folder."""
    return source_fingerprint(DataConfig(source=DataSource.files, paths=[str(folder)]))


def test_a_part_of_a_text_may_come_to_lie_in_other_files(tmp_path: Path, tokenize: Tokenize, corpus: Path) -> None:
    """With ``max_bytes`` the text is known by its documents: an empty file more, or files joined, change nothing."""
    limit = {"max_bytes": 14_000}
    tokenize(tmp_path / "whole", **limit)
    copy = tmp_path / "copy"
    shutil.copytree(corpus, copy)
    with pytest.raises(StoppedError):
        tokenize(tmp_path / "parts", batches=9, paths=[str(copy)], **limit)
    (copy / "0.txt").write_text(" ")
    lines = (copy / "a.jsonl").read_text().splitlines(keepends=True)
    (copy / "a.jsonl").write_text("".join(lines[:7]))
    (copy / "a1.jsonl").write_text("".join(lines[7:]))
    tokenize(tmp_path / "parts", paths=[str(copy)], **limit)
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


def test_stopped_while_its_content_is_hashed(
    tmp_path: Path, tokenize: Tokenize, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenize(tmp_path / "whole")
    monkeypatch.setattr("minitron.data.build._tokenize", lambda *a: (tokenized(*a[:4], lambda: False), None)[1])
    with pytest.raises(StoppedError):
        tokenize(tmp_path / "parts", batches=1)
    tokenize(tmp_path / "parts")
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


def test_what_a_kill_left_beyond_the_last_note_is_given_up(tmp_path: Path, tokenize: Tokenize) -> None:
    tokenize(tmp_path / "whole")
    parts = tmp_path / "parts"
    with pytest.raises(StoppedError):
        tokenize(parts, batches=4)
    for name in ("train.bin", "train.lengths", "heldout.bin"):
        with (parts / name).open("ab") as stream:
            stream.write(b"half of something")
    tokenize(parts)
    assert content(parts) == content(tmp_path / "whole")


def test_what_other_text_has_left_is_not_taken_for_one_s_own(
    tmp_path: Path, tokenize: Tokenize, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A, then B killed before its first note, then A again."""
    tokenize(tmp_path / "whole")
    parts = tmp_path / "parts"
    with pytest.raises(StoppedError):
        tokenize(parts, batches=4)
    with monkeypatch.context() as patch:
        patch.setattr("minitron.data.build.SAVE_EVERY_BYTES", 8000)
        patch.setattr("minitron.data.growing.write_json", killed)
        with pytest.raises(OSError, match="killed"):
            tokenize(parts, heldout_fraction=0.5)
    tokenize(parts)
    assert content(parts) == content(tmp_path / "whole")


def killed(_path: Path, _values: object) -> None:
    """In place of a note."""
    raise OSError("killed")


def test_an_empty_split_is_an_error_each_time(tmp_path: Path, tokenize: Tokenize) -> None:
    for _ in range(2):
        with pytest.raises(DataError, match="split 'heldout' has 0 tokens"):
            tokenize(tmp_path / "parts", heldout_fraction=1e-9)
    tokenize(tmp_path / "parts")
    tokenize(tmp_path / "whole")
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


def test_text_that_has_changed_since_it_was_planned(tmp_path: Path, corpus: Path, tokenizer_dir: Path) -> None:
    cfg = DataConfig(source=DataSource.files, paths=[str(corpus)])
    with pytest.raises(DataError, match="the text has changed since this job was submitted or started"):
        build_dataset(
            cfg, tokenizer_dir=tokenizer_dir, vocab_size=VOCAB_SIZE, out_dir=tmp_path / "out", planned_text="other"
        )
    assert not (tmp_path / "out").exists()


def test_stopped_while_it_reads_again_what_it_had(tmp_path: Path, tokenize: Tokenize) -> None:
    parts = tmp_path / "parts"
    with pytest.raises(StoppedError):
        tokenize(parts, batches=4, max_bytes=14_000)
    saved = (parts / "progress.json").read_bytes()
    with pytest.raises(StoppedError):
        tokenize(parts, batches=0, max_bytes=14_000)
    assert (parts / "progress.json").read_bytes() == saved


@pytest.mark.parametrize("damage", ["short", "missing", "other text"])
def test_what_cannot_be_gone_on_with_starts_anew(tmp_path: Path, tokenize: Tokenize, damage: str) -> None:
    tokenize(tmp_path / "whole")
    parts = tmp_path / "parts"
    with pytest.raises(StoppedError):
        tokenize(parts, batches=4, **({"heldout_fraction": 0.5} if damage == "other text" else {}))
    if damage == "short":
        with (parts / "train.bin").open("r+b") as stream:
            stream.truncate(10)
    elif damage == "missing":
        (parts / "heldout.lengths").unlink()
    tokenize(parts)
    assert content(parts) == content(tmp_path / "whole")


def test_a_finished_folder_is_left_as_it_is(tmp_path: Path, tokenize: Tokenize) -> None:
    """Among them one whose text proved too short: it is there for shorter sequences."""
    folder = tmp_path / "folder"
    with pytest.raises(DataError, match="1 sequences x 100000 tokens"):
        tokenize(folder, seq_length=100_000)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    tokenize(folder)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    (folder / "train.idx").write_bytes(b"")
    tokenize(folder)
    tokenize(tmp_path / "whole")
    assert content(folder) == content(tmp_path / "whole")


def test_files_are_those_of_megatrons_builder(tmp_path: Path, tokenize: Tokenize) -> None:
    tokenize(tmp_path / "whole")
    for split in ("train", "heldout"):
        theirs = IndexedDatasetBuilder(str(tmp_path / f"{split}.bin"), dtype=np.uint16)
        for ids in IndexedDataset(str(tmp_path / "whole" / split), mmap=True):
            theirs.add_document(ids, [len(ids)])
        theirs.finalize(str(tmp_path / f"{split}.idx"))
        for suffix in ("bin", "idx"):
            name = f"{split}.{suffix}"
            assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / name).read_bytes(), name
