from collections.abc import Iterator

import pytest

from tests.helpers.pool import WorkerPool


@pytest.fixture(scope="session")
def pool() -> Iterator[WorkerPool]:
    """Worker processes for multi-process tests, kept for the session: ``pool.run(fn, world_size, ...)``."""
    workers = WorkerPool()
    yield workers
    workers.close()
