"""The GPU tier: `make test-gpu`. On a machine that cannot run it every test is skipped, and says why."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from minitron.compat.te import import_error
from minitron.config.parallel import ParallelConfig
from minitron.config.run import Device
from minitron.parallel.groups import Groups, model_parallel
from minitron.runtime.device import process_group
from minitron.runtime.env import DistEnv
from tests.helpers.pool import WorkerPool, pool_with


def _lack() -> str | None:
    """Why the tier cannot run here."""
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device"
    reason = import_error()
    return f"Transformer Engine does not load: {reason}" if reason else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mine = [item for item in items if Path(__file__).parent in item.path.parents]
    lack = _lack() if mine else None
    for item in mine:
        item.add_marker(pytest.mark.gpu)
        if lack:
            item.add_marker(pytest.mark.skip(reason=lack))


@pytest.fixture(scope="session")
def groups() -> Iterator[Groups]:
    """The groups of one rank over NCCL, as a run of `minitron` on one GPU has them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    env = DistEnv(rank=0, world_size=1, local_rank=0)
    with process_group(env, Device.cuda), model_parallel(ParallelConfig(), seed=1) as made:
        yield made


@pytest.fixture(scope="session")
def cpu_pool(groups: Groups) -> Iterator[WorkerPool]:
    """A worker that sees no GPU. With the groups this process has found its own before they are hidden for a moment."""
    with pool_with(1, CUDA_VISIBLE_DEVICES="") as workers:
        yield workers


@pytest.fixture(autouse=True)
def _own_memory() -> None:
    """Each test starts with an empty GPU and the same random state."""
    if torch.cuda.is_available():
        torch.manual_seed(0)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
