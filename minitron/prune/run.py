"""The score and prune stages."""

import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoTokenizer

from minitron.checkpoint.folder import read_model_config, side_dir
from minitron.config.depth import depth_plan
from minitron.config.families import check_family
from minitron.config.model import ModelConfig
from minitron.config.prune import HeadResidual, check_target
from minitron.config.score import DepthMetric
from minitron.data.batch import Batch
from minitron.data.loader import FixedBatches, calibration_batches
from minitron.models.load import load_gpt
from minitron.prune.calibration import score_model
from minitron.prune.depth import measure_depth
from minitron.prune.given import load_given
from minitron.prune.questions import QuestionSheet, question_sheet, read_questions
from minitron.prune.ranking import choose, choose_for
from minitron.prune.reconstruct import Reconstruction, reconstruction
from minitron.prune.rounds import score_in_rounds
from minitron.prune.scores import Scores
from minitron.prune.slicer import apply_spec
from minitron.prune.spec import PruneSpec
from minitron.prune.summary import check_parameters, describe, scores_kept
from minitron.runtime.progress import StageProgress
from minitron.runtime.session import Session

SPEC_FILE = "prune_spec.json"
_ROUNDS = "rounds"


def score(session: Session, *, model: Path, source_id: str, data: Path, out: Path) -> dict[str, int]:
    """Calibration passes, forward only; every aggregation asked for is saved, so another target needs no new pass.

    Args:
        session: The running job.
        model: Checkpoint folder of the model to score.
        source_id: Identity of its weights, kept with the scores.
        data: The data folder; calibration sequences come from its training split.
        out: The stage's working folder.
    """
    with session.context_as_data() as whole:  # hooks see whole sequences
        stage = _ScoreStage(whole, source_id, data)
        if session.config.score.rounds == 1:
            scores = stage.score(model, depth=True)
        else:
            scores = _in_rounds(stage, model, out / _ROUNDS)
    if session.is_main:
        scores.save(out)
    return {"samples": scores.num_samples, "tokens": scores.num_samples * scores.seq_length}


@dataclass(frozen=True)
class _ScoreStage:
    """What every pass of a score stage has in common."""

    session: Session
    source_id: str
    data: Path

    def score(self, folder: Path, *, depth: bool) -> Scores:
        """Score one checkpoint folder.

        Args:
            folder: The model.
            depth: Whether to measure what ``score.depth`` and ``prune`` ask for as well.
        """
        session = self.session
        config, groups = session.config.score, session.groups
        gpt, architecture = load_gpt(folder, session, local_spec=True)
        with session.progress("score") as progress:
            scores = score_model(
                gpt,
                self._calibration(config.num_samples),
                model=architecture,
                config=config,
                groups=groups,
                source_id=self.source_id,
                on_progress=progress.update,
            )
        plan = depth_plan(config, session.config.prune, architecture.num_layers)
        if not (depth and plan.asks):
            return scores
        with session.progress("score depth") as progress:
            measured = measure_depth(
                gpt,
                self._calibration(config.depth.num_samples) if plan.on_text else [],
                plan,
                model=architecture,
                groups=groups,
                questions=self._questions(folder, architecture) if DepthMetric.accuracy in plan.asks else None,
                on_progress=progress.update,
            )
        return replace(scores, depth=measured)

    def _calibration(self, num_samples: int) -> FixedBatches:
        config, groups = self.session.config, self.session.groups
        return calibration_batches(
            self.data,
            num_samples=num_samples,
            seq_length=config.score.seq_length or config.data.seq_length,
            micro_batch_size=config.score.micro_batch_size,
            dp_rank=groups.dp_rank,
            dp_size=groups.dp.size(),
            seed=config.seed,
        )

    def _questions(self, folder: Path, model: ModelConfig) -> QuestionSheet:
        config, groups = self.session.config.score, self.session.groups
        assert config.depth.questions is not None, "checked when composed"
        tokenizer = AutoTokenizer.from_pretrained(str(side_dir(folder)), local_files_only=True)
        return question_sheet(
            read_questions(Path(config.depth.questions)),
            lambda text: tokenizer.encode(text, add_special_tokens=False),
            micro_batch_size=config.micro_batch_size,
            max_length=model.longest_sequence,
            dp_rank=groups.dp_rank,
            dp_size=groups.dp.size(),
        )


