"""Choose the device and start this process's part of the job."""

import contextlib
import datetime
from collections.abc import Iterator, Mapping
from typing import NoReturn

import torch

from minitron.compat import te
from minitron.compat.cpu import CPU_LAYER
from minitron.config.fp8 import NEEDS, unmet_need
from minitron.config.gpus import GPUS
from minitron.config.parallel import ParallelConfig
from minitron.config.precision import Dtype, Fp8Recipe
from minitron.config.run import Device, RunConfig
from minitron.errors import LayoutError, PlatformError, StoppedError
from minitron.runtime.env import DistEnv, hide_gpus, num_cores

COLLECTIVE_TIMEOUT = datetime.timedelta(hours=2)
"""Longer than any stage that one rank does alone while the others wait (import, export); that which tokenizes is heard
of now and then."""


MOST_RANKS_PER_CORE = 8
"""More processes than this on a core are a layout for other machines, not a trial on this one."""


def resolve_device(device: Device) -> Device:
    """Turn ``auto`` into what is there. For ``cpu`` GPUs are hidden from this process and those it starts.

    Raises:
        PlatformError: CUDA was asked for and is not available.
    """
    if device is Device.cpu:
        hide_gpus()  # the CPU layer refuses where there is one
        return device
    has_cuda = torch.cuda.is_available()
    if device is Device.cuda and not has_cuda:
        raise PlatformError(f"device=cuda, but torch {torch.__version__} sees no CUDA device; set device=cpu or auto")
    if device is Device.auto:
        device = Device.cuda if has_cuda else Device.cpu
    return device


def check_precision(config: RunConfig, device: Device) -> None:
    """Refuse number formats that the device cannot do: FP8 going by its compute capability and by torch's CUDA.

    Args:
        config: The run.
        device: ``cpu`` or ``cuda``; see `resolve_device`. Of several GPUs the first stands for all.

    Raises:
        PlatformError: With the device, the setting, and what it needs.
    """
    for key, recipe in config.fp8_recipes.items():
        if device is Device.cpu:
            _refuse_without_gpu(key, recipe, "the device is cpu")
        if reason := _unmet_by_gpu(recipe, 0):
            _refuse(key, recipe, reason)
    if device is Device.cuda:
        _refuse_split_sequences_in_fp32(config)


def _unmet_by_gpu(recipe: Fp8Recipe, index: int) -> str | None:
    cuda = torch.version.cuda
    return unmet_need(
        recipe,
        capability=torch.cuda.get_device_capability(index),
        cuda=None if cuda is None else (int(cuda.split(".")[0]), int(cuda.split(".")[1])),
    )


def refused_fp8(recipes: Mapping[str, Fp8Recipe], device: torch.device) -> dict[str, str]:
    """What a rank's device cannot do of the FP8 recipes: why, by key.

    Args:
        recipes: See `RunConfig.fp8_recipes`.
        device: This rank's device; a GPU is the current one. Without Transformer Engine only the GPU is asked.
    """
    if device.type == "cpu":
        return {key: f"{recipe} needs an NVIDIA GPU, the device is cpu" for key, recipe in recipes.items()}
    found: dict[str, str] = {}
    for key, recipe in recipes.items():
        reason = _unmet_by_gpu(recipe, device.index)
        if reason is None and te.import_error() is None:
            reason = te.unsupported(recipe)
        if reason is not None:
            found[key] = reason
    return found


def check_cluster_precision(config: RunConfig) -> None:
    """Refuse number formats that a cluster's nodes cannot do, going by its configuration: they are not at hand.

    Args:
        config: The run. Where ``cluster.gpu`` is not known, or too old a CUDA is on the nodes, the ranks find out.

    Raises:
        PlatformError: With the setting, and what it needs.
    """
    for key, recipe in config.fp8_recipes.items():
        if not config.cluster.gpus_per_node or config.device is Device.cpu:
            on = "device=cpu" if config.cluster.gpus_per_node else "cluster.gpus_per_node=0"
            _refuse_without_gpu(key, recipe, f"the job has none ({on})")
        if (gpu := config.cluster.gpu) is None:
            continue
        if reason := unmet_need(recipe, capability=GPUS[gpu].capability, cuda=None):
            _refuse(key, recipe, reason, on=f"cluster.gpu={gpu}")
    if config.cluster.gpus_per_node and config.device is not Device.cpu:
        _refuse_split_sequences_in_fp32(config)


