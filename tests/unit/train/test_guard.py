"""The gradient's norm, clipping and refusal on the device, and the loop that does not wait for it."""

from pathlib import Path

import pytest
import torch

from minitron.config.parallel import ParallelConfig
from minitron.train.state import saved_steps
from tests.helpers.pool import WorkerPool
from tests.unit.train import workers

TP2 = ParallelConfig(tensor_model_parallel_size=2)
PP2 = ParallelConfig(pipeline_model_parallel_size=2)
DP2 = ParallelConfig(data_parallel_size=2)
LAYOUTS = pytest.mark.parametrize("parallel", [TP2, PP2, DP2], ids=["tp2", "pp2", "dp2"])

CPU_ONLY = {
    "checks.py:check_labels",  # looks at labels that are on the CPU
    "engine.py:_scale",  # looks at a loss's gradient that is on the CPU
    "random.py:fork",  # Megatron compares states of the CPU's random generator, which live on the host
}
"""Places that read a value where, and only where, its tensor is on the CPU: no device is waited for."""


@LAYOUTS
@pytest.mark.parametrize("share", [0.3, 3.0], ids=["clips", "leaves"])
def test_norm_and_clipping_are_megatrons(pool: WorkerPool, parallel: ParallelConfig, share: float) -> None:
    norm = pool.run(workers.clip, 2, parallel, 1.0)[0].megatron_norm
    for rank in pool.run(workers.clip, 2, parallel, share * norm):
        assert rank.norm == pytest.approx(rank.megatron_norm, rel=1e-6)
        assert rank.megatron_norm == norm
        torch.testing.assert_close(rank.grads, rank.megatron_grads, rtol=1e-6, atol=0)


@LAYOUTS
def test_a_bad_gradient_changes_no_weight_until_the_host_looks(pool: WorkerPool, parallel: ParallelConfig) -> None:
    for rank in pool.run(workers.poisoned_steps, 2, parallel):
        first, *later = rank.weights
        assert first.isfinite().all()
        for weights in later:
            assert torch.equal(weights, first)
        assert rank.error.startswith("gradient norm is nan at step 2; no update was made since")


@LAYOUTS
def test_a_checkpoint_is_never_written_after_a_bad_gradient(
    pool: WorkerPool, tmp_path: Path, parallel: ParallelConfig
) -> None:
    results = pool.run(workers.loop, 2, parallel, tmp_path, bad_step=1, num_steps=8, log=8, save=2)
    assert all("at step 1" in error for _, error in results)
    assert [sorted(places)[-1] for places, _ in results] == [2, 2]  # found before the save, not on the next log
    assert saved_steps(tmp_path) == []


@LAYOUTS
def test_the_host_waits_on_logging_steps_only(pool: WorkerPool, tmp_path: Path, parallel: ParallelConfig) -> None:
    for places, error in pool.run(workers.loop, 2, parallel, tmp_path, num_steps=6, log=3, save=0):
        assert error == ""
        for step in (1, 2, 4, 5):
            assert places.get(step, set()) <= CPU_ONLY, f"step {step}"
        for step in (3, 6):
            assert {"guard.py:check", "step.py:mean_terms"} <= places[step]
