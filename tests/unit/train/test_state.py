"""What another device wrote into a training state is made to fit; the whole way there is in tests/gpu."""

import os
from types import SimpleNamespace
from typing import Any, cast

import pytest

from minitron.checkpoint.model_io import with_history
from minitron.runtime.env import trusted_history
from minitron.train.optim import Trainable
from minitron.train.state import _complete_groups


def _trainable(**settings: Any) -> Trainable:
    adam = SimpleNamespace(param_groups=[{"params": ["p"], "step": 0, **settings}])
    chained = [SimpleNamespace(optimizer=adam)]
    return cast(Trainable, SimpleNamespace(optimizer=SimpleNamespace(chained_optimizers=chained)))


def _stored(**group: Any) -> dict[str, Any]:
    return {"optimizer": {"param_groups": [group]}}


@pytest.mark.parametrize("number", [1, 2])
def test_groups_of_another_adam_get_the_settings_they_lack(number: int) -> None:
    parts = [_stored(lr=index, step=3.0, foreach=None) for index in range(number)]
    _complete_groups(_trainable(lr=9, bias_correction=True), parts[0] if number == 1 else dict(enumerate(parts)))
    for index, part in enumerate(parts):
        (group,) = part["optimizer"]["param_groups"]
        assert group == {"lr": index, "step": 3, "foreach": None, "bias_correction": True}
        assert type(group["step"]) is int


def test_only_stored_extra_states_are_asked_for() -> None:
    def sharded(key: str) -> Any:
        return SimpleNamespace(key=key)

    names = {"weight": "a.weight", "x._extra_state": "a._extra_state", "y._extra_state": "b._extra_state"}
    names["z._extra_state1"] = "c._extra_state"  # of the second of several experts in one layer
    weights = {"model0": {name: sharded(key) for name, key in names.items()}}
    assert set(with_history(weights, frozenset({"a._extra_state"}))["model0"]) == {"weight", "x._extra_state"}
    assert set(with_history(weights)["model0"]) == {"weight"}


@pytest.mark.parametrize("before", [None, "0"])
def test_history_is_trusted_inside_only(monkeypatch: pytest.MonkeyPatch, before: str | None) -> None:
    key = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"
    monkeypatch.delenv(key, raising=False)
    if before is not None:
        monkeypatch.setenv(key, before)
    with trusted_history():
        assert os.environ[key] == "1"
    assert os.environ.get(key) == before
