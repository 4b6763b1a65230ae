"""What the ranks of the multi-process tests run. Imports no transformers: workers import this file."""

import contextlib
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from rich.console import Console
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from minitron.compat.cpu import CPU_LAYER
from minitron.config.model import Architecture, ModelConfig
from minitron.config.parallel import ParallelConfig
from minitron.config.precision import PrecisionConfig
from minitron.config.run import Device, TrackingConfig
from minitron.config.train import TrainConfig
from minitron.data.batch import Batch
from minitron.errors import NumericsError
from minitron.models.gpt import FinalState, build_gpt
from minitron.parallel.groups import Groups, model_parallel
from minitron.runtime.progress import StageProgress
from minitron.runtime.tracking import MetricsWriter
from minitron.train.guard import grad_norm
from minitron.train.heldout import heldout_loss
from minitron.train.loop import TrainJob, train
from minitron.train.objective import CrossEntropy, Loss
from minitron.train.optim import Trainable, make_trainable
from minitron.train.step import accumulate_gradients, train_step
from tests.helpers.batch import batch_of

MODEL = ModelConfig(
    architecture=Architecture.llama,
    num_layers=2,
    hidden_size=16,
    ffn_hidden_size=32,
    num_attention_heads=2,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=34,
    max_position_embeddings=32,
    layernorm_epsilon=1e-6,
    rotary_base=10000.0,
    share_embeddings_and_output_weights=True,
)
SEQ_LENGTH, MICROBATCHES = 8, 2


@contextlib.contextmanager
def _trainable(parallel: ParallelConfig, settings: TrainConfig) -> Iterator[tuple[Trainable, Groups]]:
    CPU_LAYER.apply()
    try:
        with model_parallel(parallel, seed=1) as groups:
            torch.manual_seed(5 + groups.pp_rank)
            gpt = build_gpt(MODEL, parallel, PrecisionConfig(), groups, device=Device.cpu, initialize=True)
            yield make_trainable(gpt, settings, parallel, groups, seq_length=SEQ_LENGTH), groups
    finally:
        CPU_LAYER.undo()


def _settings(num_steps: int, parallel: ParallelConfig, **values: Any) -> TrainConfig:
    batch = MICROBATCHES * parallel.data_parallel_size
    return TrainConfig(num_tokens=num_steps * batch * SEQ_LENGTH, global_batch_size=batch, lr=1e-2, **values)


