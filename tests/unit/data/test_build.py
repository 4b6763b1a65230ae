import hashlib
import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from transformers import AutoTokenizer, ByT5Tokenizer

from minitron.config.data import DataConfig, DataSource
from minitron.data.build import build_dataset
from minitron.data.sources import source_fingerprint
from minitron.data.summary import Split, load_summary, require_tokens
from minitron.errors import DataError, ModelError, PlatformError
from tests.unit.data.workers import die

from .conftest import EOS, VOCAB_SIZE, Build, make_text, save_tokenizer


def write_corpus(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def read_split(data_dir: Path, split: str) -> list[list[int]]:
    """The documents' ids, by Megatron's own reader."""
    return [ids.tolist() for ids in IndexedDataset(str(data_dir / split), mmap=True)]


def decode_split(data_dir: Path, split: str, tokenizer_dir: Path) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    return [tokenizer.decode(ids) for ids in read_split(data_dir, split)]


def by_hash(texts: list[str], fraction: float) -> list[str]:
    """The held-out texts, by the definition of the split."""
    digests = {text: hashlib.sha256(text.encode()).digest()[:8] for text in texts}
    return [t for t in texts if int.from_bytes(digests[t], "big") / 2**64 < fraction]


def test_ids_decode_to_text_and_eos(tmp_path: Path, build: Build, tokenizer_dir: Path) -> None:
    texts = [make_text(n, 40) for n in range(30)] + [f"a {EOS} b" * 20]
    path = write_corpus(tmp_path / "a.jsonl", texts)
    summary = build(tmp_path / "out", path)
    heldout = by_hash(texts, 0.3)
    train = [text for text in texts if text not in heldout]
    assert 0 < len(heldout) < len(texts)
    for split, expected in (("train", train), ("heldout", heldout)):
        found = decode_split(tmp_path / "out", split, tokenizer_dir)
        assert found == [text + EOS for text in expected]
        ids = read_split(tmp_path / "out", split)
        size = summary.split(Split(split))
        assert size.num_documents == len(expected)
        assert size.num_tokens == sum(map(len, ids))
        assert size.num_bytes == sum(len(text.encode()) for text in expected)
        # Also the marker written out in a document is text: EOS ends documents and nothing else.
        assert all(document.index(summary.eos_id) == len(document) - 1 for document in ids)
    assert summary == load_summary(tmp_path / "out")
    assert summary.dtype == "uint16"
    cfg = DataConfig(source=DataSource.files, paths=[str(path)])
    assert summary.source_fingerprint == source_fingerprint(cfg)


def test_special_tokens_are_parsed_on_request(tmp_path: Path, build: Build) -> None:
    path = write_corpus(tmp_path / "a.jsonl", [f"{n} a{EOS}b " * 8 for n in range(20)])
    plain = build(tmp_path / "plain", path)
    parsed = build(tmp_path / "parsed", path, parse_special_tokens=True)
    assert all(ids.count(0) == 1 for ids in read_split(tmp_path / "plain", "train"))
    assert all(ids.count(0) == 9 for ids in read_split(tmp_path / "parsed", "train"))
    assert plain.tokenizer_sha256 != parsed.tokenizer_sha256


def test_split_is_stable_under_order_and_additions(tmp_path: Path, build: Build, tokenizer_dir: Path) -> None:
    texts = [make_text(n, 30) for n in range(40)]
    build(tmp_path / "a", write_corpus(tmp_path / "a.jsonl", texts))
    more = [make_text(n, 30) for n in range(100, 120)] + texts[::-1]
    build(tmp_path / "b", write_corpus(tmp_path / "b.jsonl", more))
    build(tmp_path / "c", tmp_path / "a.jsonl", heldout_fraction=0.6)
    a, b, c = (set(decode_split(tmp_path / n, "heldout", tokenizer_dir)) for n in "abc")
    all_a = {text + EOS for text in texts}
    assert a == b & all_a
    assert a < c  # a larger share keeps what a smaller one held out


def test_workers_and_progress_do_not_change_the_files(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = children()
    monkeypatch.setattr("minitron.data.tokenize.BATCH_BYTES", 2000)
    path = write_corpus(tmp_path / "a.jsonl", [make_text(n, 60) for n in range(80)])
    seen: dict[int, list[tuple[int, int]]] = {1: [], 2: []}
    for workers, calls in seen.items():
        cfg = DataConfig(source=DataSource.files, paths=[str(path)], seq_length=16, num_workers=workers)
        build_dataset(
            cfg,
            tokenizer_dir=tokenizer_dir,
            vocab_size=VOCAB_SIZE,
            out_dir=tmp_path / str(workers),
            on_progress=lambda *done, calls=calls: calls.append(done),
        )
    assert children() == before, "tokenizing processes outlive the build"
    for name in ("train.bin", "train.idx", "heldout.bin", "heldout.idx", "data.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name
    assert seen[1] == seen[2]
    assert len(seen[1]) > 8
    summary = load_summary(tmp_path / "1")
    assert seen[1][-1] == (80, summary.train.num_bytes + summary.heldout.num_bytes)


def test_large_vocabulary_is_stored_as_int32(tmp_path: Path, tokenizer_dir: Path) -> None:
    path = write_corpus(tmp_path / "a.jsonl", [make_text(n, 30) for n in range(80)])
    cfg = DataConfig(source=DataSource.files, paths=[str(path)], seq_length=16, num_workers=1)
    out = tmp_path / "out"
    summary = build_dataset(cfg, tokenizer_dir=tokenizer_dir, vocab_size=128256, out_dir=out)
    assert summary.dtype == "int32"
    stream = np.fromfile(out / "train.bin", dtype=np.int32)
    assert stream.tolist() == [i for ids in read_split(out, "train") for i in ids]


def test_tokenizer_errors(tmp_path: Path, tokenizer_dir: Path) -> None:
    path = write_corpus(tmp_path / "a.jsonl", [make_text(n, 30) for n in range(40)])
    (tmp_path / "empty").mkdir()
    no_eos = save_tokenizer(tmp_path / "no_eos")
    ByT5Tokenizer().save_pretrained(tmp_path / "slow")
    ids = len(AutoTokenizer.from_pretrained(tokenizer_dir))
    too_large = rf"largest id {ids - 1} needs a vocabulary of {ids} but .* vocab_size is {ids - 1}:"
    for folder, vocab_size, message in (
        (tokenizer_dir, ids - 1, too_large),
        (no_eos, VOCAB_SIZE, r"no_eos: the tokenizer has no end-of-sequence token .* set eos_token"),
        (tmp_path / "slow", VOCAB_SIZE, r"slow: ByT5Tokenizer has no fast version: convert it"),
        (tmp_path / "no", VOCAB_SIZE, r"/no: no such folder"),
        (tmp_path / "empty", VOCAB_SIZE, r"empty: no tokenizer that transformers can load"),
    ):
        cfg = DataConfig(source=DataSource.files, paths=[str(path)])
        with pytest.raises(ModelError, match=message) as caught:
            build_dataset(cfg, tokenizer_dir=folder, vocab_size=vocab_size, out_dir=tmp_path / "out")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def children() -> set[int | None]:
    """Child processes of the test run; the worker pool of other tests may be among them."""
    return {child.pid for child in multiprocessing.active_children()}


def test_a_process_that_dies_is_said(tmp_path: Path, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    before = children()
    monkeypatch.setattr("minitron.data.tokenize._encode_in_worker", die)
    path = write_corpus(tmp_path / "a.jsonl", [make_text(n, 30) for n in range(40)])
    with pytest.raises(PlatformError, match=r"one of the 2 tokenizing processes died .*: lower data.num_workers"):
        build(tmp_path / "out", path, num_workers=2)
    assert children() == before, "tokenizing processes outlive the build"
    assert not (tmp_path / "out" / "data.json").exists()


def test_too_few_tokens(tmp_path: Path, build: Build) -> None:
    path = write_corpus(tmp_path / "a.jsonl", [make_text(n, 30) for n in range(40)])
    summary = build(tmp_path / "out", path)
    tokens = summary.train.num_tokens
    assert summary.heldout.num_tokens < tokens
    with pytest.raises(
        DataError,
        match=rf"split 'heldout' has \d+ tokens but 1 sequences x {tokens - 1} tokens \+ 1 = {tokens} "
        r"are needed: give more text, raise heldout_fraction",
    ):
        build(tmp_path / "out", path, seq_length=tokens - 1)
    assert build(tmp_path / "out", path) == summary
    with pytest.raises(DataError, match=r"data.json: not found, so .*: run `minitron data`"):
        load_summary(tmp_path)
    fits = (tokens - 1) // 16
    out = tmp_path / "out"
    assert require_tokens(out, Split.train, num_sequences=fits, seq_length=16) == fits
    with pytest.raises(DataError, match=rf"{fits + 1} sequences x 16 tokens \+ 1 = "):
        require_tokens(out, Split.train, num_sequences=fits + 1, seq_length=16)


def test_broken_summary(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text('{"train": {}}')
    with pytest.raises(DataError, match=r"data.json: not readable .* remove .* and run `minitron data`"):
        load_summary(tmp_path)