def _in_rounds(stage: _ScoreStage, model: Path, scratch: Path) -> Scores:
    """Score in ``score.rounds`` rounds; the models in between lie in a folder that is removed."""
    session = stage.session
    config, groups = session.config, session.groups
    source = read_model_config(model)
    ranking = replace(config.prune, num_layers=None, drop_layers=None, head_residual=HeadResidual.none)

    def folder(done: int) -> Path:
        return scratch / str(done) if done else model

    def cut(done: int, scores: Scores, shape: ModelConfig) -> PruneSpec:
        spec = choose_for(shape, ranking, scores=scores, source_id=stage.source_id)
        rank, size = groups.world_rank, groups.world_size
        apply_spec(spec, source=folder(done - 1), out=folder(done), rank=rank, world_size=size)
        torch.distributed.barrier()
        return spec

    scores = score_in_rounds(
        source,
        check_target(source, config.prune),
        rounds=config.score.rounds,
        multiple_of=groups.tp.size(),
        score=lambda done: stage.score(folder(done), depth=done == 0),
        cut=cut,
    )
    torch.distributed.barrier()
    if session.is_main:
        shutil.rmtree(scratch)
    return scores


def prune(
    session: Session, *, model: Path, source_id: str, scores: Path | None, data: Path, out: Path
) -> dict[str, object]:
    """Choose what to keep, write it down as a spec, and slice the checkpoint with it, fitted where asked for.

    Args:
        session: The running job; all its ranks slice.
        model: Checkpoint folder of the source.
        source_id: Identity of its weights.
        scores: Folder of the scores; None with ``prune.ranking=random`` or ``prune.spec``.
        data: The data folder, whose training split gives the sequences to fit on; read by
            ``prune.reconstruct`` only.
        out: The stage's working folder; becomes a checkpoint folder with ``prune_spec.json``.

    Raises:
        PruneError: The target, the scores or the given spec are not of this source, or a setting is not for its family.
        CheckpointError: The result has not the parameters that were planned.
    """
    config, groups = session.config.prune, session.groups
    source = read_model_config(model)
    loaded = Scores.load(scores) if scores is not None else None
    if config.spec is None:
        spec = choose(source, config, scores=loaded, source_id=source_id)
    else:
        spec = load_given(Path(config.spec), source, source_id=source_id)
    check_family(source, spec.target, config, session.config.score)
    if session.is_main:
        spec.save(out / SPEC_FILE)
    with session.progress("prune") as progress, _fitted(session, spec, model, data, progress) as fitted:
        apply_spec(
            spec,
            source=model,
            out=out,
            rank=groups.world_rank,
            world_size=groups.world_size,
            fitted=fitted,
            on_progress=progress.update,
        )
    check_parameters(out, spec.target)
    if loaded is None:
        return describe(spec)
    width = loaded.for_aggregation(config.aggregation)
    hidden = loaded.channels(config.aggregation, config.hidden_norms)
    one_by_one = config.depth_metric is DepthMetric.block_importance and config.drop_layers is None
    layer = loaded.layer if one_by_one else None
    return describe(spec) | scores_kept(spec, ffn=width.ffn, head=width.head, hidden=hidden, layer=layer)


def _fitted(
    session: Session, spec: PruneSpec, model: Path, data: Path, progress: StageProgress
) -> AbstractContextManager[Reconstruction | None]:
    """What is fitted in place of slicing: nothing, where it is not asked for or nothing is cut."""
    config = session.config.prune.reconstruct
    if not config.enabled or spec.source == spec.target:
        return nullcontext()

    def batches(dp_rank: int, dp_size: int) -> Sequence[Batch]:
        return calibration_batches(
            data,
            num_samples=config.num_samples,
            seq_length=session.config.data.seq_length,
            micro_batch_size=config.micro_batch_size,
            dp_rank=dp_rank,
            dp_size=dp_size,
            seed=session.config.seed,
        )

    return reconstruction(
        spec,
        source=model,
        batches=batches,
        seq_length=session.config.data.seq_length,
        session=session,
        on_progress=progress.update,
    )