def _microbatches(step: int, dp_rank: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(100 * step + dp_rank)
    ids = torch.randint(MODEL.vocab_size, (MICROBATCHES, 1, SEQ_LENGTH + 1), generator=generator)
    return [batch_of(ids_BT) for ids_BT in ids]


@dataclass(frozen=True)
class Clipped:
    """Norm and gradients after clipping: ours, and Megatron's from the same gradients."""

    norm: float
    megatron_norm: float
    grads: list[Tensor]
    megatron_grads: list[Tensor]


def clip(parallel: ParallelConfig, clip_grad: float) -> Clipped:
    """One step's gradients, clipped by us (through a step) and by Megatron (on copies)."""
    settings = _settings(1, parallel)
    with _trainable(parallel, settings) as (trainable, groups):
        objective = CrossEntropy(MODEL.vocab_size, groups, sequence_parallel=False)
        accumulate_gradients(trainable, objective, _microbatches(0, groups.dp_rank), group_size=0)
        optimizer = trainable.optimizer
        optimizer.prepare_grads()
        norm, megatron_norm = grad_norm(optimizer).item(), float(optimizer.get_grad_norm())
        copies = [torch.nn.Parameter(p.detach().clone()) for p in optimizer.get_parameters()]
        for copy, parameter in zip(copies, optimizer.get_parameters(), strict=True):
            copy.grad = parameter.grad.detach().clone()
        clip_grad_by_total_norm_fp32(copies, clip_grad, megatron_norm)
        trainable.guard.update(optimizer, step=1, clip_grad=clip_grad)
        grads = [parameter.grad.clone() for parameter in optimizer.get_parameters()]
    return Clipped(norm, megatron_norm, grads, [copy.grad for copy in copies])


@dataclass
class Poisoned:
    """Cross-entropy whose loss is infinite in one step, on one data-parallel rank."""

    inner: CrossEntropy
    bad_step: int
    step: int = 0

    def signals(self, microbatches: Sequence[Batch]) -> Sequence[object]:
        self.step += 1
        return [None] * len(microbatches)

    def watch(self, batch: Batch, signal: object, scale: float) -> contextlib.AbstractContextManager[None]:
        return self.inner.watch(batch, signal, scale)

    def drain(self) -> dict[str, Tensor]:
        return self.inner.drain()

    def loss(self, state: FinalState, batch: Batch, signal: object) -> Loss:
        loss = self.inner.loss(state, batch, signal)
        bad = self.step == self.bad_step and self.inner.groups.dp_rank == 0
        return Loss(loss.total * math.inf if bad else loss.total, loss.terms)


@dataclass
class Poison:
    """Weights after every step of a run whose second step is bad, and what the look afterwards says."""

    weights: list[Tensor] = field(default_factory=list)
    error: str = ""


def poisoned_steps(parallel: ParallelConfig) -> Poison:
    result = Poison()
    settings = _settings(4, parallel)
    with _trainable(parallel, settings) as (trainable, groups):
        objective = Poisoned(CrossEntropy(MODEL.vocab_size, groups, sequence_parallel=False), bad_step=2)
        for step in range(4):
            train_step(trainable, objective, _microbatches(step, groups.dp_rank))
            result.weights.append(torch.cat([p.detach().flatten().clone() for p in trainable.gpt.parameters()]))
        try:
            trainable.guard.check()
        except NumericsError as error:
            result.error = str(error)
    return result


PASSED_OVER = ("/torch/", "compat/cpu.py")
"""Files whose frames say nothing about who reads a tensor."""


class Waits(TorchFunctionMode):
    """Records where the host reads a tensor's value, which on a GPU waits for the device."""

    READS = frozenset(
        getattr(Tensor, name)
        for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "nonzero")
    )

    def __init__(self) -> None:
        super().__init__()
        self.step = 0
        self.places: dict[int, set[str]] = defaultdict(set)
        self.dispatch = _DispatchedReads(self.record)

    def record(self) -> None:
        frame = sys._getframe(2)
        while frame is not None and any(part in frame.f_code.co_filename for part in (*PASSED_OVER, __file__)):
            frame = frame.f_back
        assert frame is not None
        self.places[self.step].add(f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.READS:
            self.record()
        return func(*args, **(kwargs or {}))

    def synchronize(self, *_args: object) -> None:
        self.record()

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        synchronize, torch.cuda.synchronize = torch.cuda.synchronize, self.synchronize
        try:
            with self, self.dispatch:
                yield
        finally:
            torch.cuda.synchronize = synchronize


class _DispatchedReads(TorchDispatchMode):
    """Catches the reads that C++ makes: the value of a tensor, or a shape that depends on values."""

    READS = frozenset(
        getattr(torch.ops.aten, name) for name in ("_local_scalar_dense", "nonzero", "masked_select", "equal")
    )

    def __init__(self, record: Callable[[], None]) -> None:
        super().__init__()
        self.on_read = record

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in self.READS:
            self.on_read()
        return func(*args, **(kwargs or {}))


@dataclass
class _Batches:
    """Stands in the loop for the data folder."""

    num_steps: int
    groups: Groups
    waits: Waits

    def microbatches(self, step: int) -> list[Batch]:
        self.waits.step = step + 1
        return _microbatches(step, self.groups.dp_rank)


def loop(
    parallel: ParallelConfig, folder: Path, *, bad_step: int = 0, num_steps: int, log: int, save: int
) -> tuple[dict[int, set[str]], str]:
    """Run the training loop; the places where the host waited, by step, and the error that ended it."""
    settings = _settings(num_steps, parallel, log_interval_steps=log, save_interval_steps=save, eval_interval_steps=0)
    waits, error = Waits(), ""
    with _trainable(parallel, settings) as (trainable, groups):
        cross_entropy = CrossEntropy(MODEL.vocab_size, groups, sequence_parallel=False)
        heldout = _microbatches(1000, groups.dp_rank)
        is_main = groups.world_rank == 0
        job = TrainJob(
            trainable=trainable,
            objective=Poisoned(cross_entropy, bad_step),
            batches=_Batches(num_steps, groups, waits),  # type: ignore[arg-type]
            validate=lambda: heldout_loss(trainable.gpt, heldout, cross_entropy, groups),
            train=settings,
            seq_length=SEQ_LENGTH,
            group_size=0,
            states=folder,
            open_metrics=lambda first: MetricsWriter(
                folder, TrackingConfig(), run_name="t", config={}, first_step=first, enabled=is_main
            ),
            progress=StageProgress("t", enabled=False, console=Console()),
            groups=groups,
            device=torch.device("cpu"),
        )
        try:
            with waits.recording():
                train(job)
        except NumericsError as caught:
            error = str(caught)
    return dict(waits.places), error
