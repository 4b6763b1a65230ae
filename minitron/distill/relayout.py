"""An online teacher in a layout of its own, on the student's ranks.

A group of the student's micro-batches is a list of sequences in the order of the global batch. Every rank gets all
their tokens, which are small against hidden states. The teacher's data-parallel ranks deal them by the rule of the
data loader, run forward, and its last stage sends each final hidden state, point to point, to the ranks of the
student's last stage whose micro-batches hold the sequence. The teacher's logits are made there, from its hidden state
and its output rows for the student's vocabulary shard, which each of these ranks has read from the checkpoint.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from minitron.config.parallel import padded_vocab_size
from minitron.config.precision import PrecisionConfig
from minitron.config.teacher_layout import TeacherLayout
from minitron.data.batch import Batch
from minitron.distill.teacher import Signal, freeze
from minitron.models.gpt import Chunks, FinalState
from minitron.models.load import load_gpt, load_output_rows
from minitron.models.transformer_config import TORCH_DTYPE
from minitron.parallel.groups import Groups, SecondLayout, second_layout
from minitron.runtime.session import Session
from minitron.train.heldout import forward_only


@dataclass(frozen=True)
class Dealing:
    """Which sequences a model's data-parallel ranks read, and who holds their final states.

    Attributes:
        micro_batch_size: Sequences of one micro-batch.
        last_stage_DT: Global ranks of the last pipeline stage, by data-parallel and tensor-parallel rank.
    """

    micro_batch_size: int
    last_stage_DT: Sequence[Sequence[int]]

    def microbatches(self, dp_rank: int, num_sequences: int) -> list[range]:
        """Positions of each of a data-parallel rank's micro-batches: the rule of `minitron.data.loader`."""
        size, ranks = self.micro_batch_size, len(self.last_stage_DT)
        assert num_sequences % (size * ranks) == 0, f"{num_sequences} sequences over {ranks} ranks, {size} each"
        starts = range(dp_rank * size, num_sequences, size * ranks)
        return [range(start, start + size) for start in starts]

    def holders(self, position: int) -> Sequence[int]:
        """The ranks, one per tensor-parallel rank, that hold the whole final state of the sequence there."""
        return self.last_stage_DT[position // self.micro_batch_size % len(self.last_stage_DT)]


@dataclass(frozen=True)
class Move:
    """One message: final states of these sequences, from a rank to another or to itself."""

    source: int
    target: int
    positions: Sequence[int]


def plan_moves(num_sequences: int, teacher: Dealing, student: Dealing) -> list[Move]:
    """Who sends which final states to whom; the same list, in the same order, on every rank.

    Every rank of the student's last stage needs its sequences' states whole, for its slice of the vocabulary. One that
    holds a state as the teacher's keeps it; else, of the tensor-parallel ranks that all hold it, the one sends that
    has sent least.

    Args:
        num_sequences: Sequences of the group of micro-batches.
        teacher: How the teacher's ranks deal them.
        student: How the student's do.
    """
    load: dict[int, int] = {}
    positions: dict[tuple[int, int], list[int]] = {}
    for position in range(num_sequences):
        holders = teacher.holders(position)
        for target in student.holders(position):
            source = target
            if target not in holders:
                source = min(holders, key=lambda rank: load.get(rank, 0))
                load[source] = load.get(source, 0) + 1
            positions.setdefault((source, target), []).append(position)
    return [Move(source, target, tuple(moved)) for (source, target), moved in sorted(positions.items())]


@dataclass(frozen=True)
class RelayoutTeacher:
    """A teacher that runs on the student's ranks in another layout.

    Attributes:
        gpt: The teacher in its own layout; frozen, and without its output layer.
        layout: The teacher's groups.
        groups: The student's groups.
        own: How sequences are dealt to the teacher's ranks.
        students: How they are dealt to the student's.
        weight_vH: The teacher's output rows for this rank's shard of the student's vocabulary; None off the
            student's last stage.
    """

    gpt: Chunks
    layout: SecondLayout
    groups: Groups
    own: Dealing
    students: Dealing
    weight_vH: Tensor | None

    def signals(self, microbatches: Sequence[Batch]) -> list[Signal]:
        """Run a forward-only schedule in the teacher's layout, and bring its final states to the student's."""
        sequences = _all_sequences(microbatches, self.groups.dp)
        num_sequences, length = sequences.tokens_BS.shape
        mine = self.own.microbatches(self.layout.groups.dp_rank, num_sequences)
        with self.layout.active():
            hidden = forward_only(self.gpt, [_rows(sequences, part) for part in mine], self._whole)
        held: dict[int, Tensor] = {}
        for part, hidden_SBH in zip(mine if hidden else [], hidden, strict=True):
            held |= {position: hidden_SBH[:, row] for row, position in enumerate(part)}
        config = self.gpt.config
        like_SH = torch.empty(length, config.hidden_size, dtype=config.params_dtype, device="meta")
        states = _exchange(
            plan_moves(num_sequences, self.own, self.students), held, like_SH, sequences.tokens_BS.device
        )
        if self.weight_vH is None:
            return [Signal()] * len(microbatches)
        parts = self.students.microbatches(self.groups.dp_rank, num_sequences)
        finals = [FinalState(torch.stack([states[position] for position in part], 1), self.weight_vH) for part in parts]
        return [Signal(final, whole=True) for final in finals]

    def _whole(self, state: FinalState, _batch: Batch) -> Tensor:
        """The whole sequences' final states, on every rank of the teacher's last stage."""
        if not self.gpt.config.sequence_parallel:
            return state.hidden_SBH
        gathered: Tensor = gather_from_sequence_parallel_region(state.hidden_SBH, group=self.layout.groups.tp)
        return gathered


@contextmanager
def relayout_teacher(
    folder: Path, session: Session, layout: TeacherLayout, precision: PrecisionConfig, *, student_vocab_size: int
) -> Iterator[RelayoutTeacher]:
    """A teacher in a layout of its own, whose groups last as long as the block; all ranks enter it together.

    Args:
        folder: The teacher's checkpoint folder.
        session: The running job; its groups are the student's.
        layout: The teacher's layout.
        precision: The teacher's number formats.
        student_vocab_size: Decides the vocabulary shards, in which the teacher's output rows are read.

    Raises:
        CheckpointError: The folder is not a complete checkpoint.
    """
    groups, config = session.groups, replace(session.config, parallel=layout.parallel)
    weight_vH = None
    if groups.is_last_stage:
        num_rows = padded_vocab_size(student_vocab_size, groups.tp.size()) // groups.tp.size()
        weight_vH = load_output_rows(
            folder,
            first=groups.tp_rank * num_rows,
            num_rows=num_rows,
            dtype=TORCH_DTYPE[precision.dtype],
            device=session.torch_device,
        )
    # Some ranks send nothing: NCCL connects a group only where all of its ranks take part in the first operation.
    dist.all_reduce(torch.zeros((), device=session.torch_device))
    with second_layout(layout.parallel) as second:
        with second.active():
            gpt, _ = load_gpt(folder, replace(session, config=config, groups=second.groups), precision=precision)
        yield RelayoutTeacher(
            _without_output_layer(freeze(gpt)),
            second,
            groups,
            Dealing(layout.micro_batch_size, _last_stage(second.groups)),
            Dealing(session.config.distill.train.micro_batch_size, _last_stage(groups)),
            weight_vH,
        )


def _last_stage(groups: Groups) -> list[list[int]]:
    """Global ranks of the last pipeline stage, by data-parallel and tensor-parallel rank."""
    places: list[tuple[bool, int, int]] = [(False, 0, 0)] * groups.world_size
    dist.all_gather_object(places, (groups.is_last_stage, groups.dp_rank, groups.tp_rank))
    ranks = {(dp, tp): rank for rank, (is_last, dp, tp) in enumerate(places) if is_last}
    return [[ranks[dp, tp] for tp in range(groups.tp.size())] for dp in range(groups.dp.size())]


def _without_output_layer(gpt: Chunks) -> Chunks:
    """Free the output layer where it is a tensor of its own: the student's ranks hold its rows."""
    *_, last = gpt
    if last.post_process and last.output_layer.weight is not None:
        last.output_layer.weight.data = last.output_layer.weight.new_empty(0)
    return gpt


def _all_sequences(microbatches: Sequence[Batch], dp: dist.ProcessGroup) -> Batch:
    """The sequences of every data-parallel rank as one batch, in the order of the global batch."""

    def gather(name: str) -> Tensor:
        mine_MBS = torch.stack([getattr(batch, name) for batch in microbatches])
        all_DMBS = mine_MBS.new_empty(dp.size(), *mine_MBS.shape)
        dist.all_gather_into_tensor(all_DMBS.flatten(0, 1), mine_MBS, group=dp)
        return all_DMBS.transpose(0, 1).flatten(0, 2)

    gathered: dict[str, Any] = {name: gather(name) for name in _by_sequence(microbatches[0])}
    return replace(microbatches[0], **gathered)


def _rows(batch: Batch, rows: range) -> Batch:
    cut: dict[str, Any] = {name: getattr(batch, name)[rows.start : rows.stop] for name in _by_sequence(batch)}
    return replace(batch, **cut)


def _by_sequence(batch: Batch) -> list[str]:
    """What a batch holds for each of its sequences, but for their sample indices, which stay on the host."""
    held = {field.name: getattr(batch, field.name) for field in fields(batch) if field.name != "sample_index_B"}
    return [name for name, value in held.items() if isinstance(value, Tensor)]


def _exchange(
    moves: Sequence[Move], held: Mapping[int, Tensor], like_SH: Tensor, device: torch.device
) -> dict[int, Tensor]:
    """Carry out the moves.

    Args:
        moves: All of them, those of other ranks too.
        held: Final states [S, H] that this rank holds as the teacher's, by position.
        like_SH: Shape and dtype of a state.
        device: Where to receive.

    Returns:
        The states that this rank needs as the student's, by position.
    """
    rank = dist.get_rank()
    here: dict[int, Tensor] = {}
    messages: list[dist.P2POp] = []
    for move in moves:
        if move.source == move.target == rank:
            here |= {position: held[position] for position in move.positions}
        elif move.source == rank:
            states_NSH = torch.stack([held[position] for position in move.positions])
            messages.append(dist.P2POp(dist.isend, states_NSH, move.target))
        elif move.target == rank:
            states_NSH = torch.empty(len(move.positions), *like_SH.shape, dtype=like_SH.dtype, device=device)
            messages.append(dist.P2POp(dist.irecv, states_NSH, move.source))
            here |= dict(zip(move.positions, states_NSH, strict=True))
    for message in dist.batch_isend_irecv(messages) if messages else []:
        message.wait()
    return here
