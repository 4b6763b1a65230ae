"""What the ranks of the multi-process tests run. Imports no transformers: workers import this file."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console

from minitron.checkpoint.folder import read_model_config
from minitron.checkpoint.model_io import load_model
from minitron.compat.cpu import CPU_LAYER
from minitron.config.depth import DepthPlan
from minitron.config.model import ModelConfig
from minitron.config.parallel import ParallelConfig
from minitron.config.precision import Dtype, PrecisionConfig
from minitron.config.run import Device, RunConfig
from minitron.config.score import ScoreConfig
from minitron.data.batch import NO_SAMPLE, Batch
from minitron.models.gpt import Chunks, build_gpt
from minitron.parallel.groups import Groups, model_parallel
from minitron.prune.calibration import score_model
from minitron.prune.depth import measure_depth
from minitron.prune.depth_scores import DepthScores
from minitron.prune.least_squares import LeastSquares
from minitron.prune.questions import Question, question_sheet
from minitron.prune.reconstruct import reconstruction
from minitron.prune.scores import Scores
from minitron.prune.slicer import apply_spec
from minitron.prune.spec import PruneSpec
from minitron.runtime.artefact import RunFolder
from minitron.runtime.session import Session


@dataclass(frozen=True)
class Loaded:
    """A checkpoint on Megatron-Core, in fp64: the layouts' own rounding is far below what scoring might add."""

    gpt: Chunks
    model: ModelConfig
    groups: Groups


@contextlib.contextmanager
def loaded(folder: Path, parallel: ParallelConfig, dtype: Dtype | None = None) -> Iterator[Loaded]:
    """Load a checkpoint at a layout, in fp64 without a dtype, context-parallel ranks as data-parallel ones."""
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
                precision = PrecisionConfig(dtype=dtype or Dtype.fp32)
                gpt = build_gpt(model, whole.config.parallel, precision, groups, device=Device.cpu)
                load_model(gpt, folder)
                if dtype is None:
                    gpt.double()
                    gpt.config.pipeline_dtype = torch.float64
                yield Loaded(gpt, model, groups)
    finally:
        CPU_LAYER.undo()


def score(folder: Path, tokens_BS: torch.Tensor, parallel: ParallelConfig, config: ScoreConfig) -> Scores:
    """Score a checkpoint on Megatron-Core at a layout."""
    with loaded(folder, parallel) as it:
        batches = _batches(tokens_BS, config.micro_batch_size, it.groups.dp_rank, it.groups.dp.size())
        return score_model(it.gpt, batches, model=it.model, config=config, groups=it.groups, source_id="w")


def depth(
    folder: Path,
    tokens_BS: torch.Tensor,
    parallel: ParallelConfig,
    plan: DepthPlan,
    micro_batch_size: int,
    questions: Sequence[Question] = (),
    dtype: Dtype | None = None,
) -> tuple[DepthScores, int]:
    """Measure the depth of a checkpoint at a layout; and how often a layer of this rank was called."""
    calls = 0

    def count(_layer: torch.nn.Module, _args: object) -> None:
        nonlocal calls
        calls += 1

    with loaded(folder, parallel, dtype) as it:
        (chunk,) = it.gpt
        for layer in chunk.get_submodule("decoder.layers").children():
            layer.register_forward_pre_hook(count)
        rank, ranks = it.groups.dp_rank, it.groups.dp.size()
        sheet = None
        if questions:
            sheet = question_sheet(
                questions, encode, micro_batch_size=micro_batch_size, max_length=64, dp_rank=rank, dp_size=ranks
            )
        batches = _batches(tokens_BS, micro_batch_size, rank, ranks) if plan.on_text else []
        scores = measure_depth(it.gpt, batches, plan, model=it.model, groups=it.groups, questions=sheet)
    return scores, calls


def encode(text: str) -> list[int]:
    """A token for each letter."""
    return [ord(letter) % 48 for letter in text]


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
