"""What the ranks of the multi-process tests run. Imports no transformers: workers import this file."""

from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console

from minitron.checkpoint.folder import write_model_config
from minitron.checkpoint.model_io import save_model
from minitron.compat.cpu import CPU_LAYER
from minitron.config.model import ModelConfig
from minitron.config.parallel import ParallelConfig
from minitron.config.precision import PrecisionConfig
from minitron.config.run import Device, RunConfig
from minitron.models.gpt import build_gpt
from minitron.models.hf_import import import_model
from minitron.parallel.groups import model_parallel
from minitron.runtime.artefact import RunFolder
from minitron.runtime.session import Session
from minitron.train.run import StartingPoint


def import_by_all(source: Path, out: Path) -> None:
    import_model(source, out, rank=dist.get_rank(), world_size=dist.get_world_size(), group=dist.group.WORLD)


def save_megatrons_start(model: ModelConfig, out: Path) -> None:
    """What Megatron-Core itself draws."""
    with CPU_LAYER.in_force(), model_parallel(ParallelConfig(), seed=1) as groups:
        torch.manual_seed(1)
        gpt = build_gpt(model, ParallelConfig(), PrecisionConfig(), groups, device=Device.cpu, initialize=True)
        save_model(gpt, out)


def save_random_start(model: ModelConfig, parallel: ParallelConfig, seed: int, work: Path, out: Path) -> None:
    """What a run from scratch starts from."""
    with CPU_LAYER.in_force(), model_parallel(parallel, seed=1) as groups:
        if groups.world_rank == 0:
            write_model_config(work / "shape", model)
        dist.barrier()
        session = Session(
            config=RunConfig(seed=seed, parallel=parallel),
            run=RunFolder(work),
            groups=groups,
            device=Device.cpu,
            console=Console(quiet=True),
        )
        gpt, loaded = StartingPoint(work / "shape", random_weights=True).load(session, work / "stage")
        assert loaded == model
        save_model(gpt, out)
        dist.barrier()
