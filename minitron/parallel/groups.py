"""Process groups of the parallel axes: the only reader of Megatron's global `parallel_state`."""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch.distributed import ProcessGroup

from minitron.config.parallel import ParallelConfig


@dataclass(frozen=True)
class Groups:
    """This rank's process groups and its place in each.

    Attributes:
        tp, pp, cp, dp: Groups along the tensor, pipeline, context and data axes.
        dp_cp: Data x context: all ranks that hold the same part of the model.
        tp_rank, pp_rank, cp_rank, dp_rank: Place along each axis.
        collection: The same, in the form Megatron's constructors take.
    """

    tp: ProcessGroup
    pp: ProcessGroup
    cp: ProcessGroup
    dp: ProcessGroup
    dp_cp: ProcessGroup
    tp_rank: int
    pp_rank: int
    cp_rank: int
    dp_rank: int
    collection: ProcessGroupCollection

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the output layer and sees losses."""
        return self.pp_rank == self.pp.size() - 1

    @property
    def last_stage_source(self) -> int:
        """Global rank of the last stage in this rank's pipeline."""
        ranks: list[int] = torch.distributed.get_process_group_ranks(self.pp)
        return ranks[-1]

    @contextlib.contextmanager
    def context_as_data(self) -> Iterator["Groups"]:
        """The same ranks, the context-parallel ones as further data-parallel ones: each sees whole sequences.

        All ranks enter the block together; a group that it needs is destroyed at its end.
        """
        if self.cp.size() == 1:
            yield self
            return
        alone, _ = torch.distributed.new_subgroups(1)
        collection = copy.copy(self.collection)
        collection.cp, collection.dp = alone, self.dp_cp
        try:
            yield replace(self, cp=alone, dp=self.dp_cp, cp_rank=0, dp_rank=self.dp_cp.rank(), collection=collection)
        finally:
            torch.distributed.destroy_process_group(alone)

    @property
    def world_rank(self) -> int:
        """Global rank."""
        return torch.distributed.get_rank()

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return torch.distributed.get_world_size()

    def new_pipeline_group(self) -> ProcessGroup:
        """Another group of the ranks of `pp`, for messages that must not mix with those of Megatron's schedules.

        All ranks of the job call it together. The caller destroys it.
        """
        everywhere: list[tuple[int, ...]] = [()] * self.world_size
        torch.distributed.all_gather_object(everywhere, tuple(torch.distributed.get_process_group_ranks(self.pp)))
        # Every rank takes part in making every group, its own or not, in one order.
        made = {ranks: torch.distributed.new_group(list(ranks)) for ranks in sorted(set(everywhere))}
        mine: ProcessGroup = made[everywhere[self.world_rank]]
        return mine


@contextlib.contextmanager
def model_parallel(parallel: ParallelConfig, *, seed: int) -> Iterator[Groups]:
    """Make the groups of a layout; they are destroyed at the end of the block.

    Args:
        parallel: The layout; its number of ranks must be the world size.
        seed: Seed of Megatron's per-axis random states.
    """
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        create_gloo_process_groups=False,  # of no use here: the optimizer gathers its state in the groups it has
    )
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    try:
        yield _groups_in_force()
    finally:
        parallel_state.destroy_model_parallel()


@dataclass(frozen=True)
class SecondLayout:
    """The groups of another layout on the same ranks, out of force until asked for.

    Megatron's schedules, checkpoints and layers ask `parallel_state` for their groups: a model in another layout must
    be built, loaded and run inside `active`. Its random states stay the first layout's: for a model that is only run
    forward nothing is drawn.

    Attributes:
        groups: This rank's groups in the second layout.
        state: What `parallel_state` holds while it is in force.
    """

    groups: Groups
    state: Mapping[str, Any]

    @contextlib.contextmanager
    def active(self) -> Iterator[Groups]:
        """Put the second layout in force for the length of a block."""
        outer = _state()
        vars(parallel_state).update(self.state)
        try:
            yield self.groups
        finally:
            vars(parallel_state).update(outer)


@contextlib.contextmanager
def second_layout(parallel: ParallelConfig) -> Iterator[SecondLayout]:
    """Make the groups of another layout beside the one in force; all ranks enter and leave the block together.

    The groups are destroyed at the end of the block. After an error they are not: other ranks might not come to
    destroy theirs.

    Args:
        parallel: The layout; its number of ranks must be the world size.
    """
    every_group: list[ProcessGroup] = vars(parallel_state)["_global_process_group_list"]  # this rank's, in one order
    num_outer = len(every_group)
    yield _second_layout(parallel)
    for group in every_group[num_outer:]:
        torch.distributed.destroy_process_group(group)
    del every_group[num_outer:]


def _second_layout(parallel: ParallelConfig) -> SecondLayout:
    outer = _state()
    vars(parallel_state).update({name: {} if isinstance(value, dict) else None for name, value in outer.items()})
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            create_gloo_process_groups=False,
        )
        return SecondLayout(_groups_in_force(), _state())
    finally:
        vars(parallel_state).update(outer)


def _state() -> dict[str, Any]:
    """Every global of `parallel_state` that `initialize_model_parallel` sets: they are named in capitals."""
    return {name: value for name, value in vars(parallel_state).items() if name[0] == "_" and name[1:].isupper()}


def _groups_in_force() -> Groups:
    return Groups(
        tp=parallel_state.get_tensor_model_parallel_group(),
        pp=parallel_state.get_pipeline_model_parallel_group(),
        cp=parallel_state.get_context_parallel_group(),
        dp=parallel_state.get_data_parallel_group(),
        dp_cp=parallel_state.get_data_parallel_group(with_context_parallel=True),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
