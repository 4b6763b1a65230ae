"""The training loop: step, metrics, validation, checkpoint, until the tokens are used up."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from minitron.config.train import TrainConfig
from minitron.data.batch import Batch
from minitron.data.loader import TrainBatches
from minitron.errors import StoppedError
from minitron.parallel.groups import Groups
from minitron.runtime.progress import StageProgress
from minitron.runtime.tracking import MetricsWriter
from minitron.train.heldout import HeldoutLoss
from minitron.train.objective import Objective
from minitron.train.optim import Trainable
from minitron.train.state import load_state, save_state
from minitron.train.step import fill_fp8_history, mean_terms, train_step


@dataclass(frozen=True)
class TrainJob:
    """Everything the loop works with.

    Attributes:
        trainable: Model, optimizer and schedule.
        objective: The training method.
        batches: Micro-batches of every step.
        validate: Held-out loss of the model as it is; called by all ranks together.
        train: Settings.
        seq_length: Tokens of a sequence.
        group_size: Most micro-batches whose signals are held at once (0: all of a step).
        states: Folder of checkpoints to resume from.
        open_metrics: Makes the metrics writer once the first step is known.
        progress: The stage's bar.
        groups: This rank's process groups.
        device: Where batches go.
        earlier: Where an earlier part of the run left its last checkpoint, to go on from; None starts afresh.
        stop_agreed: Asked by all ranks at the end of every step but the last: whether to stop (see `stop_agreement`).
    """

    trainable: Trainable
    objective: Objective
    batches: TrainBatches
    validate: Callable[[], HeldoutLoss]
    train: TrainConfig
    seq_length: int
    group_size: int
    states: Path
    open_metrics: Callable[[int], MetricsWriter]
    progress: StageProgress
    groups: Groups
    device: torch.device
    earlier: Path | None = None
    stop_agreed: Callable[[], bool] = lambda: False


def train(job: TrainJob) -> dict[str, float]:
    """Train to the end, from the newest checkpoint if there is one.

    The host waits for the device only where it reads something: on steps that log, validate or save.

    Returns:
        Step count, tokens and the last held-out loss.

    Raises:
        NumericsError: A gradient was not finite; nothing was saved since.
        StoppedError: The ranks agreed to stop; the state is saved.
    """
    step = load_state(job.trainable, job.states)
    if step == 0 and job.earlier is not None:
        step = load_state(job.trainable, job.earlier)
    if step == 0:
        fill_fp8_history(job.trainable, job.objective, partial(_microbatches, job, 0), group_size=job.group_size)
    with job.open_metrics(step + 1) as metrics:
        return _train_on(job, step, metrics)


def _train_on(job: TrainJob, step: int, metrics: MetricsWriter) -> dict[str, float]:
    settings, num_steps = job.train, job.batches.num_steps
    clock, clock_step = time.monotonic(), step
    heldout = HeldoutLoss(float("nan"), 0)
    if step == num_steps:
        heldout = job.validate()
    while step < num_steps:
        lr = job.trainable.lr
        output = train_step(
            job.trainable,
            job.objective,
            _microbatches(job, step),
            group_size=job.group_size,
            clip_grad=settings.clip_grad,
        )
        step += 1
        last = step == num_steps
        validates = last or _every(settings.eval_interval_steps, step)
        stops = not last and job.stop_agreed()
        saves = stops or (not last and _every(settings.save_interval_steps, step))
        logs = last or validates or _every(settings.log_interval_steps, step)
        if logs or saves:
            job.trainable.guard.check()
        if logs:
            values = {**mean_terms(output.terms, job.groups), "grad_norm": output.grad_norm.item()}
            now = time.monotonic()
            speed = (step - clock_step) * settings.tokens_per_step(job.seq_length) / (now - clock)
            if validates:
                heldout = job.validate()
                values["heldout_loss"] = heldout.loss
            tokens = step * settings.tokens_per_step(job.seq_length)
            metrics.write(step, {**values, "lr": lr, "tokens": tokens, "tokens_per_s": speed})
            job.progress.update(step, num_steps, loss=values["loss"], tokens_per_s=speed)
            clock, clock_step = time.monotonic(), step
        if saves:
            saving = time.monotonic()
            save_state(job.trainable, job.states, step=step)
            clock += time.monotonic() - saving
        if stops:
            raise StoppedError(f"stopped after step {step} of {num_steps}, saved; the same command goes on from there")
    tokens = step * settings.tokens_per_step(job.seq_length)
    return {"steps": step, "tokens": tokens, "heldout_loss": heldout.loss, "heldout_tokens": heldout.num_tokens}


def _microbatches(job: TrainJob, step: int) -> list[Batch]:
    return [batch.on_rank(job.groups, job.device) for batch in job.batches.microbatches(step)]


def _every(interval: int, step: int) -> bool:
    return interval > 0 and step % interval == 0
