"""What the ranks of the multi-process tests run. Imports no transformers: workers import this file."""

from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console

from minitron.checkpoint.folder import read_model_config
from minitron.checkpoint.model_io import load_model
from minitron.compat.cpu import CPU_LAYER
from minitron.config.parallel import ParallelConfig
from minitron.config.precision import PrecisionConfig
from minitron.config.run import Device, RunConfig
from minitron.config.score import ScoreConfig
from minitron.data.batch import NO_SAMPLE, Batch
from minitron.models.gpt import build_gpt
from minitron.parallel.groups import model_parallel
from minitron.prune.calibration import score_model
from minitron.prune.least_squares import LeastSquares
from minitron.prune.reconstruct import reconstruction
from minitron.prune.scores import Scores
from minitron.prune.slicer import apply_spec
from minitron.prune.spec import PruneSpec
from minitron.runtime.artefact import RunFolder
from minitron.runtime.session import Session


def score(
    folder: Path,
    tokens_BS: torch.Tensor,
    parallel: ParallelConfig,
    config: ScoreConfig,
) -> Scores:
    """Score a checkpoint on Megatron-Core at a layout."""
    model = read_model_config(folder)
    CPU_LAYER.apply()
    try:
        with model_parallel(parallel, seed=1) as job_groups:
            job = RunConfig(parallel=parallel)
            session = Session(
                config=job, run=RunFolder(folder), groups=job_groups, device=Device.cpu, console=Console()
            )
            with session.context_as_data() as whole:
                groups = whole.groups
                assert whole.config.parallel.num_ranks == parallel.num_ranks
                gpt = build_gpt(model, whole.config.parallel, PrecisionConfig(), groups, device=Device.cpu)
                load_model(gpt, folder)
                # In fp64 the layouts' own rounding is far below what the statistics might add.
                gpt.double()
                gpt.config.pipeline_dtype = torch.float64
                size = config.micro_batch_size
                batches = _batches(tokens_BS, size, groups.dp_rank, groups.dp.size())
                return score_model(gpt, batches, model=model, config=config, groups=groups, source_id="w")
    finally:
        CPU_LAYER.undo()


def _batches(tokens_BS: torch.Tensor, size: int, rank: int, ranks: int) -> list[Batch]:
    """Sequences dealt to the data-parallel ranks; rows of weight 0 fill up the last micro-batches."""
    missing = -len(tokens_BS) % (size * ranks)
    tokens_BS = torch.cat([tokens_BS, tokens_BS[:1].expand(missing, -1)])
    mask_BS = torch.ones(tokens_BS.shape)
    mask_BS[len(mask_BS) - missing :] = 0
    positions_BS = torch.arange(tokens_BS.shape[1]).repeat(size, 1)
    return [
        Batch(
            tokens_BS=tokens_BS[first : first + size],
            labels_BS=tokens_BS[first : first + size],
            position_ids_BS=positions_BS,
            loss_mask_BS=mask_BS[first : first + size],
            sample_index_B=torch.full((size,), NO_SAMPLE),
        )
        for first in range(rank * size, len(tokens_BS), size * ranks)
    ]


def prune(spec: PruneSpec, source: Path, out: Path) -> None:
    """Apply a spec with all ranks."""
    apply_spec(
        spec,
        source=source,
        out=out,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        group=dist.group.WORLD,
    )


def reconstruct(
    spec: PruneSpec, source: Path, out: Path, tokens_BS: torch.Tensor, config: RunConfig, micro_batch_size: int
) -> None:
    """Slice and fit with all ranks of a layout."""
    CPU_LAYER.apply()
    try:
        with model_parallel(config.parallel, seed=1) as groups:
            session = Session(config=config, run=RunFolder(source), groups=groups, device=Device.cpu, console=Console())
            prepared = reconstruction(
                spec,
                source=source,
                batches=lambda rank, ranks: _batches(tokens_BS, micro_batch_size, rank, ranks),
                seq_length=tokens_BS.shape[1],
                session=session,
            )
            with prepared as fitted:
                apply_spec(
                    spec,
                    source=source,
                    out=out,
                    rank=groups.world_rank,
                    world_size=groups.world_size,
                    fitted=fitted,
                )
    finally:
        CPU_LAYER.undo()


def solve(inputs_TX: torch.Tensor, errors_TE: torch.Tensor, damping: float) -> torch.Tensor:
    """Least squares with the tokens dealt over the ranks."""
    here = slice(dist.get_rank(), None, dist.get_world_size())
    squares = LeastSquares(inputs_TX.shape[1], errors_TE.shape[1], device=torch.device("cpu"))
    squares.add(inputs_TX[here], errors_TE[here])
    return squares.solve(damping, dist.group.WORLD, what="linear_fc2 of layer 3")
