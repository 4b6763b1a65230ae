"""The score and prune stages."""

from pathlib import Path

from minitron.checkpoint.folder import read_model_config
from minitron.config.prune import Ranking
from minitron.data.batch import Batch
from minitron.data.loader import calibration_batches
from minitron.models.gpt import FinalState
from minitron.models.load import load_gpt
from minitron.parallel.groups import Groups
from minitron.prune.importance import ImportanceCollector
from minitron.prune.ranking import choose
from minitron.prune.scores import Scores
from minitron.prune.slicer import apply_spec
from minitron.runtime.session import Session
from minitron.train.heldout import forward_only, groups_of

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
    config, groups = session.config, session.groups
    gpt, architecture = load_gpt(model, session, local_spec=True)
    gpt.eval()
    batches = calibration_batches(
        data,
        num_samples=config.score.num_samples,
        seq_length=config.data.seq_length,
        micro_batch_size=config.score.micro_batch_size,
        dp_rank=groups.dp_rank,
        dp_size=groups.dp.size(),
        seed=config.seed,
    )
    collector = ImportanceCollector(
        gpt.decoder.layers,
        architecture,
        seq_length=config.data.seq_length,
        aggregations=config.score.aggregations,
        head_norm=config.score.head_norm,
    )
    with collector, session.progress("score") as progress:
        done = 0
        for part in groups_of(batches, groups):
            on_device = [batch.to(session.torch_device) for batch in part]
            forward_only(gpt, on_device, _nothing, before=lambda batch: collector.observe(batch.loss_mask_BS[:, 0]))
            done += len(part)
            progress.update(done, len(batches))
    scores = _reduce(collector, source_id, groups)
    if session.is_main:
        scores.save(out)
    return {"samples": scores.num_samples, "tokens": scores.num_samples * scores.seq_length}


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
    return {
        "layers": f"{spec.source.num_layers} -> {target.num_layers}",
        "hidden": f"{spec.source.hidden_size} -> {target.hidden_size}",
        "ffn": f"{spec.source.ffn_hidden_size} -> {target.ffn_hidden_size}",
        "heads": f"{spec.source.num_attention_heads} -> {target.num_attention_heads}",
    }


def _reduce(collector: ImportanceCollector, source_id: str, groups: Groups) -> Scores:
    return collector.reduce(source_id=source_id, dp_group=groups.dp, tp_group=groups.tp, pp_group=groups.pp)


def _nothing(_state: FinalState, _batch: Batch) -> None:
    """The hooks have seen all there is to see."""
