import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minitron.config.data import DataConfig, DataSource
from minitron.data import local_text, sources
from minitron.data.local_text import iter_local_text
from minitron.data.sources import iter_documents, source_fingerprint
from minitron.errors import DataError

TEXTS = ["one\r\ntwo", "caf\u00e9 \U0001f600", "three"]


def files(*paths: Path, **fields: object) -> DataConfig:
    return DataConfig(source=DataSource.files, paths=[str(p) for p in paths], **fields)


def texts(cfg: DataConfig) -> list[str]:
    return [document.text for document in iter_documents(cfg)]


def write_jsonl(path: Path, records: list[object]) -> Path:
    content = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(content) if path.name.endswith(".gz") else content)
    return path


def write_all_kinds(root: Path) -> dict[str, Path]:
    root.mkdir(exist_ok=True)
    records = [{"text": text, "n": 1} for text in TEXTS] + [{"text": " \n"}]
    txt = root / "a.txt"
    txt.write_bytes(TEXTS[0].encode())
    parquet = root / "d.parquet"
    pq.write_table(pa.table({"text": [*TEXTS, None], "n": [1, 2, 3, 4]}), parquet)
    return {
        "txt": txt,
        "jsonl": write_jsonl(root / "b.jsonl", records),
        "gz": write_jsonl(root / "c.jsonl.gz", records),
        "parquet": parquet,
    }


def test_every_kind_gives_its_texts(tmp_path: Path) -> None:
    kinds = write_all_kinds(tmp_path)
    assert texts(files(kinds["txt"])) == TEXTS[:1]
    for kind in ("jsonl", "gz", "parquet"):
        assert texts(files(kinds[kind])) == TEXTS, kind  # the empty document is skipped
    assert [d.id for d in iter_documents(files(kinds["jsonl"]))][1] == f"{kinds['jsonl']}:2"
    assert [d.num_bytes for d in iter_documents(files(kinds["gz"]))] == [8, 10, 5]


def test_folder_is_recursive_and_sorted_and_ignores_other_files(tmp_path: Path) -> None:
    write_all_kinds(tmp_path)
    (tmp_path / "readme.md").write_text("not read")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "z.txt").write_text("nested")
    assert texts(files(tmp_path)) == [TEXTS[0], "nested", *TEXTS, *TEXTS, *TEXTS]


def test_text_key(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"content": "x", "text": "y"}])
    assert texts(files(path, text_key="content")) == ["x"]


def test_max_bytes_stops_with_the_document_that_reaches_it(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in ("1234", "56", "789")])
    assert texts(files(path, max_bytes=4)) == ["1234"]
    assert texts(files(path, max_bytes=5)) == ["1234", "56"]
    assert texts(files(path, max_bytes=100)) == ["1234", "56", "789"]


def test_long_txt_is_cut_on_blank_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "SPLIT_ABOVE_BYTES", 20)
    monkeypatch.setattr(sources, "PART_CHARS", 8)
    monkeypatch.setattr(sources, "MAX_PART_CHARS", 24)
    content = "abc\n\ndef\nghi\n\n" + "no blank line\r\n" * 3 + "end"
    path = tmp_path / "a.txt"
    path.write_bytes(content.encode())
    parts = texts(files(path))
    assert parts == ["abc\n\ndef\nghi\n\n", "no blank line\r\n" * 2, "no blank line\r\nend"]
    assert [d.id for d in iter_documents(files(path))] == [f"{path}:{n}" for n in (1, 6, 8)]
    path.write_bytes(content[:20].encode())
    assert texts(files(path)) == [content[:20]]  # short enough to be one document


def test_fingerprint_follows_content_only(tmp_path: Path) -> None:
    first, second = write_all_kinds(tmp_path / "x"), write_all_kinds(tmp_path / "y")
    for kind in first:
        assert source_fingerprint(files(first[kind])) == source_fingerprint(files(second[kind]))
    a, b = first["jsonl"], first["gz"]
    assert source_fingerprint(files(a, b)) != source_fingerprint(files(b, a))
    assert source_fingerprint(files(a)) != source_fingerprint(files(a, text_key="n"))
    limited = files(a, max_bytes=9)
    before = source_fingerprint(limited)
    write_jsonl(a, [{"text": text} for text in [*TEXTS[:2], "changed"]])
    assert source_fingerprint(limited) == before  # what lies beyond the limit does not count
    assert source_fingerprint(files(a)) != source_fingerprint(files(second["jsonl"]))


def broken_gzip(path: Path) -> Path:
    lines = [{"text": str(n) * 50} for n in range(2000)]
    write_jsonl(path, lines)
    path.write_bytes(path.read_bytes()[:-200])
    return path


