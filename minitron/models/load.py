"""Build a model for this rank and fill it from a checkpoint folder."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from minitron.checkpoint.folder import read_model_config, weights_dir
from minitron.checkpoint.model_io import load_model
from minitron.checkpoint.store import CheckpointReader
from minitron.config.model import ModelConfig
from minitron.config.parallel import ParallelConfig
from minitron.config.precision import PrecisionConfig
from minitron.models.axes import Dim, params_of
from minitron.models.gpt import Chunks, build_gpt
from minitron.runtime.session import Session


def load_gpt(
    folder: Path,
    session: Session,
    *,
    parallel: ParallelConfig | None = None,
    precision: PrecisionConfig | None = None,
    local_spec: bool = False,
    vocab_rows: int | None = None,
) -> tuple[Chunks, ModelConfig]:
    """Load this rank's part of a model.

    Args:
        folder: A checkpoint folder, saved at any layout.
        session: The running job.
        parallel: The layout to build for, on the session's ranks; without it the session's for a model that is
            only run forward (`ParallelConfig.plain`).
        precision: Number formats; without them the session's for a model that is only run forward
            (`PrecisionConfig.plain`).
        local_spec: See `build_gpt`.
        vocab_rows: See `build_gpt`. Rows that the checkpoint lacks are zero, those beyond are not read.

    Raises:
        CheckpointError: The folder is not a complete checkpoint.
    """
    model = read_model_config(folder)
    parallel = parallel or session.config.parallel.plain()
    if local_spec:  # Megatron's own norms refuse sequence parallelism; weights and results are the same without
        parallel = replace(parallel, sequence_parallel=False)
    gpt = build_gpt(
        model,
        parallel,
        precision or session.config.precision.plain(),
        session.groups,
        device=session.device,
        local_spec=local_spec,
        vocab_rows=vocab_rows,
    )
    load_model(gpt, folder)
    return gpt, model


def load_output_rows(folder: Path, *, first: int, num_rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Read rows of a model's output layer (of its embedding, where the two are tied) without the model.

    Args:
        folder: A checkpoint folder, saved at any layout.
        first: First row.
        num_rows: How many; those beyond the model's vocabulary are zero.
        dtype: Number format to convert to.
        device: Where to put them.

    Raises:
        CheckpointError: The folder is not a complete checkpoint.
    """
    model = read_model_config(folder)
    key = [param.key for param in params_of(model) if Dim.vocab in param.dims][-1]
    rows_vH = torch.zeros(num_rows, model.hidden_size, dtype=dtype, device=device)
    there = min(model.vocab_size, first + num_rows) - first
    if there > 0:
        rows_vH[:there] = CheckpointReader(weights_dir(folder)).read(key, (first, 0), (there, model.hidden_size))
    return rows_vH
