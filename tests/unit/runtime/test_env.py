"""What the launcher's environment variables say, and layouts they do not fit."""

import pytest
import torch

from minitron.config.parallel import ParallelConfig
from minitron.config.run import Device
from minitron.errors import LayoutError, PlatformError
from minitron.runtime.device import check_num_ranks, resolve_device
from minitron.runtime.env import DistEnv, dist_env, num_cores


def test_dist_env() -> None:
    assert dist_env({}) is None
    assert dist_env({"HOME": "/root"}) is None
    assert dist_env({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}) == DistEnv(3, 8, 1)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "0"}, "RANK set but WORLD_SIZE, LOCAL_RANK not; start with torchrun, or unset them"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK, WORLD_SIZE set but LOCAL_RANK not; start with torchrun, or unset"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK set but RANK, WORLD_SIZE not"),
        ({"RANK": "0", "WORLD_SIZE": "two", "LOCAL_RANK": "0"}, "must be numbers, got {'RANK': '0', 'WORLD_SIZE'"),
    ],
)
def test_dist_env_refuses_a_partial_set(environ: dict[str, str], message: str) -> None:
    with pytest.raises(PlatformError) as caught:
        dist_env(environ)
    assert message in str(caught.value)


def test_num_ranks_must_be_the_product() -> None:
    layout = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    check_num_ranks(DistEnv(0, 4, 0), layout)
    for started in (2, 8):
        with pytest.raises(LayoutError) as caught:
            check_num_ranks(DistEnv(0, started, 0), layout)
        assert str(caught.value) == (
            f"{started} processes were started, but the layout needs tensor 2 x pipeline 2 x data 1 = 4; "
            "start as many, or change parallel.data_parallel_size"
        )


def test_cpu_device() -> None:
    assert resolve_device(Device.cpu) is Device.cpu
    expected = Device.cuda if torch.cuda.is_available() else Device.cpu
    assert resolve_device(Device.auto) is expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_that_is_not_there() -> None:
    with pytest.raises(PlatformError, match=r"device=cuda, but torch .* sees no CUDA device; set device=cpu or auto"):
        resolve_device(Device.cuda)


def test_num_cores_is_positive() -> None:
    assert num_cores() >= 1
