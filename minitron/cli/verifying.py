"""The verify stage: the pruned model computes, and computes what the source does without what was dropped."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitron.config.families import LLAMA_LIKE
from minitron.config.precision import Dtype
from minitron.config.prune import HeadResidual, PruneConfig
from minitron.data.loader import calibration_batches
from minitron.errors import NumericsError
from minitron.eval.logits import logit_error, model_logits
from minitron.models.load import load_gpt
from minitron.prune.masked import mask_dropped
from minitron.prune.run import SPEC_FILE
from minitron.prune.spec import PruneSpec
from minitron.runtime.session import Session

_SEQUENCES, _TOKENS = 2, 64
"""Calibration sequences, and tokens of each, that the logits are compared on."""

_MAX_ERROR = {Dtype.fp32: 1e-3, Dtype.bf16: 5e-2}
"""Largest difference of two logits, relative to the largest logit: far above rounding, far below a wrong slice."""


def verify(session: Session, _out: Path) -> dict[str, Any]:
    """Run the pruned model on calibration text, and the source with the same units masked.

    The two agree wherever pruning only cut: with layers, channels, neurons and heads dropped in any combination. Where
    it changed what it kept (fitted weights, merged heads), the pruned model's logits only have to be finite.

    Args:
        session: The running job. The source is loaded as it is for scoring, so what could score can verify.
        _out: The stage's working folder; all there is to say is in the summary.

    Raises:
        NumericsError: A logit is not finite, or the two models disagree.
    """
    run = session.run
    spec = PruneSpec.load(run.stage("prune") / SPEC_FILE)
    with session.context_as_data() as whole:
        pruned_BSV = _logits(whole, run.stage("prune"))
        bad = int((~pruned_BSV.isfinite()).sum())
        if bad:
            raise NumericsError(
                f"verify: {bad} of {pruned_BSV.numel()} logits of the pruned model are not finite; evaluate the source "
                "(`minitron eval`), and set precision.dtype=fp32 if that is finite"
            )
        summary = {"sequences": pruned_BSV.shape[0], "tokens": pruned_BSV.shape[0] * pruned_BSV.shape[1]}
        changed = _what_changed(spec, session.config.prune)
        if changed:
            return {**summary, "masked_teacher": f"not compared ({changed})"}
        error = logit_error(pruned_BSV, _logits(whole, run.stage("source"), masked_to=spec))
    dtype = session.config.precision.dtype
    if not error <= _MAX_ERROR[dtype]:
        raise NumericsError(
            f"verify: the pruned model's logits differ from the masked teacher's by {error:.1e} of the largest logit, "
            f"more than {_MAX_ERROR[dtype]:.0e} in {dtype}: {run.stage('prune')} is not what {SPEC_FILE} says; prune "
            "again"
        )
    return {**summary, "masked_teacher_error": error}


def _what_changed(spec: PruneSpec, config: PruneConfig) -> str | None:
    """Why the masked teacher is not what the pruned model was cut from, or cannot be made; None where it can."""
    if spec.head_residual is not HeadResidual.none:
        return f"prune.head_residual={spec.head_residual}"
    if spec.source.architecture not in LLAMA_LIKE:
        return f"nothing masks {spec.source.architecture} so far"
    fitted = config.reconstruct.enabled and spec.source != spec.target
    return "prune.reconstruct.enabled=true" if fitted else None


def _logits(session: Session, folder: Path, *, masked_to: PruneSpec | None = None) -> Tensor:
    """Logits of a checkpoint on the first calibration sequences, equal on all ranks, [B, S, V]."""
    config = session.config
    count = min(_SEQUENCES, config.score.num_samples)
    (batch,) = calibration_batches(
        session.run.stage("data"),
        num_samples=count,
        seq_length=config.data.seq_length,
        micro_batch_size=count,
        dp_rank=0,
        dp_size=1,
        seed=config.seed,
    )
    gpt, model = load_gpt(folder, session, local_spec=True)
    gpt.eval()
    if masked_to is not None:
        mask_dropped(gpt, masked_to, session.groups)
    tokens_BS = batch.tokens_BS[:, :_TOKENS].to(session.torch_device)
    with torch.no_grad():
        return model_logits(gpt, tokens_BS, session.groups, vocab_size=model.vocab_size)
