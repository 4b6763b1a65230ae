"""What is asked for and not possible on a device is an error that names both."""

import contextlib
import os
import subprocess
import sys

import pytest
import torch

from minitron.config.compose import compose_run
from minitron.config.run import Device
from minitron.errors import PlatformError, StoppedError
from minitron.runtime.device import check_cluster_precision, check_precision, process_group, resolve_device
from minitron.runtime.env import DistEnv

RANDOM = "source.kind=random"
on_a_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["precision=fp8_delayed"], r"^precision.fp8_recipe=delayed needs an NVIDIA GPU .* 8.9 or higher, .* is cpu"),
        (["precision=mxfp8"], r"^precision.fp8_recipe=mxfp8 needs an NVIDIA GPU .* 10.0 or higher, .* is cpu"),
        (
            ["precision=bf16", "distill.teacher.fp8_recipe=blockwise"],
            r"^distill.teacher.fp8_recipe=blockwise needs an NVIDIA GPU .* 9.0 or higher, but the device is cpu",
        ),
    ],
)
def test_fp8_on_the_cpu(overrides: list[str], said: str) -> None:
    with pytest.raises(PlatformError, match=said) as caught:
        check_precision(compose_run([RANDOM, *overrides]), Device.cpu)
    assert "\n" not in str(caught.value)


def test_bf16_on_the_cpu() -> None:
    check_precision(compose_run([RANDOM, "precision=bf16", "precision.fp8_recipe=mxfp8"]), Device.cpu)


def test_split_sequences_in_fp32_on_gpus() -> None:
    split = [RANDOM, "parallel.context_parallel_size=2"]
    with pytest.raises(PlatformError) as caught:
        check_precision(compose_run(split), Device.cuda)
    assert str(caught.value) == (
        "precision.dtype=fp32 with parallel.context_parallel_size=2: Transformer Engine has no such attention on a "
        "GPU; set precision.dtype=bf16, or parallel.context_parallel_size=1"
    )
    check_precision(compose_run(split), Device.cpu)
    check_precision(compose_run([*split, "precision=bf16"]), Device.cuda)
    with pytest.raises(PlatformError, match=r"^distill.teacher.dtype=fp32 with"):
        check_precision(compose_run([*split, "precision=bf16", "distill.teacher.dtype=fp32"]), Device.cuda)
    on_nodes = [*split, "launch=slurm", "cluster=dgx_h100"]
    with pytest.raises(PlatformError, match=r"^precision.dtype=fp32 with"):
        check_cluster_precision(compose_run(on_nodes))
    check_cluster_precision(compose_run([*on_nodes, "device=cpu"]))


@pytest.mark.parametrize(
    ("device", "num_ranks", "error", "stands"),
    [
        (Device.cuda, 2, ValueError(), True),
        (Device.cuda, 2, StoppedError("stopped"), False),
        (Device.cuda, 2, None, False),
        (Device.cuda, 1, ValueError(), False),
        (Device.cpu, 2, ValueError(), False),
    ],
)
def test_an_error_on_several_gpus_leaves_the_group_standing(
    monkeypatch: pytest.MonkeyPatch, device: Device, num_ranks: int, error: Exception | None, stands: bool
) -> None:
    """Taking NCCL's groups down would wait for the other ranks."""
    ended: list[str] = []
    monkeypatch.setattr("minitron.runtime.device._set_cuda_device", lambda _env: None)
    monkeypatch.setattr("torch.distributed.init_process_group", lambda **_settings: None)
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: ended.append("group"))
    with (
        contextlib.suppress(ValueError, StoppedError),
        process_group(DistEnv(0, num_ranks, 0), device),
    ):
        if error is not None:
            raise error
    assert (ended == []) == stands


@on_a_cpu
def test_cuda_without_a_gpu() -> None:
    with pytest.raises(PlatformError, match=r"device=cuda, but torch .* sees no CUDA device"):
        resolve_device(Device.cuda)
    assert resolve_device(Device.auto) is Device.cpu


@on_a_cpu
def test_a_rank_without_a_gpu_of_its_own() -> None:
    env = DistEnv(rank=1, world_size=2, local_rank=1)
    with pytest.raises(PlatformError, match="local rank 1 has no GPU: torch sees 0"), process_group(env, Device.cuda):
        pass


def test_fp32_is_not_tf32_where_an_image_asks_for_it() -> None:
    """NVIDIA's do; torch reads the variable when it is imported, so another process does."""
    script = (
        "import torch; from minitron.config.run import Device; from minitron.runtime.device import process_group\n"
        "from minitron.runtime.env import DistEnv\n"
        "print(torch.get_float32_matmul_precision())\n"
        "with process_group(DistEnv(0, 1, 0, master_port=0), Device.cpu): print(torch.get_float32_matmul_precision())"
    )
    environ = {**os.environ, "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["high", "highest"]
