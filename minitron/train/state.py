"""Checkpoints to resume training from: model, optimizer, schedule and step, written by Megatron-Core."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from minitron.checkpoint.model_io import (
    fill,
    load_sharded,
    save_sharded,
    sharded_weights,
    with_history,
)
from minitron.checkpoint.store import CheckpointReader
from minitron.compat.optimizer_state import saved_in_place
from minitron.errors import CheckpointError
from minitron.runtime.env import trusted_history
from minitron.train.optim import Trainable

_OPTIMIZER_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable"}
"""Optimizer state in the shape of the parameters, so that it loads at any layout."""


def save_state(trainable: Trainable, folder: Path, *, step: int) -> None:
    """Write ``folder/step_<step>``, then drop the older ones.

    The folder gets its name only when all of it is written, so one that exists is complete, and is kept as it is.

    Args:
        trainable: What to save.
        folder: Folder of the run's training checkpoints.
        step: Optimizer steps done.
    """
    final = folder / _name(step)
    partial = folder / f".{final.name}.partial"
    rank = torch.distributed.get_rank()
    is_there = [final.exists()]
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
    torch.distributed.broadcast_object_list(is_there, src=0)
    if is_there[0]:
        return
    with saved_in_place(trainable.optimizer):
        replicas = trainable.optimizer.chained_optimizers[0].data_parallel_group
        save_sharded(_state_dict(trainable, is_loading=False), partial, replicas=replicas)
    if rank == 0:
        (partial / "step.json").write_text(json.dumps({"step": step}))
        partial.rename(final)
        for older in saved_steps(folder):
            if older != step:
                shutil.rmtree(folder / _name(older))
    torch.distributed.barrier()


def load_state(trainable: Trainable, folder: Path) -> int:
    """Load the newest checkpoint under ``folder``, if there is one.

    Returns:
        Optimizer steps done; 0 when there was nothing to load.
    """
    torch.distributed.barrier()
    steps = saved_steps(folder)
    if not steps:
        return 0
    path = folder / _name(steps[-1])
    with _loadable_adam(trainable):
        asked = _state_dict(trainable, is_loading=True)
        asked["model"] = with_history(asked["model"], CheckpointReader(path).extra_states)
        state = load_sharded(asked, path)
        with trusted_history():
            fill(trainable.gpt, state["model"], path)
        _complete_groups(trainable, state["optimizer"])
        trainable.optimizer.load_state_dict(state["optimizer"])
    trainable.scheduler.num_steps = 0  # Megatron adds the loaded steps to those of the fresh schedule
    trainable.scheduler.load_state_dict(state["scheduler"])
    try:
        return int(json.loads((path / "step.json").read_text())["step"])
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}/step.json cannot be read ({error}); delete {path}") from error


def saved_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints under ``folder``, in order."""
    return sorted(int(path.name.removeprefix("step_")) for path in folder.glob("step_*"))


@contextlib.contextmanager
def _loadable_adam(trainable: Trainable) -> Iterator[None]:
    """Let torch's AdamW take a sharded state: the CPU's optimizer, and CUDA's without Apex or Transformer Engine.

    Megatron-Core 0.19 restores its moments but stumbles over its per-parameter ``step``: there must be one before
    the load, and while tensors are copied it must not be a tensor. So the state of step 0 is made first, and the
    loaded steps are plain numbers until the load is over.
    """
    adams = [o.optimizer for o in trainable.optimizer.chained_optimizers if isinstance(o.optimizer, torch.optim.AdamW)]
    for adam in adams:
        for parameter in _parameters(adam):
            if not adam.state[parameter]:
                moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
                adam.state[parameter].update(step=torch.zeros((), device=parameter.device), **moments)
    hooks = [adam.register_load_state_dict_post_hook(_steps_to_numbers) for adam in adams]
    try:
        yield
    finally:
        for hook, adam in zip(hooks, adams, strict=True):
            hook.remove()
            for parameter in _parameters(adam):
                step = float(adam.state[parameter]["step"])
                adam.state[parameter]["step"] = torch.tensor(step, device=parameter.device)


def _complete_groups(trainable: Trainable, state: dict[Any, Any]) -> None:
    """Let one Adam load the state that another wrote: torch's on a CPU, Transformer Engine's or Apex's on a GPU.

    The groups of parameters are stored with all settings, which differ by the class: those that the stored groups
    lack are this optimizer's own. And torch counts steps as floats, which the others' kernels do not take.
    """
    own = trainable.optimizer.chained_optimizers[0].optimizer.param_groups[0]
    settings = {key: value for key, value in own.items() if key not in ("params", "step")}
    for part in [state] if "optimizer" in state else state.values():  # Megatron numbers them where there are several
        for group in part["optimizer"]["param_groups"]:
            for key, value in settings.items():
                group.setdefault(key, value)
            if "step" in group:
                group["step"] = int(group["step"])


def _parameters(adam: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in adam.param_groups for parameter in group["params"]]


def _steps_to_numbers(adam: torch.optim.Optimizer) -> None:
    for parameter in _parameters(adam):
        adam.state[parameter]["step"] = float(adam.state[parameter]["step"])


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _state_dict(trainable: Trainable, *, is_loading: bool) -> dict[str, Any]:
    model = sharded_weights(trainable.gpt)
    return {
        "model": model,
        "optimizer": trainable.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=_OPTIMIZER_FORMAT),
        "scheduler": trainable.scheduler.state_dict(),
    }
