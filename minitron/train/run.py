"""Train a model to the end and write it as a checkpoint folder; by cross-entropy, from any start."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from minitron.checkpoint.folder import copy_side_files, read_model_config, write_model_config
from minitron.checkpoint.model_io import save_model
from minitron.config.compose import flat_values
from minitron.config.model import ModelConfig
from minitron.config.train import TrainConfig
from minitron.data.loader import TrainBatches, heldout_batches
from minitron.models.gpt import Chunks
from minitron.models.load import load_gpt
from minitron.models.random_weights import write_random_weights
from minitron.runtime.session import Session
from minitron.runtime.signals import stop_agreement
from minitron.runtime.tracking import MetricsWriter
from minitron.train.heldout import HeldoutLoss, heldout_loss
from minitron.train.loop import TrainJob, train
from minitron.train.objective import CrossEntropy, Objective
from minitron.train.optim import make_trainable
from minitron.train.state import save_state

STATES_DIR = "states"
RANDOM_WEIGHTS_DIR = "random"


@dataclass(frozen=True)
class Leg:
    """A part of a training run, which keeps its one schedule whatever parts it is run in.

    Attributes:
        num_steps: Steps done at its end; before the schedule's end a checkpoint to go on from is left instead of a
            model.
        earlier: Where the part before left its checkpoint; None where there is none, or it is gone: the same steps
            are then taken from the start.
    """

    num_steps: int
    earlier: Path | None = None


def train_to_folder(
    session: Session,
    *,
    stage: str,
    gpt: Chunks,
    model: ModelConfig,
    objective: Objective,
    settings: TrainConfig,
    data: Path,
    side_files_of: Path,
    out: Path,
    group_size: int = 0,
    leg: Leg | None = None,
) -> dict[str, float]:
    """Train and leave a checkpoint folder.

    Args:
        session: The running job.
        stage: Name for the bar and the trackers.
        gpt: The model, its weights in place.
        model: Its architecture.
        objective: The training method.
        settings: Batch, schedule, optimizer.
        data: The data folder.
        side_files_of: Checkpoint folder whose tokenizer and other side files go with the model.
        out: The stage's working folder; holds the checkpoints to resume from until the end.
        group_size: Most micro-batches whose signals are held at once.
        leg: The part of the run to do; None does all of it.

    Returns:
        Step count, tokens and final held-out loss.
    """
    config, groups, seq_length = session.config, session.groups, session.config.data.seq_length
    whole = settings.num_steps(seq_length)
    leg = leg or Leg(whole)
    trainable = make_trainable(gpt, settings, config.parallel, groups, seq_length=seq_length)
    batches = TrainBatches(
        data,
        seq_length=seq_length,
        micro_batch_size=settings.micro_batch_size,
        global_batch_size=settings.global_batch_size,
        dp_rank=groups.dp_rank,
        dp_size=groups.dp.size(),
        seed=config.seed,
        num_steps=leg.num_steps,
    )
    with session.progress(stage) as progress, stop_agreement() as stop_agreed:
        summary = train(
            TrainJob(
                trainable=trainable,
                objective=objective,
                batches=batches,
                validate=_validation(session, gpt, model, settings, data),
                train=settings,
                seq_length=seq_length,
                group_size=group_size,
                states=out / STATES_DIR,
                earlier=leg.earlier,
                open_metrics=partial(_metrics, session, stage, out),
                progress=progress,
                groups=groups,
                device=session.torch_device,
                stop_agreed=stop_agreed,
            )
        )
    if leg.num_steps < whole:
        save_state(trainable, out / STATES_DIR, step=leg.num_steps)
        return summary
    save_model(gpt, out)
    if session.is_main:
        write_model_config(out, model)
        copy_side_files(side_files_of, out)
        shutil.rmtree(out / STATES_DIR, ignore_errors=True)  # last: until here an interrupted run goes on from them
    return summary


def _validation(
    session: Session, gpt: Chunks, model: ModelConfig, settings: TrainConfig, data: Path
) -> Callable[[], HeldoutLoss]:
    """Held-out loss of the model as it is at the time."""
    groups = session.groups
    heldout = heldout_batches(
        data,
        seq_length=session.config.data.seq_length,
        micro_batch_size=settings.micro_batch_size,
        dp_rank=groups.dp_rank,
        dp_size=groups.dp.size(),
        max_tokens=settings.eval_tokens,
    )
    cross_entropy = CrossEntropy(model.vocab_size, groups, session.config.parallel.sequence_parallel)
    return lambda: heldout_loss(
        gpt, [batch.on_rank(groups, session.torch_device) for batch in heldout], cross_entropy, groups
    )


@dataclass(frozen=True)
class StartingPoint:
    """The model that a training run starts from.

    Attributes:
        folder: Checkpoint folder: weights and architecture, or the architecture alone.
        random_weights: Draw the weights instead of loading them: a run from scratch.
    """

    folder: Path
    random_weights: bool = False

    def load(self, session: Session, out: Path) -> tuple[Chunks, ModelConfig]:
        """This rank's part of the model, and its architecture.

        Args:
            session: The running job.
            out: The stage's working folder; random weights are written there and removed when they are loaded.
        """
        config = session.config
        if not self.random_weights:
            return load_gpt(self.folder, session, parallel=config.parallel, precision=config.precision)
        folder, model = out / RANDOM_WEIGHTS_DIR, read_model_config(self.folder)
        if session.is_main:
            shutil.rmtree(folder, ignore_errors=True)  # a killed run's
        torch.distributed.barrier()
        rank, world_size = session.groups.world_rank, session.groups.world_size
        write_random_weights(model, folder, seed=config.seed, rank=rank, world_size=world_size)
        loaded = load_gpt(folder, session, parallel=config.parallel, precision=config.precision)
        torch.distributed.barrier()
        if session.is_main:
            shutil.rmtree(folder)
        return loaded


def train_on_text(
    session: Session, *, stage: str, start: StartingPoint, settings: TrainConfig, data: Path, out: Path
) -> dict[str, float]:
    """Cross-entropy: the controls of a distillation, and the correction of a teacher.

    Args:
        session: The running job.
        stage: Name for the bar and the trackers.
        start: What to train.
        settings: Batch, schedule, optimizer.
        data: The data folder.
        out: The stage's working folder.
    """
    gpt, model = start.load(session, out)
    return train_to_folder(
        session,
        stage=stage,
        gpt=gpt,
        model=model,
        objective=CrossEntropy(model.vocab_size, session.groups, session.config.parallel.sequence_parallel),
        settings=settings,
        data=data,
        side_files_of=start.folder,
        out=out,
    )


def _metrics(session: Session, stage: str, out: Path, first_step: int) -> MetricsWriter:
    return MetricsWriter(
        out,
        session.config.tracking,
        run_name=f"{session.config.name}-{stage}",
        config=flat_values(session.config, "run"),
        first_step=first_step,
        enabled=session.is_main,
    )
