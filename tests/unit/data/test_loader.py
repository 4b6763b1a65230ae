"""The loaders against the ``.bin`` read by NumPy, and over layouts."""

import queue
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

from minitron.data.batch import NO_SAMPLE, Batch
from minitron.data.loader import FixedBatches, TrainBatches, calibration_batches, heldout_batches
from minitron.data.order import samples_of_run
from minitron.data.summary import load_summary
from minitron.errors import ConfigError, DataError, LayoutError

S = 16
GLOBAL_BATCH = 12
LAYOUTS = [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1)]  # (dp_size, micro_batch_size)


def numpy_documents(data_dir: Path, split: str) -> list[np.ndarray]:
    """Documents cut at EOS from the raw file: no Megatron, no index."""
    stream = np.fromfile(data_dir / f"{split}.bin", dtype=np.uint16).astype(np.int64)
    ends = np.flatnonzero(stream == load_summary(data_dir).eos_id) + 1
    return np.split(stream, ends[:-1])


def numpy_random(*entropy: int) -> np.random.RandomState:
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence(entropy)))


def numpy_sequences(data_dir: Path) -> np.ndarray:
    """The training sequences of S + 1 ids by sample index: documents in one fixed order, cut at S."""
    documents = numpy_documents(data_dir, "train")
    order = numpy_random(20240719).permutation(len(documents))
    assert not np.array_equal(order, np.arange(len(documents)))
    stream = np.concatenate([documents[n] for n in order])
    return np.stack([stream[n * S : n * S + S + 1] for n in range((len(stream) - 1) // S)])


def numpy_epoch(data_dir: Path, seed: int, epoch: int) -> np.ndarray:
    """Sequences of one training epoch, by the definition of the order."""
    sequences = numpy_sequences(data_dir)
    return sequences[numpy_random(seed, epoch).permutation(len(sequences))]


def train(data_dir: Path, **changes: int) -> TrainBatches:
    values = {
        "seq_length": S,
        "micro_batch_size": 1,
        "global_batch_size": GLOBAL_BATCH,
        "dp_rank": 0,
        "dp_size": 1,
        "seed": 3,
        "num_steps": 1000,
    }
    return TrainBatches(data_dir, **(values | changes))


def rows(batches: Iterable[Batch]) -> np.ndarray:
    """The sequences of some micro-batches as S + 1 ids each, after checks on every field."""
    found = []
    for batch in batches:
        assert batch.tokens_BS.dtype == batch.labels_BS.dtype == torch.int64
        assert torch.equal(batch.tokens_BS[:, 1:], batch.labels_BS[:, :-1])
        assert torch.equal(batch.position_ids_BS, torch.arange(S).expand_as(batch.tokens_BS))
        real = batch.loss_mask_BS.sum(dim=1)
        assert torch.equal(batch.sample_index_B == NO_SAMPLE, real == 0)
        assert torch.equal(real, (real > 0) * float(S))
        joined = torch.cat([batch.tokens_BS, batch.labels_BS[:, -1:]], dim=1)
        found.append(joined[real > 0].numpy())
    return np.concatenate(found)


def over_ranks(per_rank: list[list[Batch]]) -> np.ndarray:
    """All ranks' sequences in the order of the global batch."""
    return np.concatenate([rows(ranks) for ranks in zip(*per_rank, strict=True)])


def test_train_equals_numpy_over_several_epochs(data_dir: Path) -> None:
    epochs = [numpy_epoch(data_dir, 3, epoch) for epoch in range(3)]
    loader = train(data_dir)
    assert loader.samples_per_epoch == len(epochs[0]) > 50
    expected = np.concatenate(epochs)
    num_steps = len(expected) // GLOBAL_BATCH
    assert len(epochs[0]) % GLOBAL_BATCH, "a batch should straddle two epochs"
    found = np.concatenate([rows(loader.microbatches(step)) for step in range(num_steps)])
    np.testing.assert_array_equal(found, expected[: num_steps * GLOBAL_BATCH])
    assert not np.array_equal(epochs[0], epochs[1])


def test_the_next_step_is_read_before_it_is_asked_for(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began: queue.Queue[int] = queue.Queue()
    read = TrainBatches._read
    monkeypatch.setattr(TrainBatches, "_read", lambda loader, step: (began.put(step), read(loader, step))[1])
    loader = train(data_dir, num_steps=7)
    loader.microbatches(4)
    assert [began.get(timeout=20) for _ in range(2)] == [4, 5]
    loader.microbatches(5)
    loader.microbatches(6)  # the last
    loader.microbatches(0)  # nobody expected it
    assert [began.get(timeout=20) for _ in range(3)] == [6, 0, 1]
    assert began.empty()


@pytest.mark.parametrize(("dp_size", "micro_batch_size"), LAYOUTS)
def test_train_does_not_depend_on_layout_or_history(data_dir: Path, dp_size: int, micro_batch_size: int) -> None:
    reference = train(data_dir)
    straddling, count = divmod(reference.samples_per_epoch, GLOBAL_BATCH)
    assert count > 0
    for step in (3 * straddling, 0, 7, straddling):  # in any order, as after a resume
        expected = rows(reference.microbatches(step))
        per_rank = [
            train(
                data_dir,
                dp_rank=rank,
                dp_size=dp_size,
                micro_batch_size=micro_batch_size,
                num_steps=step + 1,
            ).microbatches(step)
            for rank in range(dp_size)
        ]
        assert all(len(batches) == GLOBAL_BATCH // dp_size // micro_batch_size for batches in per_rank)
        np.testing.assert_array_equal(over_ranks(per_rank), expected)


def test_sample_index_names_the_content_in_every_run(data_dir: Path) -> None:
    """The same sequence behind the same index, whatever seed, epoch, layout or use of the split."""
    sequences = numpy_sequences(data_dir)
    last = train(data_dir).samples_per_epoch // GLOBAL_BATCH  # straddles two epochs
    batches = [
        batch for seed in (3, 4) for step in (0, last) for batch in train(data_dir, seed=seed).microbatches(step)
    ]
    batches += train(data_dir, dp_rank=1, dp_size=2, micro_batch_size=3).microbatches(2)
    batches += list(calibration(data_dir, num_samples=9, micro_batch_size=2))
    seen = [int(index) for batch in batches for index in batch.sample_index_B if index != NO_SAMPLE]
    np.testing.assert_array_equal(rows(batches), sequences[seen])
    assert len(set(seen)) > GLOBAL_BATCH


@pytest.mark.parametrize("num_steps", [1, 3, 1000])
def test_samples_of_a_run_are_those_it_reads(data_dir: Path, num_steps: int) -> None:
    loader = train(data_dir, num_steps=num_steps)
    steps = range(min(num_steps, 2 * loader.samples_per_epoch // GLOBAL_BATCH))
    read = {int(i) for step in steps for batch in loader.microbatches(step) for i in batch.sample_index_B}
    found = samples_of_run(loader.samples_per_epoch, num_positions=num_steps * GLOBAL_BATCH, seed=3)
    assert found.tolist() == sorted(read)
    assert len(found) == min(num_steps * GLOBAL_BATCH, loader.samples_per_epoch)


def test_seed_changes_the_order(data_dir: Path) -> None:
    a, b = (rows(train(data_dir, seed=seed).microbatches(0)) for seed in (3, 4))
    assert not np.array_equal(a, b)


def test_train_writes_nothing_and_needs_no_rank_zero(data_dir: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in data_dir.rglob("*")}
    expected = rows(train(data_dir).microbatches(5))
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        np.testing.assert_array_equal(rows(train(data_dir).microbatches(5)), expected)
    finally:
        torch.distributed.destroy_process_group()
    assert {path: path.stat().st_mtime_ns for path in data_dir.rglob("*")} == before


def heldout(data_dir: Path, **changes: int | None) -> FixedBatches:
    values = {"seq_length": S, "micro_batch_size": 1, "dp_rank": 0, "dp_size": 1}
    return heldout_batches(data_dir, **(values | {"max_tokens": None} | changes))


@pytest.mark.parametrize(("dp_size", "micro_batch_size"), [*LAYOUTS, (3, 2), (5, 7)])
@pytest.mark.parametrize("max_tokens", [None, 11 * S + 3])
def test_heldout_covers_each_sequence_once(
    data_dir: Path, dp_size: int, micro_batch_size: int, max_tokens: int | None
) -> None:
    stream = np.fromfile(data_dir / "heldout.bin", dtype=np.uint16).astype(np.int64)
    count = 11 if max_tokens else (len(stream) - 1) // S
    expected = np.stack([stream[n * S : n * S + S + 1] for n in range(count)])
    per_rank = [
        heldout(
            data_dir,
            dp_rank=rank,
            dp_size=dp_size,
            micro_batch_size=micro_batch_size,
            max_tokens=max_tokens,
        )
        for rank in range(dp_size)
    ]
    np.testing.assert_array_equal(over_ranks([list(batches) for batches in per_rank]), expected)
    for batches in per_rank:
        assert batches.num_sequences == count
        assert batches.num_tokens == count * S
        assert len(batches) == -(-count // (dp_size * micro_batch_size))
        assert all(len(batch.tokens_BS) == micro_batch_size for batch in batches)
    weight = sum(float(b.loss_mask_BS.sum()) for batches in per_rank for b in batches)
    assert weight == count * S


def test_fixed_batches_is_a_sequence(data_dir: Path) -> None:
    batches = heldout(data_dir, micro_batch_size=2)
    assert torch.equal(batches[-1].tokens_BS, batches[len(batches) - 1].tokens_BS)
    assert len(batches[1:4]) == 3
    with pytest.raises(IndexError):
        batches[len(batches)]


def calibration(data_dir: Path, **changes: int) -> FixedBatches:
    values = {"num_samples": 10, "seq_length": S, "micro_batch_size": 1, "dp_rank": 0, "dp_size": 1, "seed": 8}
    return calibration_batches(data_dir, **(values | changes))


@pytest.mark.parametrize(("dp_size", "micro_batch_size"), LAYOUTS)
def test_calibration_is_the_start_of_the_seeded_train_order(
    data_dir: Path, dp_size: int, micro_batch_size: int
) -> None:
    per_rank = [
        calibration(data_dir, micro_batch_size=micro_batch_size, dp_rank=rank, dp_size=dp_size)
        for rank in range(dp_size)
    ]
    found = over_ranks([list(batches) for batches in per_rank])
    np.testing.assert_array_equal(found, numpy_epoch(data_dir, 8, 0)[:10])


def test_errors(data_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match=r"global_batch_size=12 .* micro_batch_size=5 x data_parallel_size=2 = 10"):
        train(data_dir, micro_batch_size=5, dp_size=2)
    with pytest.raises(DataError, match=r"'train' has \d+ tokens but 9999 sequences x 16 tokens"):
        train(data_dir, global_batch_size=9999)
    with pytest.raises(DataError, match=r"'heldout' has \d+ tokens but 1 sequences x 99999 tokens"):
        heldout(data_dir, seq_length=99999)
    with pytest.raises(ConfigError, match=r"max_tokens=15 is less than one sequence of seq_length=16"):
        heldout(data_dir, max_tokens=15)
    with pytest.raises(DataError, match=r"9999 sequences x 16 tokens"):
        calibration(data_dir, num_samples=9999)
    with pytest.raises(DataError, match=r"data.json: not found, so .* run `minitron data`"):
        train(tmp_path)


def test_damaged_folder_is_found(data_dir: Path, tmp_path: Path) -> None:
    for path in data_dir.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    whole = (tmp_path / "train.bin").read_bytes()
    (tmp_path / "train.bin").write_bytes(whole[:-2])
    with pytest.raises(
        DataError,
        match=rf"train.bin: {len(whole) - 2} bytes but .* of uint16 = {len(whole)} bytes: remove",
    ):
        train(tmp_path)
    (tmp_path / "train.bin").unlink()
    with pytest.raises(DataError, match=r"train.bin: no such file: remove .* and run `minitron data`"):
        train(tmp_path)


@pytest.mark.parametrize("kept", [None, 0, 20, 100, -8])
def test_damaged_index_is_found(data_dir: Path, tmp_path: Path, kept: int | None) -> None:
    for path in data_dir.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    index = tmp_path / "heldout.idx"
    if kept is None:  # whole in size, and nothing but zeros
        index.write_bytes(bytes(index.stat().st_size))
    else:
        index.write_bytes(index.read_bytes()[:kept])
    documents = load_summary(tmp_path).heldout.num_documents
    with pytest.raises(DataError, match=rf"heldout.idx: \d+ bytes, not an index of {documents} documents .*: remove "):
        heldout(tmp_path)
    index.unlink()
    with pytest.raises(DataError, match=r"heldout.idx: no such file: remove .* and run `minitron data`"):
        heldout(tmp_path)
    assert train(tmp_path).microbatches(0)  # the other split is whole
