"""A distillation reads nothing back from the device but on the steps that log, whatever its teacher and losses are."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minitron.config.distill import CrossEntropyMixConfig, TeacherConfig, TeacherParallelConfig, TeacherSource
from minitron.config.intermediate import IntermediateConfig
from minitron.config.logit_loss import LogitLossConfig
from minitron.config.mixing import Mixing
from minitron.config.parallel import ParallelConfig
from minitron.config.teacher_logits import CacheMethod
from tests.helpers.pool import WorkerPool
from tests.parallel.cached_workers import Job, write_cache
from tests.parallel.jobs import GLOBAL_BATCH, S, make_job, with_settings
from tests.parallel.reference import layout
from tests.parallel.waits_workers import places_of_waits

CPU_ONLY = {
    "cached.py:_target",  # a batch's sample indices and positions, which stay on the host
    "checks.py:check_labels",  # looks at labels that are on the CPU
    "checks.py:_check_entries",  # looks at entries that are on the CPU
    "engine.py:_scale",  # looks at a loss's gradient that is on the CPU
    "random.py:fork",  # Megatron compares states of the CPU's random generator, which live on the host
    "signals.py:agreed",  # a number that goes from host to host
}
"""Places that read a value where, and only where, its tensor is on the CPU: no device is waited for."""

NUM_STEPS, LOG_STEPS = 6, 3
CACHED = TeacherConfig(source=TeacherSource.cached)
OWN = TeacherConfig(
    parallel=TeacherParallelConfig(tensor_model_parallel_size=1, pipeline_model_parallel_size=2), micro_batch_size=4
)
ALL_PAIRS = IntermediateConfig(
    embedding=True,
    block_output=["0:1", "2:0", "last"],  # with two stages from the first to the last, back, and on the last
    mlp_input=["last:1", "0:0"],
    attention_relations=["0:2", "last-1"],
    relation_heads=4,
)
LABELS = CrossEntropyMixConfig(weight=0.5, mixing=Mixing.scaled)

CASES: dict[str, tuple[ParallelConfig, dict[str, Any]]] = {
    "online TP2": (layout(tp=2, sp=True), {}),
    "online PP2": (layout(pp=2), {"teacher_microbatches": 2}),
    "labels, scaled weight, CP2": (layout(cp=2), {"cross_entropy": LABELS}),
    "teacher in its own layout, TP2": (layout(tp=2), {"teacher": OWN}),
    "teacher in its own layout, DP2": (layout(dp=2), {"teacher": OWN}),
    "top-K TP2": (layout(tp=2), {"logit_loss": LogitLossConfig(top_k=6)}),
    "intermediate, scaled weight, PP2": (layout(pp=2), {"intermediate": ALL_PAIRS}),
    "intermediate, scaled weight, TP2": (layout(tp=2, sp=True), {"intermediate": ALL_PAIRS}),
    "cached TP2": (layout(tp=2), {"teacher": CACHED}),
    "cached PP2": (layout(pp=2), {"teacher": CACHED}),
    "cached CP2": (layout(cp=2), {"teacher": CACHED}),
}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, teacher: Path, student: Path) -> Job:
    job = make_job(tmp_path_factory.mktemp("waits"), teacher, student)
    return with_settings(job, train={"num_tokens": NUM_STEPS * GLOBAL_BATCH * S, "log_interval_steps": LOG_STEPS})


@pytest.fixture(scope="module")
def caches(pool: WorkerPool, job: Job, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("caches")
    for method in (CacheMethod.sampled, CacheMethod.top_k):
        writer = with_settings(job, logits={"method": method})
        pool.run(write_cache, 1, writer, layout(), root / method)
    return [root / CacheMethod.sampled, root / CacheMethod.top_k]


@pytest.mark.parametrize("name", CASES)
def test_the_host_waits_on_logging_steps_only(
    pool: WorkerPool, job: Job, caches: list[Path], tmp_path: Path, name: str
) -> None:
    parallel, changes = CASES[name]
    distill = replace(job.config.distill, **{"teacher": TeacherConfig(), **changes})
    job = replace(job, config=replace(job.config, distill=distill))
    is_cached = distill.teacher.source is TeacherSource.cached
    for number, folder in enumerate(caches if is_cached else [job.teacher]):
        out = tmp_path / str(number)
        for places in pool.run(places_of_waits, 2, job, parallel, folder, out):
            for step in (1, 2, 4, 5):
                assert places.get(step, set()) <= CPU_ONLY, f"step {step}"
            for step in (LOG_STEPS, NUM_STEPS):
                assert {"guard.py:check", "step.py:mean_terms"} <= places[step]
