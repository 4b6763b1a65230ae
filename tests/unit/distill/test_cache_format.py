"""Bytes on disk: against a record worked out by hand, and everything that must be refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from minitron.config.teacher_logits import CacheMethod, TeacherLogitsConfig
from minitron.distill.cache_format import (
    INFO_FILE,
    CacheIdentity,
    Codec,
    Entries,
    LogitCache,
    write_identity,
    write_shard,
)
from minitron.errors import ArtefactError, ConfigError

S = 5
METHODS = list(CacheMethod)
IDENTITY = CacheIdentity(
    dataset="d" * 64,
    seq_length=S,
    vocab_size=151_936,
    teacher="t" * 64,
    dtype="bf16",
    parameters=TeacherLogitsConfig().parameters(),
)


def random_entries(settings: TeacherLogitsConfig, vocab_size: int, seed: int) -> Entries:
    random = np.random.default_rng(seed)
    most = min(settings.max_entries, vocab_size)
    number_S = random.integers(0, most + 1, S)
    number_S[0] = most
    ids = np.concatenate([random.choice(vocab_size, n, replace=False) for n in number_S])
    ids[0] = vocab_size - 1
    weights = random.integers(1, settings.num_draws + 1, len(ids))
    if settings.method is not CacheMethod.sampled:
        weights = random.random(len(ids)).astype(np.float16)
    return Entries(number_S, ids, weights, random.random(S).astype(np.float32))


def test_record_worked_by_hand() -> None:
    """Two tokens of a vocabulary that needs three bytes: 1 and 2 entries."""
    entries = Entries(np.array([1, 2]), np.array([0x012345, 7, 0x0AFFFE]), np.array([50, 20, 30]), np.array([0.0, 1.0]))
    numbers, entropies = bytes([1, 2]), bytes(4) + bytes([0, 0, 0x80, 0x3F])
    ids, weights = bytes([0x45, 0x23, 0x01, 7, 0, 0, 0xFE, 0xFF, 0x0A]), bytes([50, 20, 30])
    codec = Codec(TeacherLogitsConfig(), vocab_size=1_000_000, seq_length=2)
    assert codec.encode(entries) == numbers + entropies + ids + weights
    probabilities = replace(entries, weights=np.array([1.0, 0.5, 0.25]))
    stored = Codec(TeacherLogitsConfig(method=CacheMethod.top_k), 1_000_000, 2).encode(probabilities)
    assert stored == numbers + entropies + ids + bytes([0, 0x3C, 0, 0x38, 0, 0x34])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("vocab_size", [1, 300, 65_536, 65_537, 151_936, 1 << 24, (1 << 24) + 1, 1 << 31])
def test_any_vocabulary_comes_back_within_the_bound(method: CacheMethod, vocab_size: int) -> None:
    for entries_per_token in (3, 40, 300):  # below and above what a byte counts
        settings = TeacherLogitsConfig(method=method, num_draws=entries_per_token, top_k=entries_per_token)
        if vocab_size > 1 << 24 and entries_per_token == 300:
            continue  # slow to draw without replacement
        entries = random_entries(settings, min(vocab_size, 1 << 20), seed=vocab_size % 97)
        entries.ids[0] = vocab_size - 1
        codec = Codec(settings, vocab_size, S)
        record = codec.encode(entries)
        found = codec.decode(record)
        for name in ("number_S", "ids", "weights", "entropy_S"):
            np.testing.assert_array_equal(getattr(found, name), getattr(entries, name))
        full = replace(entries, number_S=np.full(S, min(settings.max_entries, vocab_size)))
        assert len(record) <= S * settings.max_bytes_per_token(vocab_size)
        if entries.number_S.tolist() == full.number_S.tolist():
            assert len(record) == S * settings.max_bytes_per_token(vocab_size)


@pytest.mark.parametrize("method", METHODS)
def test_defaults_take_at_most_300_bytes_a_token(method: CacheMethod) -> None:
    settings = TeacherLogitsConfig(method=method)
    assert settings.max_bytes_per_token(1 << 31) <= 300
    assert settings.max_bytes_per_token(40) < settings.max_bytes_per_token(49_152)  # not more entries than tokens
    assert TeacherLogitsConfig().max_bytes_per_token(49_152) == 4 + 1 + 50 * (2 + 1)


def test_padded_slots() -> None:
    entries = Entries(np.array([1, 0, 2]), np.array([9, 4, 5]), np.array([3, 1, 2]), np.zeros(3))
    ids_SK, weights_SK = entries.padded(3)
    assert ids_SK.tolist() == [[9, -1, -1], [-1, -1, -1], [4, 5, -1]]
    assert weights_SK.tolist() == [[3, 0, 0], [0, 0, 0], [1, 2, 0]]


@pytest.fixture
def records() -> dict[int, bytes]:
    codec = Codec(IDENTITY.settings, IDENTITY.vocab_size, S)
    return {n: codec.encode(random_entries(IDENTITY.settings, IDENTITY.vocab_size, n)) for n in (11, 3, 8, 40, 5)}


@pytest.fixture
def folder(tmp_path: Path, records: dict[int, bytes]) -> Path:
    write_identity(tmp_path, IDENTITY)
    items = list(records.items())
    write_shard(tmp_path / "000000-00000.shard", items[:3])
    write_shard(tmp_path / "000000-00001.shard", items[3:])
    return tmp_path


def test_samples_are_found_over_shards(folder: Path, records: dict[int, bytes]) -> None:
    (folder / "000001-00000.partial").write_bytes(b"what a killed writer leaves")
    cache = LogitCache(folder)
    assert cache.identity == IDENTITY
    assert cache.samples.tolist() == sorted(records)
    assert cache.missing(np.array([3, 4, 5, 41])).tolist() == [4, 41]
    codec = Codec(IDENTITY.settings, IDENTITY.vocab_size, S)
    for sample, record in records.items():
        np.testing.assert_array_equal(cache.read(sample).ids, codec.decode(record).ids)
    assert cache.num_bytes == sum(path.stat().st_size for path in folder.glob("*.shard"))


def test_truncated_anywhere_is_found_when_opened(folder: Path) -> None:
    shard = folder / "000000-00001.shard"
    whole = shard.read_bytes()
    for kept in (0, 7, 31, 40, len(whole) // 2, len(whole) - 1, len(whole) + 1):
        shard.write_bytes((whole + b"x")[:kept])
        with pytest.raises(ArtefactError, match=r"000000-00001.shard .*remove it and run `minitron teacher-logits`"):
            LogitCache(folder)


def test_changed_bytes_are_found(folder: Path) -> None:
    shard = folder / "000000-00000.shard"
    whole = bytearray(shard.read_bytes())
    for place in (2, 50):  # in the magic, in the table
        damaged = whole.copy()
        damaged[place] ^= 1
        shard.write_bytes(damaged)
        with pytest.raises(ArtefactError, match=r"000000-00000.shard.* remove it"):
            LogitCache(folder)
    whole[-1] ^= 1
    shard.write_bytes(whole)
    cache = LogitCache(folder)
    cache.read(3)
    told = r"000000-00000.shard: the record of sample 8 is damaged; remove it"
    with pytest.raises(ArtefactError, match=told):
        cache.read(8)
    with pytest.raises(ArtefactError, match=told):
        cache.check_records(rank=0, world_size=1)
    with pytest.raises(ArtefactError, match=told):
        cache.check_records(rank=0, world_size=2)
    cache.check_records(rank=1, world_size=2)  # has the other shard


@pytest.mark.parametrize(
    ("name", "here"), [("dataset", "e" * 64), ("seq_length", 6), ("vocab_size", 32_000), ("teacher", "u" * 64)]
)
def test_foreign_is_refused_with_both_values(folder: Path, name: str, here: object) -> None:
    cache = LogitCache(folder)
    cache.check(IDENTITY, to_extend=True)
    for to_extend in (True, False):
        with pytest.raises(ArtefactError, match=f"{name} is {getattr(IDENTITY, name)} there and {here} here"):
            cache.check(replace(IDENTITY, **{name: here}), to_extend=to_extend)


def test_only_the_same_method_may_be_added(folder: Path) -> None:
    for change in ({"dtype": "fp32"}, {"parameters": TeacherLogitsConfig(num_draws=20).parameters()}):
        other = replace(IDENTITY, **change)
        LogitCache(folder).check(other, to_extend=False)
        with pytest.raises(ArtefactError, match=f"{next(iter(change))} is "):
            LogitCache(folder).check(other, to_extend=True)


def test_no_cache_and_another_format(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"cache.json does not exist, so .* is no cache; run"):
        LogitCache(tmp_path / "nowhere")
    values = json.loads((folder / INFO_FILE).read_text())
    for damaged in (json.dumps(values | {"format": 2}), json.dumps(values | {"extra": 0}), "{", "[]"):
        (folder / INFO_FILE).write_text(damaged)
        with pytest.raises(ArtefactError, match=rf"cache.json cannot be read .*; remove {folder} and run") as caught:
            LogitCache(folder)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "wrong", [{"num_draws": 0}, {"top_k": 65_536}, {"top_p": 0.0}, {"top_p": 1.1}, {"shard_mb": 0}]
)
def test_settings_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"teacher_logits.{next(iter(wrong))}="):
        TeacherLogitsConfig(**wrong)
