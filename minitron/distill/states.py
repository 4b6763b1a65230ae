"""Intermediate states of a Megatron model: where they are seen, and how a teacher's reach the student's stage."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from minitron.config.intermediate import Match, State, StateKind, relation_widths
from minitron.config.model import ModelConfig
from minitron.data.batch import Batch
from minitron.parallel.groups import Groups

See = Callable[[Tensor, Tensor], Tensor]
"""Gets what a module hands on, and the state seen there (often the same tensor); returns what to hand on instead."""


def see_state(gpt: GPTModel, state: State, see: See) -> RemovableHandle:
    """Watch one state of a model, on the stage that holds it.

    Hidden states are seen after the norm of the block that reads them (the papers: "always post LayerNorm"). So the
    output of block k is seen at block k + 1, on whose pipeline stage that may be, or at the final norm. Queries, keys
    and values are seen before the rotary embedding (and before a norm of their own), as one tensor in Megatron's fused
    order (see `split_qkv`).

    Args:
        gpt: This rank's part of the model.
        state: The state; its reader must be on this stage.
        see: Called in every forward pass.

    Returns:
        A handle that stops the watching.
    """
    layers = {layer.layer_number - 1: layer for layer in gpt.decoder.layers}
    if state.kind is StateKind.attention_relations:
        return _watch(layers[state.layer].self_attention.linear_qkv, see)
    if state.reader not in layers:
        assert state.reader == gpt.config.num_layers, (state, sorted(layers))
        return _watch(gpt.decoder.final_layernorm, see)
    layer = layers[state.reader]
    before_mlp = state.kind is StateKind.mlp_input
    norm = layer.pre_mlp_layernorm if before_mlp else layer.input_layernorm
    if isinstance(norm, IdentityOp):  # Transformer Engine fuses the norm into the linear: it is done once more here
        linear = layer.mlp.linear_fc1 if before_mlp else layer.self_attention.linear_qkv
        see = partial(_see_normed, see, linear, gpt.config)
    return _watch(norm, see)


def _watch(module: nn.Module | None, see: See) -> RemovableHandle:
    assert module is not None
    return module.register_forward_hook(partial(_hook, see))


def _hook(see: See, _module: nn.Module, _args: object, output: Any) -> Any:
    if isinstance(output, tuple):
        return (see(output[0], output[0]), *output[1:])
    return see(output, output)


def _see_normed(see: See, linear: Any, config: TransformerConfig, carrier: Tensor, state_SBH: Tensor) -> Tensor:
    # Wide as in Transformer Engine's kernel: 1 + a small weight has no room in bf16.
    wide_SBH = state_SBH.to(torch.promote_types(state_SBH.dtype, torch.float32))
    weight_H = linear.layer_norm_weight.to(wide_SBH.dtype) + (1 if config.layernorm_zero_centered_gamma else 0)
    shape, epsilon = state_SBH.shape[-1:], config.layernorm_epsilon
    if config.normalization == "RMSNorm":
        normed_SBH = F.rms_norm(wide_SBH, shape, weight_H, epsilon)
    else:
        normed_SBH = F.layer_norm(wide_SBH, shape, weight_H, linear.layer_norm_bias.to(wide_SBH.dtype), epsilon)
    return see(carrier, normed_SBH.to(state_SBH.dtype))


def split_qkv(qkv_SBX: Tensor, model: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of this rank's heads, heads side by side in the last dimension."""
    channels = model.kv_channels
    sizes = [model.heads_per_group * channels, channels, channels]
    q_SBGX, k_SBGX, v_SBGX = qkv_SBX.unflatten(-1, (-1, sum(sizes))).split(sizes, dim=-1)
    return q_SBGX.flatten(2), k_SBGX.flatten(2), v_SBGX.flatten(2)


@dataclass(frozen=True)
class Layout:
    """How a model's states are laid out: what a rank must know of states that it does not hold.

    Attributes:
        model: The architecture.
        sequence_parallel: Whether hidden states are split along the sequence.
        dtype: Number format of the states.
    """

    model: ModelConfig
    sequence_parallel: bool
    dtype: torch.dtype

    def shape(self, state: State, batch: Batch, tp_size: int) -> tuple[int, int, int]:
        """Shape of a state on one rank."""
        size, length = batch.tokens_BS.shape
        if state.kind is StateKind.attention_relations:
            return length, size, sum(relation_widths(self.model)) // tp_size
        return length // (tp_size if self.sequence_parallel else 1), size, self.model.hidden_size


class TeacherStates:
    """Records a teacher's states in its forward pass, and sends them to the stages of the student that need them.

    Args:
        gpt: This rank's part of the teacher.
        layout: How its states are laid out.
        matches: All pairs.
        groups: This rank's process groups.
        teacher_stages: Layers of each of the teacher's stages.
        student_stages: Layers of each of the student's.
    """

    def __init__(
        self,
        gpt: GPTModel,
        layout: Layout,
        matches: Sequence[Match],
        groups: Groups,
        *,
        teacher_stages: Sequence[int],
        student_stages: Sequence[int],
    ) -> None:
        self._gpt = gpt
        self._layout = layout
        self._groups = groups
        self._routes = sorted(
            {
                (match.teacher, match.teacher.stage(teacher_stages), stage)
                for match in matches
                for stage in [match.student.stage(student_stages)]
            }
        )
        self._seen: dict[State, list[Tensor]] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep the states of every micro-batch that runs inside the block."""
        mine = {state for state, here, _ in self._routes if here == self._groups.pp_rank}
        self._seen = {state: [] for state in mine}
        handles = [see_state(self._gpt, state, partial(self._record, state)) for state in mine]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def deliver(self, microbatches: Sequence[Batch]) -> list[Mapping[str, Tensor]]:
        """Send what was recorded; all stages call it together.

        Returns:
            For each micro-batch, the teacher's states that this stage of the student is pulled towards.
        """
        groups = self._groups
        ranks = dist.get_process_group_ranks(groups.pp)
        received: list[dict[str, Tensor]] = [{} for _ in microbatches]
        transfers = []
        for index, batch in enumerate(microbatches):
            for state, source, target in self._routes:
                if source == target == groups.pp_rank:
                    received[index][state.name] = self._seen[state][index]
                elif source == groups.pp_rank:
                    sent = self._seen[state][index].contiguous()
                    transfers.append(dist.P2POp(dist.isend, sent, ranks[target], groups.pp))
                elif target == groups.pp_rank:
                    shape = self._layout.shape(state, batch, groups.tp.size())
                    place = torch.empty(shape, dtype=self._layout.dtype, device=batch.tokens_BS.device)
                    received[index][state.name] = place
                    transfers.append(dist.P2POp(dist.irecv, place, ranks[source], groups.pp))
        for transfer in dist.batch_isend_irecv(transfers) if transfers else []:
            transfer.wait()
        self._seen = {}
        return list(received)

    def _record(self, state: State, carrier: Tensor, seen: Tensor) -> Tensor:
        self._seen[state].append(seen.detach())
        return carrier
