"""Saving Megatron's distributed optimizer without copies, where a rank has no data-parallel peer to gather from."""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


class _Parts(dict[int, torch.Tensor]):
    """One state of all parameters of a buffer, by where each parameter starts: stands for the joined tensor."""

    def __getitem__(self, where: slice | int) -> torch.Tensor:
        """The state of the parameter that fills this part of the buffer, flat, in its own memory."""
        assert isinstance(where, slice), where
        part = super().__getitem__(where.start)
        assert len(part) == where.stop - where.start, (len(part), where)
        return part


@contextlib.contextmanager
def saved_in_place(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Inside, the optimizer's sharded state of a rank without data-parallel peers is made of the tensors themselves.

    Megatron-Core 0.19 copies master weights and moments into joined buffers, gathers those, and joins them again
    before it cuts them into parameters: for a rank alone, up to 32 bytes of extra memory for each parameter.

    Args:
        optimizer: Megatron's optimizer, chained or not. What it gives inside must not outlive its next step.
    """
    parts = [o for o in getattr(optimizer, "chained_optimizers", [optimizer]) if isinstance(o, DistributedOptimizer)]
    with contextlib.ExitStack() as stack:
        for part in parts:
            if part.data_parallel_group.size() == 1:
                part.get_parameter_state_dp_zero = partial(_own_state, part)
                stack.callback(delattr, part, "get_parameter_state_dp_zero")  # the class's own shows again
        yield


def _own_state(optimizer: DistributedOptimizer, **_how: Any) -> dict[Any, Any]:
    """What `DistributedOptimizer.get_parameter_state_dp_zero` gives, as far as the sharded state reads it."""
    state: dict[Any, Any] = {}
    for index, (buffer, ranges) in enumerate(zip(optimizer.buffers, optimizer.gbuf_ranges, strict=True)):
        (dtype,) = ranges
        joined = {key: _Parts() for key in ("param", *optimizer.optimizer_state_keys)}
        for parameter, (start, _stop, _bucket) in buffer.param_index_map.items():
            own = optimizer._get_main_param_and_optimizer_states(parameter)
            for key, parts in joined.items():
                parts[start] = own[key].detach().view(-1)
        state[index] = {dtype: joined}
    return state
