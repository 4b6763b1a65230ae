"""Losses between intermediate states, computed where the student's state is and added to its gradient there.

The student runs in Megatron's plain schedule. Where it computes a matched state, a hook computes the loss against the
teacher's state of the signal and hands the student's state on unchanged, through an autograd function whose backward
pass lets the loss's gradient flow beside that of the layers above. So no state of the student travels, whatever stage
it is on. What its gradient is multiplied by need not be known before the backward pass: with `Mixing.scaled` it is
weight x |L_logits| / L_is of the micro-batch, for which the stages send their share of L_is to the last one and get the
factor back (`minitron.distill.balance`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from minitron.config.intermediate import IntermediateConfig, Match, State, StateKind, find_matches, log_names
from minitron.config.mixing import Mixing
from minitron.config.model import ModelConfig
from minitron.config.parallel import ParallelConfig, layers_per_stage
from minitron.data.batch import Batch
from minitron.distill.balance import Channels, factor_to_size, open_channels
from minitron.distill.hidden_losses import hidden_loss, relation_loss
from minitron.distill.projection import Projection, attach
from minitron.distill.states import Layout, TeacherStates, see_state, split_qkv
from minitron.parallel.groups import Groups


@dataclass
class _Microbatch:
    """The losses of one micro-batch on this stage.

    Attributes:
        states: The teacher's states.
        weights_SB: Weights of this rank's part of the sequence, for hidden states.
        all_weights_SB: Weights of the whole sequence.
        scale: Share of this micro-batch in the step's mean.
        losses: Of each pair, and over this rank's part alone where ranks see parts.
        total: Sum over pairs and tensor-parallel ranks.
        alpha: What `total` is multiplied by; None until it is known.
        seen: Pairs whose loss was computed.
    """

    states: Mapping[str, Tensor]
    weights_SB: Tensor
    all_weights_SB: Tensor
    scale: float
    losses: dict[Match, Tensor] = field(default_factory=dict)
    total: Tensor | None = None
    alpha: Tensor | None = None
    seen: int = 0


class IntermediateLosses:
    """The intermediate losses of a student's stage.

    Args:
        gpt: This rank's part of the student; it gets hooks, which do nothing outside of `watch`.
        matches: All pairs; those of other stages are left to these.
        config: Kinds and weight.
        models: Architectures of the teacher and of the student.
        groups: This rank's process groups.
        sequence_parallel: Whether hidden states are split along the sequence.
        student_stages: Layers of each of the student's stages.
        projection: From the student's width to the teacher's; None where they are the same.
        channels: To the other stages, where `Mixing.scaled` needs them.
    """

    def __init__(
        self,
        gpt: GPTModel,
        matches: Sequence[Match],
        config: IntermediateConfig,
        *,
        models: tuple[ModelConfig, ModelConfig],
        groups: Groups,
        sequence_parallel: bool,
        student_stages: Sequence[int],
        projection: Projection | None,
        channels: Channels | None,
    ) -> None:
        self._config = config
        self._models = models
        self._groups = groups
        self._sequence_parallel = sequence_parallel
        self._projection = projection
        self._channels = channels
        self._now: _Microbatch | None = None
        self._last: _Microbatch | None = None
        self._sums: dict[str, Tensor] = {}
        self._sends: list[tuple[dist.Work | None, Tensor]] = []
        self._names = log_names(matches)
        self._mine = [m for m in matches if m.student.stage(student_stages) == groups.pp_rank]
        for match in self._mine:
            see_state(gpt, match.student, partial(self._see, match))
        if projection is not None and all(m.student.kind is StateKind.attention_relations for m in self._mine):
            first = State(StateKind.mlp_input, gpt.decoder.layers[0].layer_number - 1)
            see_state(gpt, first, self._touch)

    @contextmanager
    def watch(self, batch: Batch, states: Mapping[str, Tensor], scale: float) -> Iterator[None]:
        """Compute the losses of the micro-batch whose forward pass runs inside the block.

        Args:
            batch: The micro-batch.
            states: The teacher's states by name.
            scale: Share of this micro-batch in the step's mean: what the schedule multiplies the logit loss by.
        """
        all_weights_SB = (batch.loss_mask_BS / batch.loss_mask_BS.sum().clamp_min(1.0)).transpose(0, 1)
        weights_SB = all_weights_SB
        if self._sequence_parallel:
            weights_SB = all_weights_SB.chunk(self._groups.tp.size())[self._groups.tp_rank]
        self._now = now = _Microbatch(states, weights_SB, all_weights_SB, scale)
        try:
            yield
        finally:
            self._now = None
        assert now.seen == len(self._mine), "a forward pass without gradients (recomputed later) has no losses"
        self._add_up(now)
        if self._config.mixing is Mixing.fixed:
            self._settle(now, torch.full_like(_total(now, all_weights_SB), self._config.weight))
        elif self._mine and not self._groups.is_last_stage:
            assert self._channels is not None
            assert now.total is not None
            self._sends.append((self._channels.send_up(now.total), now.total))
        if self._groups.is_last_stage:  # `balance` lets it go; elsewhere it would hold the teacher's states
            self._last = now

    def balance(self, logit_loss: Tensor) -> None:
        """Fix the factor of the micro-batch that was watched last; on the last stage, before its backward pass.

        Args:
            logit_loss: Its loss of logits, detached.
        """
        now = self._last
        assert now is not None
        self._last = None  # it holds the teacher's states
        if self._config.mixing is Mixing.fixed:
            return
        total = _total(now, logit_loss)
        if self._channels is not None:
            total = total + torch.stack(self._channels.receive_up(total)).sum()
        alpha = self._config.weight * factor_to_size(total, logit_loss)
        self._settle(now, alpha)
        self._add("alpha", alpha)
        if self._channels is not None:
            self._sends += [(work, alpha) for work in self._channels.send_down(alpha)]

    def drain(self) -> dict[str, Tensor]:
        """This stage's share of the losses, summed over the micro-batches since the last call.

        Each pair's has the name of `log_names`; ``loss`` is the weighted sum of the others, ``alpha`` (on the last
        stage) the weight where it is dynamic.
        """
        for work, _ in self._sends:
            assert work is not None
            work.wait()
        self._sends = []
        self._last = None
        sums, self._sums = self._sums, {}
        return sums

    def _see(self, match: Match, carrier: Tensor, student: Tensor) -> Tensor:
        """Hook at a state of the student."""
        now = self._now
        if now is None or not torch.is_grad_enabled():
            return carrier
        now.seen += 1
        teacher = now.states[match.teacher.name]
        if match.student.kind is StateKind.attention_relations:
            loss = self._relations(teacher, student, now.all_weights_SB)
        else:
            if self._projection is not None:
                student = self._projection(student)
            loss = hidden_loss(self._config.loss, teacher, student, now.weights_SB)
        now.losses[match] = loss.detach()
        carried: Tensor = _WithLoss.apply(carrier, loss, partial(self._factor, now))  # type: ignore[no-untyped-call]
        return carried

    def _touch(self, carrier: Tensor, _state: Tensor) -> Tensor:
        """Hook that gives the projection a gradient of zero on a stage that does not use it.

        Megatron's overlapped reduction waits for the gradient of every parameter.
        """
        if self._now is None or self._projection is None:
            return carrier
        loss = self._projection.weight.sum()
        carried: Tensor = _WithLoss.apply(carrier, loss, lambda: torch.zeros_like(loss))  # type: ignore[no-untyped-call]
        return carried

    def _relations(self, teacher_SBX: Tensor, student_SBX: Tensor, weights_SB: Tensor) -> Tensor:
        """Mean over relation heads; this rank's heads are a part of them."""
        heads = self._config.relation_heads
        pairs = zip(split_qkv(teacher_SBX, self._models[0]), split_qkv(student_SBX, self._models[1]), strict=True)
        losses = [relation_loss(t, s, weights_SB, heads=heads // self._groups.tp.size()) for t, s in pairs]
        return torch.stack(losses).sum() / heads

    def _add_up(self, now: _Microbatch) -> None:
        """Sum parts over the tensor-parallel ranks; keep the values for the log."""
        if not now.losses:
            return
        size = self._groups.tp.size()
        relations = StateKind.attention_relations
        is_part = [self._sequence_parallel or match.student.kind is relations for match in now.losses]
        summed = any(is_part) and size > 1
        shares = zip(now.losses.values(), is_part, strict=True)
        values = torch.stack([loss if part or not summed else loss / size for loss, part in shares])
        if summed:
            dist.all_reduce(values, group=self._groups.tp)
        for match, value in zip(now.losses, values, strict=True):
            self._add(self._names[match], value)
        now.total = values.sum()

    def _factor(self, now: _Microbatch) -> Tensor:
        """What the gradient of a micro-batch's losses is multiplied by; asked for in its backward pass."""
        if now.alpha is None:
            assert self._channels is not None
            assert now.total is not None
            self._settle(now, self._channels.receive_down(now.total))
        assert now.alpha is not None
        return now.alpha * now.scale

    def _settle(self, now: _Microbatch, alpha: Tensor) -> None:
        now.alpha = alpha
        if now.total is not None:
            self._add("loss", alpha * now.total)

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value


def _total(now: _Microbatch, like: Tensor) -> Tensor:
    return now.total if now.total is not None else torch.zeros((), dtype=torch.float32, device=like.device)


class _WithLoss(torch.autograd.Function):
    """Hands a tensor on unchanged; in the backward pass a loss beside it gets its gradient."""

    @staticmethod
    def forward(ctx: Any, carrier: Tensor, _loss: Tensor, factor: Callable[[], Tensor]) -> Tensor:
        ctx.factor = factor
        return carrier

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        return grads[0], ctx.factor(), None


@contextmanager
def intermediate_losses(
    config: IntermediateConfig,
    parallel: ParallelConfig,
    groups: Groups,
    *,
    teacher: tuple[GPTModel, ModelConfig],
    student: tuple[GPTModel, ModelConfig],
    seed: int,
    device: torch.device,
) -> Iterator[tuple[TeacherStates, IntermediateLosses]]:
    """Pair a teacher and a student in one layout, before the student is wrapped for training.

    Where their widths differ the student gets a `Projection`.

    Args:
        config: Which states.
        parallel: The layout of both.
        groups: This rank's process groups.
        teacher: The teacher's part on this rank, and its architecture.
        student: The student's part on this rank, and its architecture.
        seed: Seed of the projection.
        device: Where the models are.

    Raises:
        ConfigError: A pair does not fit the models.
    """
    matches = find_matches(config, teacher[1], student[1], parallel)
    split, dtype = parallel.sequence_parallel, student[0].config.params_dtype
    projection = None
    if teacher[1].hidden_size != student[1].hidden_size and any(
        match.student.kind is not StateKind.attention_relations for match in matches
    ):
        projection = Projection(student[1], teacher[1], groups, seed=seed, dtype=dtype, sequence_parallel=split)
        attach(projection.to(device), student[0])
    last = groups.pp.size() - 1
    student_stages = layers_per_stage(student[1].num_layers, parallel)
    teacher_stages = layers_per_stage(teacher[1].num_layers, parallel.plain())
    stages = {match.student.stage(student_stages) for match in matches} - {last}
    sources = tuple(sorted(stages)) if config.mixing is Mixing.scaled else ()
    layout = Layout(teacher[1], split, teacher[0].config.params_dtype)
    with open_channels(groups, sources, device) as channels:
        losses = IntermediateLosses(
            student[0],
            matches,
            config,
            models=(teacher[1], student[1]),
            groups=groups,
            sequence_parallel=split,
            student_stages=student_stages,
            projection=projection,
            channels=channels,
        )
        states = TeacherStates(
            teacher[0], layout, matches, groups, teacher_stages=teacher_stages, student_stages=student_stages
        )
        yield states, losses
