"""The export stage: write the Hugging Face folder, reload it, and compare its logits with ours."""

import json
from pathlib import Path
from typing import Any

import torch

from minitron.checkpoint.folder import read_model_config
from minitron.config.precision import Dtype, PrecisionConfig
from minitron.errors import NumericsError
from minitron.eval.logits import example_tokens, logit_error, model_logits
from minitron.eval.run import EVAL_FILE
from minitron.models.hf_export import export_model, hf_logits
from minitron.models.load import load_gpt
from minitron.models.model_card import model_card
from minitron.models.transformer_config import TORCH_DTYPE
from minitron.runtime.session import Session

HF_DIR = "hf"

_CHECK_TOKENS = 64
"""Tokens of each sequence that the logits are compared on."""


def export(session: Session, out: Path) -> dict[str, Any]:
    """Export the distilled student and check the result by reloading it with transformers.

    Args:
        session: The running job.
        out: The stage's working folder; the model goes to ``hf/`` in it.

    Raises:
        NumericsError: The reloaded model's logits are not ours.
    """
    settings, student = session.config.export, session.run.stage("distill")
    folder = out / HF_DIR
    if session.is_main:
        with session.progress("export") as progress:
            export_model(
                student,
                folder,
                dtype=TORCH_DTYPE[settings.dtype],
                max_shard_bytes=settings.max_shard_gb * 1e9,
                card=_card(session),
                on_progress=progress.update,
            )
    torch.distributed.barrier()
    error = _reload_error(session, student, folder)
    if error > settings.max_logit_error:
        raise NumericsError(
            f"the exported model's logits differ from ours by {error:.2e} of the largest logit "
            f"(export.max_logit_error={settings.max_logit_error:.0e}); the export is not done"
        )
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) if session.is_main else 0
    return {"max_logit_error": error, "size_bytes": size}


def _reload_error(session: Session, student: Path, folder: Path) -> float:
    """Compare fp32 logits: ours with the weights rounded as they were exported, theirs as they load."""
    exported = TORCH_DTYPE[session.config.export.dtype]
    length = min(_CHECK_TOKENS, session.config.data.seq_length)
    tokens_BS = example_tokens(session.run.stage("data"), seq_length=length)
    # Megatron's own modules, which want whole sequences: Transformer Engine multiplies fp32 in TF32, of ten bits.
    with session.context_as_data() as whole:
        gpt, model = load_gpt(student, whole, precision=PrecisionConfig(dtype=Dtype.fp32), local_spec=True)
        gpt.eval()
        with torch.no_grad():
            for parameter in gpt.parameters():
                parameter.copy_(parameter.to(exported))
        ours = model_logits(gpt, tokens_BS.to(whole.torch_device), whole.groups, vocab_size=model.vocab_size)
    shared: list[float] = [0.0]
    if session.is_main:
        shared = [logit_error(ours.cpu(), hf_logits(folder, tokens_BS))]
    torch.distributed.broadcast_object_list(shared, src=0)
    return shared[0]


def _card(session: Session) -> str:
    """The model card, with the figures that are known by now."""
    run = session.run
    figures = {}
    for which in ("teacher", "pruned", "distilled", "baseline"):
        file = run.stage(f"eval_{which}") / EVAL_FILE
        if file.exists():
            figures[which] = json.loads(file.read_text(encoding="utf-8"))
    imported, distilled = run.meta("import"), run.meta("distill")
    assert imported is not None, "export needs import"
    assert distilled is not None, "export needs distill"
    return model_card(
        name=session.config.name,
        source=str(imported["summary"]["name"]),
        origin=imported["summary"],
        before=read_model_config(run.stage("source")),
        after=read_model_config(run.stage("distill")),
        figures=figures,
        distill_tokens=int(distilled["summary"]["tokens"]),
        environment=distilled["environment"],
    )
