"""What the ranks run to see where a distillation waits. Imports no transformers: workers import this file."""

from pathlib import Path
from unittest import mock

from minitron.config.parallel import ParallelConfig
from minitron.data.batch import Batch
from minitron.data.loader import TrainBatches
from tests.parallel.cached_workers import Job, distill_steps
from tests.unit.train.workers import Waits


def places_of_waits(job: Job, parallel: ParallelConfig, teacher: Path, out: Path) -> dict[int, set[str]]:
    """Distill to the end; the places where the host waited, by step."""
    waits, whole = Waits(), TrainBatches.microbatches

    def counted(batches: TrainBatches, step: int) -> list[Batch]:
        waits.step = step + 1
        return whole(batches, step)

    with mock.patch.object(TrainBatches, "microbatches", counted), waits.recording():
        distill_steps(job, parallel, teacher, out)
    return dict(waits.places)
