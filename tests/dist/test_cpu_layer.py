"""The CPU device layer comes off without a trace, and is refused where there is a GPU."""

from importlib import import_module

import pytest
import torch

from minitron.compat.cpu import CpuLayer, describe, redirects
from minitron.config.parallel import ParallelConfig
from minitron.config.run import Device
from minitron.errors import LayoutError, PlatformError
from minitron.runtime.device import resolve_device


def owners() -> list[object]:
    modules = {redirect.module for redirect in redirects()} - {"torch.Tensor"}
    return [torch.Tensor, *map(import_module, sorted(modules))]


def test_undo_restores_every_attribute() -> None:
    before = [dict(vars(owner)) for owner in owners()]
    layer = CpuLayer().apply()
    assert layer.applied
    assert all(vars(owner) != was for owner, was in zip(owners(), before, strict=True))
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.zeros(2).type() == "torch.cuda.FloatTensor"
    assert layer.apply() is layer
    layer.undo()
    layer.undo()
    assert not layer.applied
    for owner, was in zip(owners(), before, strict=True):
        assert vars(owner).keys() == was.keys()
        assert [name for name, value in was.items() if vars(owner)[name] is not value] == []
    assert torch.zeros(2).type() == "torch.FloatTensor"


def test_an_error_inside_the_block_undoes_the_layer() -> None:
    cuda = torch.Tensor.cuda
    with pytest.raises(ZeroDivisionError, match="False"), CpuLayer().in_force():
        raise ZeroDivisionError(f"{torch.Tensor.cuda is cuda}")
    assert torch.Tensor.cuda is cuda


def test_refused_where_cuda_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    current_device = torch.cuda.current_device
    layer = CpuLayer()
    with pytest.raises(PlatformError, match="CUDA_VISIBLE_DEVICES="):
        layer.apply()
    assert not layer.applied
    assert torch.cuda.current_device is current_device


def test_every_redirect_is_described() -> None:
    lines = describe()
    for redirect in redirects():
        assert f"{redirect.target}: {redirect.reason}" in lines


@pytest.mark.parametrize("device", [Device.cpu, Device.auto])
def test_sequence_parallelism_is_refused_on_the_cpu(monkeypatch: pytest.MonkeyPatch, device: Device) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    parallel = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
    with pytest.raises(LayoutError, match=r"set parallel\.sequence_parallel=false"):
        resolve_device(device, parallel)
    assert resolve_device(device, ParallelConfig(tensor_model_parallel_size=2)) is Device.cpu


def test_sequence_parallelism_is_allowed_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    parallel = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
    assert resolve_device(Device.auto, parallel) is Device.cuda
