"""What each stage does: the wiring of data, prune, distill, train, eval and report. Imported on the ranks only."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from minitron.checkpoint.folder import is_checkpoint_folder, read_model_config
from minitron.cli.exporting import export
from minitron.cli.stages import CHECKPOINT_OF, check_sequences, random_ranking
from minitron.cli.verifying import verify
from minitron.config.compose import load_resolved, to_yaml
from minitron.config.distill import TeacherSource
from minitron.config.precision import Dtype
from minitron.config.run import SourceDtype, SourceKind
from minitron.config.trainings import TRAININGS, settings_of
from minitron.data.build import build_dataset
from minitron.distill.cache_write import write_teacher_logits
from minitron.distill.run import distill
from minitron.eval.run import check_better_than_chance, evaluate
from minitron.models.axes import num_embedding_parameters, num_parameters
from minitron.models.hf_import import import_model
from minitron.models.random_source import write_random_model
from minitron.models.transformer_config import TORCH_DTYPE
from minitron.prune.run import prune, score
from minitron.prune.scores import Scores
from minitron.runtime.artefact import RESOLVED_FILE
from minitron.runtime.session import Session
from minitron.runtime.signals import work_of_one
from minitron.train.run import Leg, StartingPoint, train_on_text

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
    if stage in TRAININGS:
        return train_stage(stage, session, out)
    actions = {
        "import": _import,
        "data": _data,
        "score": _score,
        "prune": _prune,
        "prune_random": _prune_random,
        "verify": verify,
        "teacher_logits": _teacher_logits,
        "export": export,
        "report": _report,
        "ablation": _ablation,
    }
    return actions[stage](session, out)


def _eval(stage: str, session: Session, out: Path) -> Values:
    which = stage.removeprefix("eval_")
    if which == "checkpoint":
        model = _given_checkpoint(session, out)
    elif which == "given_teacher":
        model = _teacher_folder(session)
    else:
        model = session.run.stage(CHECKPOINT_OF[which])
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
    settings = session.config.source
    is_random = settings.kind is SourceKind.random
    source = Path(settings.path or "")
    if is_random:
        source = out / "source"
        if session.is_main:
            write_random_model(settings.random, source)
        torch.distributed.barrier()
    with session.progress("import") as progress:
        info = import_model(
            source,
            out,
            dtype=None if settings.dtype is SourceDtype.auto else TORCH_DTYPE[Dtype(settings.dtype.value)],
            rank=session.groups.world_rank,
            world_size=session.groups.world_size,
            on_progress=progress.update,
        )
    total = num_parameters(info.model)
    return {
        "name": f"random {info.model.num_layers}-layer model" if is_random else info.name,
        "parameters": total,
        "non_embedding": total - num_embedding_parameters(info.model),
        **info.origin,
    }


def _data(session: Session, out: Path) -> Values:
    return work_of_one(lambda should_stop: _tokenized(session, out, should_stop), is_main=session.is_main) or {}


def _tokenized(session: Session, out: Path, should_stop: Callable[[], bool]) -> Values:
    """Write the data folder; what ``data`` says of it."""
    model = session.run.stage("import")
    with session.progress("data") as progress:
        limit = session.config.data.max_bytes  # else the amount of text is not known before it is read
        summary = build_dataset(
            session.config.data,
            tokenizer_dir=model / "hf",
            vocab_size=read_model_config(model).vocab_size,
            out_dir=out,
            planned_text=session.digests["text"],
            on_progress=lambda _documents, done: progress.update(done, max(limit, done) if limit else None),
            should_stop=should_stop,
        )
    check_sequences(session.config, out)  # now, not when training starts
    return {"train_tokens": summary.train.num_tokens, "heldout_tokens": summary.heldout.num_tokens}


def _score(session: Session, out: Path) -> Values:
    run = session.run
    source_id = session.digests["source"]
    told = score(session, model=run.stage("source"), source_id=source_id, data=run.stage("data"), out=out)
    if session.is_main:
        from minitron.report.scores import write_score_plots

        scores = Scores.load(out)
        plots = write_score_plots(_arrays(session, scores), out)
        session.say(f"  score: {len(plots)} plots in {run.stage('score')}/, {', '.join(plots)}")
    return dict(told)


def _arrays(session: Session, scores: Scores) -> dict[str, NDArray[np.float64]]:
    """The scores that pruning ranks by, as arrays to draw."""
    prune = session.config.prune
    aggregation = prune.aggregation if prune.aggregation in scores.width else next(iter(scores.width))
    width = scores.for_aggregation(aggregation)
    heads_LGN = width.head.reshape(scores.model.num_layers, scores.model.num_query_groups, -1)
    return {
        "ffn": width.ffn,
        "head": width.head,
        "group": np.linalg.norm(heads_LGN, axis=2),
        "hidden": scores.channels(aggregation, prune.hidden_norms),
        "hidden_norms": np.concatenate([width.hidden, width.final[None]]),
        "layer": scores.layer,
        **{f"{metric} {size}": values for (metric, size), values in scores.depth.blocks.items()},
    }


def _prune(session: Session, out: Path) -> Values:
    run = session.run
    return prune(
        session,
        model=run.stage("source"),
        source_id=session.digests["source"],
        scores=_scores_folder(session) if session.config.prune.needs_scores else None,
        data=run.stage("data"),
        out=out,
    )


def _scores_folder(session: Session) -> Path:
    """Where the scores lie: in another run, or in this one."""
    given = session.config.prune.scores
    return Path(given) if given else session.run.stage("score")


def _prune_random(session: Session, out: Path) -> Values:
    return _prune(replace(session, config=random_ranking(session.config)), out)


def _teacher_folder(session: Session) -> Path:
    """Checkpoint folder of the model to learn from."""
    given = session.config.distill.teacher.path
    return Path(given) if given else session.run.stage("teacher")


def _teacher_logits(session: Session, out: Path) -> Values:
    return dict(
        write_teacher_logits(
            session,
            teacher=_teacher_folder(session),
            teacher_id=session.digests["teacher"],
            imported=session.run.stage("import"),
            data=session.run.stage("data"),
            out=out,
        )
    )


def train_stage(stage: str, session: Session, out: Path, *, leg: Leg | None = None) -> Values:
    """One run of the training loop, by distillation or on the text alone.

    Args:
        stage: A key of `TRAININGS`.
        session: The running job.
        out: The stage's working folder.
        leg: The part of a distillation to do; None does all of it.
    """
    training, run = TRAININGS[stage], session.run
    start = StartingPoint(run.stage(training.start or "prune"), random_weights=training.start is None)
    settings, data = settings_of(session.config, stage), run.stage("data")
    if training.distills:
        taught = session.config.distill.teacher
        teacher, teacher_id = _teacher_folder(session), None
        if taught.source is TeacherSource.cached:
            teacher = Path(taught.cache) if taught.cache else run.stage("teacher_logits")
            teacher_id = session.digests["teacher"]
        summary = distill(
            session,
            stage=stage,
            teacher=teacher,
            teacher_id=teacher_id,
            start=start,
            settings=settings,
            data=data,
            out=out,
            leg=leg,
        )
    else:
        summary = train_on_text(session, stage=stage, start=start, settings=settings, data=data, out=out)
    return dict(summary)


def _report(session: Session, out: Path) -> Values:
    if session.is_main:
        from minitron.report.write import write_report

        importance = _arrays(session, Scores.load(_scores_folder(session)))
        # This stage's process is alone; the page shows the layout that the others had.
        whole = load_resolved(session.run.path / RESOLVED_FILE)
        write_report(session.run, out, importance, to_yaml(replace(session.config, parallel=whole.parallel)))
    return {}


def _ablation(session: Session, out: Path) -> Values:
    if not session.is_main:
        return {}
    from minitron.report.ablation import write_ablation

    ablation = write_ablation(session.run, session.config, out)
    return {"token_saving": ablation.saving.text}
