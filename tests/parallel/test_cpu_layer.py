"""The CPU device layer comes off without a trace, and is refused where there is a GPU."""

from pkgutil import resolve_name

import pytest
import torch

from minitron.compat.cpu import CpuLayer, describe, redirects
from minitron.errors import PlatformError


def owners() -> list[object]:
    return [resolve_name(name) for name in sorted({redirect.owner for redirect in redirects()})]


def test_undo_restores_every_attribute() -> None:
    before = [dict(vars(owner)) for owner in owners()]
    layer = CpuLayer().apply()
    assert layer.applied
    same = {owner.__name__ for owner, was in zip(owners(), before, strict=True) if vars(owner) == was}
    assert {name for name in same if not name.startswith("megatron.core.optimizer")} == set()  # Adam may be torch's
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
