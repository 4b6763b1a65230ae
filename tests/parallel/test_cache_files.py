"""Files of a cache: writing is asked to stop and goes on from what is there; a changed byte is told before training."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from minitron.config.parallel import ParallelConfig
from minitron.distill.cache_format import LogitCache
from tests.helpers.pool import WorkerPool
from tests.parallel.cached_workers import refusal, write_asked_to_stop, write_cache
from tests.parallel.jobs import make_job, with_settings
from tests.parallel.reference import layout


@pytest.mark.parametrize("parallel", [layout(dp=2), layout(pp=2)], ids=["dp2", "pp2"])
def test_asked_to_stop_it_keeps_its_shards_and_goes_on(
    pool: WorkerPool, teacher: Path, student: Path, tmp_path: Path, parallel: ParallelConfig
) -> None:
    """One rank is asked, and all stop after the second of three schedules of 8 sequences: the answer is one late."""
    job = make_job(tmp_path, teacher, student)
    pool.run(write_cache, 1, job, layout(), tmp_path / "unbroken")
    unbroken = LogitCache(tmp_path / "unbroken")
    folder, small = tmp_path / "cache", with_settings(job, logits={"micro_batch_size": 1})
    said = pool.run(write_asked_to_stop, 2, small, parallel, folder)
    assert said == ["stopped after 16 of 24 sequences, saved; the same command goes on from there"] * 2
    np.testing.assert_array_equal(LogitCache(folder).samples, unbroken.samples[:16])
    kept = {path: path.read_bytes() for path in folder.glob("*.shard")}
    assert pool.run(write_cache, 2, small, parallel, folder)[0]["samples"] == 24
    assert {path: path.read_bytes() for path in kept} == kept
    whole = LogitCache(folder)
    np.testing.assert_array_equal(whole.samples, unbroken.samples)
    for sample in unbroken.samples.tolist():
        np.testing.assert_allclose(whole.read(sample).entropy_S, unbroken.read(sample).entropy_S, rtol=1e-5, atol=1e-6)


def test_a_damaged_record_is_told_by_every_rank_before_the_first_step(
    pool: WorkerPool, teacher: Path, student: Path, tmp_path: Path
) -> None:
    job = make_job(tmp_path, teacher, student)
    pool.run(write_cache, 2, job, layout(dp=2), tmp_path / "whole")
    for damaged in range(2):
        cache, out = tmp_path / f"cache{damaged}", tmp_path / f"out{damaged}"
        shutil.copytree(tmp_path / "whole", cache)
        shards = sorted(cache.glob("*.shard"))
        assert len(shards) == 2  # one for each rank to read
        content = bytearray(shards[damaged].read_bytes())
        content[-1] ^= 1
        shards[damaged].write_bytes(content)
        first, second = pool.run(refusal, 2, job, layout(pp=2), cache, out)
        assert first == second
        assert f"{shards[damaged].name}: the record of sample " in first
        assert not list(out.iterdir())
