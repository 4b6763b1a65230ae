"""Choose the device and start this process's part of the job."""

import contextlib
import datetime
from collections.abc import Iterator

import torch

from minitron.compat.cpu import CPU_LAYER
from minitron.config.parallel import ParallelConfig
from minitron.config.run import Device
from minitron.errors import LayoutError, PlatformError
from minitron.runtime.env import DistEnv

COLLECTIVE_TIMEOUT = datetime.timedelta(hours=2)
"""Longer than any stage that one rank does alone while the others wait (tokenizing, export)."""


def resolve_device(device: Device) -> Device:
    """Turn ``auto`` into what is there.

    Raises:
        PlatformError: CUDA was asked for and is not available.
    """
    has_cuda = torch.cuda.is_available()
    if device is Device.cuda and not has_cuda:
        raise PlatformError(f"device=cuda, but torch {torch.__version__} sees no CUDA device; set device=cpu or auto")
    if device is Device.auto:
        device = Device.cuda if has_cuda else Device.cpu
    return device


def check_num_ranks(env: DistEnv, parallel: ParallelConfig) -> None:
    """Refuse a launch with more or fewer processes than the layout needs.

    Raises:
        LayoutError: With the product written out.
    """
    if env.world_size != parallel.num_ranks:
        raise LayoutError(
            f"{env.world_size} processes were started, but the layout needs {parallel.arithmetic()}; "
            "start as many, or change parallel.data_parallel_size"
        )


@contextlib.contextmanager
def process_group(env: DistEnv, device: Device) -> Iterator[None]:
    """The default process group, with the CPU layer in force when there is no GPU.

    Args:
        env: This process's rank.
        device: ``cpu`` (gloo) or ``cuda`` (nccl); see `resolve_device`.
    """
    if device is Device.cpu:
        CPU_LAYER.apply()
    else:
        torch.cuda.set_device(env.local_rank)
    torch.distributed.init_process_group(
        backend="gloo" if device is Device.cpu else "cpu:gloo,cuda:nccl",
        init_method=env.init_method,
        rank=env.rank,
        world_size=env.world_size,
        timeout=COLLECTIVE_TIMEOUT,
    )
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
        CPU_LAYER.undo()
