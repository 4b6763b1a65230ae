"""The score and prune stages."""

from pathlib import Path

from minitron.checkpoint.folder import read_model_config
from minitron.config.prune import Ranking
from minitron.data.loader import calibration_batches
from minitron.models.load import load_gpt
from minitron.prune.calibration import score_model
from minitron.prune.ranking import choose
from minitron.prune.scores import Scores
from minitron.prune.slicer import apply_spec
from minitron.runtime.session import Session

SPEC_FILE = "prune_spec.json"


def score(session: Session, *, model: Path, source_id: str, data: Path, out: Path) -> dict[str, int]:
    """One forward-only calibration pass; every aggregation asked for is saved, so another target needs no new pass.

    Args:
        session: The running job.
        model: Checkpoint folder of the model to score.
        source_id: Identity of its weights, kept with the scores.
        data: The data folder; calibration sequences come from its training split.
        out: The stage's working folder.
    """
    with session.context_as_data() as whole:  # hooks see whole sequences
        scores = _scores(whole, model=model, source_id=source_id, data=data)
    if session.is_main:
        scores.save(out)
    return {"samples": scores.num_samples, "tokens": scores.num_samples * scores.seq_length}


def _scores(session: Session, *, model: Path, source_id: str, data: Path) -> Scores:
    config, groups = session.config, session.groups
    gpt, architecture = load_gpt(model, session, local_spec=True)
    batches = calibration_batches(
        data,
        num_samples=config.score.num_samples,
        seq_length=config.data.seq_length,
        micro_batch_size=config.score.micro_batch_size,
        dp_rank=groups.dp_rank,
        dp_size=groups.dp.size(),
        seed=config.seed,
    )
    with session.progress("score") as progress:
        return score_model(
            gpt,
            batches,
            model=architecture,
            config=config.score,
            groups=groups,
            source_id=source_id,
            on_progress=progress.update,
        )


def prune(session: Session, *, model: Path, source_id: str, scores: Path | None, out: Path) -> dict[str, object]:
    """Choose what to keep, write it down as a spec, and slice the checkpoint with it.

    Args:
        session: The running job; all its ranks slice.
        model: Checkpoint folder of the source.
        source_id: Identity of its weights.
        scores: Folder of the scores; None with ``prune.ranking=random``.
        out: The stage's working folder; becomes a checkpoint folder with ``prune_spec.json``.
    """
    config, groups = session.config, session.groups
    needs_scores = config.prune.ranking is Ranking.importance
    loaded = Scores.load(scores) if needs_scores and scores is not None else None
    spec = choose(read_model_config(model), config.prune, scores=loaded, source_id=source_id)
    if session.is_main:
        spec.save(out / SPEC_FILE)
    with session.progress("prune") as progress:
        apply_spec(
            spec,
            source=model,
            out=out,
            rank=groups.world_rank,
            world_size=groups.world_size,
            on_progress=progress.update,
        )
    target = spec.target
    experts = {"experts": f"{spec.source.num_moe_experts} -> {target.num_moe_experts}"} if spec.experts else {}
    return {
        "layers": f"{spec.source.num_layers} -> {target.num_layers}",
        "hidden": f"{spec.source.hidden_size} -> {target.hidden_size}",
        "ffn": f"{spec.source.ffn_hidden_size} -> {target.ffn_hidden_size}",
        "heads": f"{spec.source.num_attention_heads} -> {target.num_attention_heads}",
        **experts,
    }
