"""Process groups of the parallel axes: the only reader of Megatron's global `parallel_state`."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

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
        tp, pp, dp: Groups along the tensor, pipeline and data axes.
        mp: Tensor x pipeline: all ranks that hold one copy of the model.
        tp_rank, pp_rank, dp_rank: Place along each axis.
        collection: The same, in the form Megatron's constructors take.
    """

    tp: ProcessGroup
    pp: ProcessGroup
    dp: ProcessGroup
    mp: ProcessGroup
    tp_rank: int
    pp_rank: int
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
    )
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    try:
        yield Groups(
            tp=parallel_state.get_tensor_model_parallel_group(),
            pp=parallel_state.get_pipeline_model_parallel_group(),
            dp=parallel_state.get_data_parallel_group(),
            mp=parallel_state.get_model_parallel_group(),
            tp_rank=parallel_state.get_tensor_model_parallel_rank(),
            pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
            dp_rank=parallel_state.get_data_parallel_rank(),
            collection=ProcessGroupCollection.use_mpu_process_groups(),
        )
    finally:
        parallel_state.destroy_model_parallel()
