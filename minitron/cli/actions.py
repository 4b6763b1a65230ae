"""What each stage does: the wiring of data, prune, distill, train, eval and report. Imported on the ranks only."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from minitron.checkpoint.folder import is_checkpoint_folder, read_model_config
from minitron.cli.exporting import export
from minitron.cli.stages import CHECKPOINT_OF, teacher_digest
from minitron.config.compose import to_yaml
from minitron.config.distill import TeacherSource
from minitron.config.run import SourceKind
from minitron.data.build import build_dataset
from minitron.data.summary import Split, require_tokens
from minitron.distill.cache_plan import cache_identity
from minitron.distill.cache_write import write_teacher_logits
from minitron.distill.run import distill
from minitron.eval.run import check_better_than_chance, evaluate
from minitron.models.axes import num_embedding_parameters, num_parameters
from minitron.models.hf_import import import_model
from minitron.models.random_source import write_random_model
from minitron.prune.run import prune, score
from minitron.prune.scores import Scores
from minitron.runtime.session import Session
from minitron.train.run import train_from_scratch

Values = dict[str, Any]


def act(stage: str, session: Session, out: Path) -> Values:
    """Do the work of a stage on this rank.

    Args:
        stage: Name of the stage.
        session: The running job.
        out: The stage's working folder.

    Returns:
        The summary for ``meta.json``.
    """
    if stage.startswith("eval_"):
        return _eval(stage, session, out)
    actions = {
        "import": _import,
        "data": _data,
        "score": _score,
        "prune": _prune,
        "teacher_logits": _teacher_logits,
        "distill": _distill,
        "baseline": _baseline,
        "export": export,
        "report": _report,
    }
    return actions[stage](session, out)


def _eval(stage: str, session: Session, out: Path) -> Values:
    which = stage.removeprefix("eval_")
    given = which == "checkpoint"
    model = _given_checkpoint(session, out) if given else session.run.stage(CHECKPOINT_OF[which])
    result = evaluate(session, name=stage, model=model, data=session.run.stage("data"), out=out)
    if which == "teacher":
        check_better_than_chance(session, result["loss"], read_model_config(model).vocab_size)
    return dict(result)


def _given_checkpoint(session: Session, out: Path) -> Path:
    """The folder that ``eval.checkpoint`` names, imported first when it is a Hugging Face folder."""
    given = Path(session.config.eval.checkpoint or "")
    if is_checkpoint_folder(given):
        return given
    groups = session.groups
    import_model(given, out / "imported", rank=groups.world_rank, world_size=groups.world_size)
    return out / "imported"


def _import(session: Session, out: Path) -> Values:
    source = Path(session.config.source.path or "")
    if session.config.source.kind is SourceKind.random:
        source = out / "source"
        if session.is_main:
            write_random_model(session.config.source.random, source)
        torch.distributed.barrier()
    with session.progress("import") as progress:
        info = import_model(
            source,
            out,
            rank=session.groups.world_rank,
            world_size=session.groups.world_size,
            on_progress=progress.update,
        )
    total = num_parameters(info.model)
    return {
        "name": info.name,
        "parameters": total,
        "non_embedding": total - num_embedding_parameters(info.model),
    }


def _data(session: Session, out: Path) -> Values:
    if not session.is_main:
        return {}
    model = session.run.stage("import")
    with session.progress("data") as progress:
        # The amount of text is not known before it is read: the bar counts megabytes as they come.
        limit = session.config.data.max_bytes or 0
        summary = build_dataset(
            session.config.data,
            tokenizer_dir=model / "hf",
            vocab_size=read_model_config(model).vocab_size,
            out_dir=out,
            on_progress=lambda _documents, done: progress.update(done, max(limit, done)),
        )
    # Now, not when training starts: one global batch, the calibration samples, one held-out sequence.
    seq_length = session.config.data.seq_length
    train = max(session.config.distill.train.global_batch_size, session.config.score.num_samples)
    require_tokens(out, Split.train, num_sequences=train, seq_length=seq_length)
    require_tokens(out, Split.heldout, num_sequences=1, seq_length=seq_length)
    return {"train_tokens": summary.train.num_tokens, "heldout_tokens": summary.heldout.num_tokens}


def _identity_of(session: Session, stage: str) -> str:
    meta = session.run.meta(stage)
    assert meta is not None, f"{stage} runs before"
    digest: str = meta["digest"]
    return digest


def _score(session: Session, out: Path) -> Values:
    run = session.run
    source_id = _identity_of(session, "import")
    return dict(score(session, model=run.stage("import"), source_id=source_id, data=run.stage("data"), out=out))


def _prune(session: Session, out: Path) -> Values:
    run = session.run
    source_id = _identity_of(session, "import")
    return prune(session, model=run.stage("import"), source_id=source_id, scores=run.stage("score"), out=out)


def _teacher_logits(session: Session, out: Path) -> Values:
    teacher, data = session.run.stage("import"), session.run.stage("data")
    identity = cache_identity(session.config, data, teacher=teacher_digest(session.config))
    return dict(write_teacher_logits(session, teacher=teacher, identity=identity, data=data, out=out))


def _distill(session: Session, out: Path) -> Values:
    run = session.run
    settings, student, data = session.config.distill.teacher, run.stage("prune"), run.stage("data")
    teacher = run.stage("import")
    if settings.source is TeacherSource.cached:
        teacher = Path(settings.cache) if settings.cache else run.stage("teacher_logits")
    teacher_id = teacher_digest(session.config)
    return dict(distill(session, teacher=teacher, teacher_id=teacher_id, student=student, data=data, out=out))


def _baseline(session: Session, out: Path) -> Values:
    run = session.run
    return dict(train_from_scratch(session, shape_of=run.stage("prune"), data=run.stage("data"), out=out))


def _report(session: Session, out: Path) -> Values:
    if session.is_main:
        from minitron.report.write import write_report

        width = Scores.load(session.run.stage("score"))
        scores = width.for_aggregation(session.config.prune.aggregation)
        importance = {
            "ffn": scores.ffn,
            "head": scores.head,
            "hidden": np.sum(scores.hidden, axis=0),
            "layer": width.layer,
        }
        write_report(session.run.path, out, importance, to_yaml(session.config))
    return {}