def _refuse_split_sequences_in_fp32(config: RunConfig) -> None:
    """Transformer Engine 2.20 chooses no attention at all for fp32 under context parallelism.

    Its `get_attention_backend` (pytorch/attention/dot_product_attention/utils.py) leaves out FlashAttention and cuDNN
    for fp32, and its own plain attention where the sequence is split.
    """
    size = config.parallel.context_parallel_size
    dtypes = {"precision.dtype": config.precision.dtype, "distill.teacher.dtype": config.distill.teacher.dtype}
    for key, dtype in dtypes.items():
        if size > 1 and dtype is Dtype.fp32:
            raise PlatformError(
                f"{key}=fp32 with parallel.context_parallel_size={size}: Transformer Engine has no such attention on a "
                f"GPU; set {key}=bf16, or parallel.context_parallel_size=1"
            )


def check_transformer_engine(config: RunConfig, device: Device) -> None:
    """Make sure, on a rank whose GPU is set, that Transformer Engine is there and does the run's FP8.

    Raises:
        PlatformError: It is not installed, does not load, or refuses a recipe.
    """
    if device is Device.cpu:
        return
    te.require_transformer_engine()
    for key, recipe in config.fp8_recipes.items():
        if reason := te.unsupported(recipe):
            _refuse(key, recipe, f"Transformer Engine says: {reason}")


def _refuse(key: str, recipe: Fp8Recipe, reason: str, *, on: str | None = None) -> NoReturn:
    name = on or torch.cuda.get_device_name()
    raise PlatformError(f"{key}={recipe} cannot run on {name}: {reason}; choose another recipe, or bf16")


def _refuse_without_gpu(key: str, recipe: Fp8Recipe, but: str) -> NoReturn:
    least = ".".join(map(str, NEEDS[recipe].capability))
    raise PlatformError(
        f"{key}={recipe} needs an NVIDIA GPU of compute capability {least} or higher, but {but}; "
        "set precision=bf16 (or fp32) and distill.teacher.fp8_recipe=null"
    )


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


def check_devices(num_ranks: int, config: RunConfig, *, places: int = 1) -> None:
    """Refuse to start more ranks on this machine than it has GPUs, or on a CPU far more than it has cores.

    Args:
        num_ranks: Ranks of a job on this machine.
        config: The run.
        places: Jobs side by side.

    Raises:
        LayoutError: With both numbers.
    """
    need = places * num_ranks
    jobs = f"search.workers={places} x {num_ranks} ranks" if places > 1 else config.parallel.arithmetic()
    if resolve_device(config.device) is Device.cpu:
        cores = num_cores()
        if need > MOST_RANKS_PER_CORE * cores:
            raise LayoutError(
                f"{jobs} would start {need} processes on this machine, which has {cores} cores and no GPU in use, more "
                f"than {MOST_RANKS_PER_CORE} a core; change parallel.* or search.workers, or start it where there are "
                "more: launch=torchrun, launch=slurm"
            )
        return
    have = torch.cuda.device_count()
    if need > have:
        raise LayoutError(
            f"{jobs} need {need} GPUs on this machine, which has {have}; change parallel.* or search.workers, or start "
            "it where there are more: launch=torchrun, launch=slurm"
        )


@contextlib.contextmanager
def process_group(env: DistEnv, device: Device, *, timeout: datetime.timedelta = COLLECTIVE_TIMEOUT) -> Iterator[None]:
    """The default process group, with the CPU layer in force when there is no GPU.

    Args:
        env: This process's rank.
        device: ``cpu`` (gloo) or ``cuda`` (nccl); see `resolve_device`.
        timeout: Longest wait of a collective for the slowest rank.

    After an error on several GPUs the groups are left standing, and the process has to end with `end_process`: taking
    NCCL's down waits for the ranks at the other end, which wait for this one.
    """
    if device is Device.cpu:
        CPU_LAYER.apply()
    else:
        _set_cuda_device(env)
    torch.set_float32_matmul_precision("highest")  # images of NVIDIA's ask for TF32, which has ten bits
    torch.distributed.init_process_group(
        backend="gloo" if device is Device.cpu else "cpu:gloo,cuda:nccl",
        init_method=env.init_method,
        rank=env.rank,
        world_size=env.world_size,
        timeout=timeout,
    )
    leaves = True
    try:
        yield
    except StoppedError:  # all ranks leave together
        raise
    except BaseException:
        leaves = device is Device.cpu or env.world_size == 1
        raise
    finally:
        if leaves:
            torch.distributed.destroy_process_group()
        CPU_LAYER.undo()


def _set_cuda_device(env: DistEnv) -> None:
    """Make this rank's GPU the current one, before anything is allocated.

    Raises:
        PlatformError: More ranks on this machine than torch sees GPUs.
    """
    number = torch.cuda.device_count()
    if env.local_rank >= number:
        raise PlatformError(
            f"local rank {env.local_rank} has no GPU: torch sees {number} on this machine (CUDA_VISIBLE_DEVICES, "
            "--gpus-per-node); start as many ranks a machine as it has GPUs"
        )
    torch.cuda.set_device(env.local_rank)
