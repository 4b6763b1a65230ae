"""What the ranks of the multi-process tests run. Imports no transformers: workers import this file."""

from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor

from minitron.checkpoint.folder import read_model_config, write_model_config
from minitron.checkpoint.model_io import load_model, save_model, save_sharded
from minitron.checkpoint.store import CheckpointWriter
from minitron.compat.cpu import CPU_LAYER
from minitron.config.parallel import ParallelConfig
from minitron.config.precision import PrecisionConfig
from minitron.config.run import Device
from minitron.errors import CheckpointError
from minitron.models.gpt import build_gpt
from minitron.parallel.groups import model_parallel


def load_and_save(folder: Path, out: Path, parallel: ParallelConfig) -> None:
    """Through a sharded Megatron model: load a checkpoint folder, save it again."""
    model = read_model_config(folder)
    with CPU_LAYER.in_force(), model_parallel(parallel, seed=1) as groups:
        gpt = build_gpt(model, parallel, PrecisionConfig(), groups, device=Device.cpu)
        for parameter in gpt.parameters():
            parameter.data.fill_(torch.nan)  # what is not loaded shows
        load_model(gpt, folder)
        save_model(gpt, out)
        if groups.world_rank == 0:
            write_model_config(out, model)
        dist.barrier()


def save_by_megatron(out: Path, whole: torch.Tensor) -> None:
    """Each of two ranks saves half of the columns of each matrix, the matrices stacked as layers."""
    rank = dist.get_rank()
    columns = whole.shape[2] // 2
    state = {
        f"layer{layer}": ShardedTensor.from_rank_offsets(
            "stack",
            whole[layer, :, rank * columns : (rank + 1) * columns].contiguous(),
            (0, layer, len(whole)),
            (2, rank, 2),
            prepend_axis_num=1,
        )
        for layer in range(len(whole))
    }
    state["common"] = ShardedTensor.from_rank_offsets("common", whole[0], replica_id=rank)
    with CPU_LAYER.in_force():
        save_sharded(state, out)


def write_boxes(out: Path, whole: torch.Tensor, *, leave_hole: bool = False) -> str:
    """Deal rows of a tensor over the ranks; return the error's text, or nothing."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    writer = CheckpointWriter(out, rank=rank, world_size=world_size)
    for row in range(rank, len(whole), world_size):
        if not (leave_hole and row == 1):
            writer.write("w", whole[row : row + 1], global_shape=whole.shape, offsets=(row, 0, 0))
    try:
        writer.finish(dist.group.WORLD)
    except CheckpointError as error:
        return str(error)
    return ""


def load_error(folder: Path, parallel: ParallelConfig) -> str:
    """What is said when a checkpoint folder cannot be loaded; nothing when it can."""
    model = read_model_config(folder)
    CPU_LAYER.apply()
    try:
        with model_parallel(parallel, seed=1) as groups:
            gpt = build_gpt(model, parallel, PrecisionConfig(), groups, device=Device.cpu)
            load_model(gpt, folder)
    except CheckpointError as error:
        return str(error)
    finally:
        CPU_LAYER.undo()
    return ""
