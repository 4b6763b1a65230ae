"""Build a model for this rank and fill it from a checkpoint folder."""

from dataclasses import replace
from pathlib import Path

from megatron.core.models.gpt.gpt_model import GPTModel

from minitron.checkpoint.folder import read_model_config
from minitron.checkpoint.model_io import load_model
from minitron.config.model import ModelConfig
from minitron.config.precision import PrecisionConfig
from minitron.models.gpt import build_gpt
from minitron.runtime.session import Session


def load_gpt(
    folder: Path,
    session: Session,
    *,
    precision: PrecisionConfig | None = None,
    local_spec: bool = False,
) -> tuple[GPTModel, ModelConfig]:
    """Load this rank's part of a model.

    Args:
        folder: A checkpoint folder, saved at any layout.
        session: The running job; its layout is the one to build for.
        precision: Number formats, when they are not the session's.
        local_spec: See `build_gpt`.

    Raises:
        CheckpointError: The folder is not a complete checkpoint.
    """
    model = read_model_config(folder)
    parallel = session.config.parallel
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
