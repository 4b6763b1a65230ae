"""Build a model for this rank and fill it from a checkpoint folder."""

from dataclasses import replace
from pathlib import Path

from minitron.checkpoint.folder import read_model_config
from minitron.checkpoint.model_io import load_model
from minitron.config.model import ModelConfig
from minitron.config.parallel import ParallelConfig
from minitron.config.precision import PrecisionConfig
from minitron.models.gpt import Chunks, build_gpt
from minitron.runtime.session import Session


def load_gpt(
    folder: Path,
    session: Session,
    *,
    parallel: ParallelConfig | None = None,
    precision: PrecisionConfig | None = None,
    local_spec: bool = False,
) -> tuple[Chunks, ModelConfig]:
    """Load this rank's part of a model.

    Args:
        folder: A checkpoint folder, saved at any layout.
        session: The running job.
        parallel: The layout to build for, on the session's ranks; without it the session's for a model that is
            only run forward (`ParallelConfig.plain`).
        precision: Number formats, when they are not the session's.
        local_spec: See `build_gpt`.

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
        precision or session.config.precision,
        session.groups,
        device=session.device,
        local_spec=local_spec,
    )
    load_model(gpt, folder)
    return gpt, model