def errors(root: Path) -> dict[str, tuple[DataConfig, str]]:
    def put(name: str, content: bytes) -> Path:
        (root / name).write_bytes(content)
        return root / name

    (root / "empty").mkdir()
    parquet = root / "t.parquet"
    pq.write_table(pa.table({"content": ["x"], "n": [1]}), parquet)
    ok = b'{"text": "fine"}\n'
    return {
        "missing": (files(root / "no"), r"/no: no such file or folder: correct data.paths"),
        "suffix": (files(put("a.csv", b"x")), r"a.csv: unknown kind of file .*'.csv'.*.jsonl.gz or"),
        "folder": (files(root / "empty"), r"empty: the folder holds no .txt, .jsonl, .*correct"),
        "json": (files(put("a.jsonl", ok + b"{oops\n")), r"a.jsonl:2: not a line of JSON .*mend"),
        "list": (files(put("b.jsonl", b"[1]\n")), r"b.jsonl:1: a JSON list, not an object"),
        "key": (
            files(put("c.jsonl", ok + b'{"body": 1, "id": 2}\n')),
            r"c.jsonl:2: no key 'text'; the keys are body, id: set data.text_key",
        ),
        "type": (files(put("d.jsonl", b'{"text": 3}\n')), r"d.jsonl:1: 'text' holds a int, not text"),
        "surrogate": (
            files(put("e.jsonl", b'{"text": "ab\\ud800"}\n')),
            r"e.jsonl:1: the text holds a lone surrogate at character 2",
        ),
        "gzip": (files(put("f.jsonl.gz", b"plain")), r"f.jsonl.gz: broken gzip data after line 0"),
        "cut gzip": (files(broken_gzip(root / "g.jsonl.gz")), r"g.jsonl.gz: broken gzip data after"),
        "column": (files(parquet), r"t.parquet: no key 'text'; the keys are content, n: set data"),
        "number": (files(parquet, text_key="n"), r"t.parquet:0: 'n' holds a int, not text"),
        "parquet": (files(put("h.parquet", b"xxxx")), r"h.parquet: not a readable parquet file"),
        "latin1": (files(put("i.txt", b"caf\xe9 au lait")), r"i.txt: not UTF-8 .*iconv"),
        "nothing": (files(put("j.txt", b" \n")), r"j.txt: no document with any text: check"),
    }


def test_every_error_says_where_and_what_to_change(tmp_path: Path) -> None:
    for name, (cfg, message) in errors(tmp_path).items():
        with pytest.raises(DataError, match=message) as caught:
            list(iter_documents(cfg))
        assert "\n" not in str(caught.value), name
        assert str(tmp_path) in str(caught.value), name


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("text")

    def refuse(_path: Path) -> bytes:  # root may read whatever the mode says
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(DataError, match=r"a.txt: cannot be read \(permission denied\): change its mode"):
        texts(files(path))


def make_site_packages(root: Path, *, prose: int, code: int) -> None:
    for n in range(prose):
        readme = f"# package {n}\n" + "plain English words " * 30
        folder = root / f"p{n}-1.0.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: p{n}\n\n{readme}")
    for n in range(code):
        folder = root / f"p{n % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"m{n}.py").write_text(f'"""Module {n}."""\n' + "x = 1  # comment\n" * 36)


def test_local_text_skips_and_interleaves(tmp_path: Path) -> None:
    make_site_packages(tmp_path, prose=6, code=40)
    junk = {
        "p0/tests/test_a.py": "assert True\n" * 99,
        "p0/a_pb2.py": "descriptor = 1\n" * 99,
        "p0/table.py": "x = [" + "1, " * 999 + "]",
        "p0/big.py": "x = 1\n" * 30000,
        "p0/tiny.py": "x = 1",
        "p0/LICENSE.md": "permission is hereby granted " * 50,
        "p0/copy.py": (tmp_path / "p0" / "m0.py").read_text(),  # a duplicate
    }
    for name, content in junk.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    (tmp_path / "p0" / "latin.py").write_bytes(b"# caf\xe9\n" * 99)

    documents = list(iter_local_text([tmp_path]))
    assert len(documents) == 46
    assert len({d.sha256 for d in documents}) == 46
    prose = [d.id.endswith("METADATA") for d in documents]
    assert sum(prose) == 6
    assert all(d.text.startswith("# package") for d in documents if d.id.endswith("METADATA"))
    sizes = [d.num_bytes for d in documents]
    mixed = prose.index(True) + max(n for n, is_prose in enumerate(prose) if is_prose)
    for n in range(3, mixed):  # while both last, prose is a third of the bytes, to one document
        share = sum(s for s, p in zip(sizes[:n], prose, strict=False) if p)
        assert abs(share - sum(sizes[:n]) / 3) <= max(sizes)
    (tmp_path / "p1" / "extra.py").write_text("y = 2  # another\n" * 36)
    ids = [d.id for d in iter_local_text([tmp_path]) if d.id.endswith(".py")]
    ids.remove("p1/extra.py")
    assert ids == [d.id for d in documents if d.id.endswith(".py")]  # a new file moves no other


def test_local_text_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(folder.is_dir() for folder in local_text.site_packages())
    make_site_packages(tmp_path, prose=2, code=5)
    monkeypatch.setattr(sources, "site_packages", lambda: [tmp_path])
    cfg = DataConfig()
    assert len(texts(cfg)) == 7
    before = source_fingerprint(cfg)
    assert before == source_fingerprint(cfg)
    assert before != source_fingerprint(DataConfig(max_bytes=1000))
    (tmp_path / "p0" / "m0.py").write_text("changed = True\n" * 40)
    assert source_fingerprint(cfg) != before
    monkeypatch.setattr(sources, "site_packages", lambda: [tmp_path / "p9"])
    (tmp_path / "p9").mkdir()
    with pytest.raises(DataError, match=r"p9: no document with any text"):
        texts(cfg)
