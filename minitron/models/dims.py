"""How the units of an axis lie along one dimension of a parameter."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from minitron.config.model import ModelConfig

Indices = NDArray[np.int64]


class Axis(StrEnum):
    """What the units along a dimension are; a unit is what pruning keeps or drops (but never a head's channel)."""

    layer = "layer"
    hidden = "hidden"
    ffn = "ffn"
    head = "head"
    group = "group"
    channel = "channel"
    expert = "expert"
    vocab = "vocab"


class Dim(StrEnum):
    """How one dimension of a parameter is laid out, as runs of units (see `runs`)."""

    hidden = "hidden"
    ffn = "ffn"
    gate_up = "gate_up"
    qkv = "qkv"
    heads = "heads"
    head_dim = "head_dim"
    experts = "experts"
    vocab = "vocab"


@dataclass(frozen=True)
class Run:
    """Consecutive units along a dimension.

    Attributes:
        part: Which Hugging Face tensor the run belongs to (``all`` when there is only one).
        axis: What the units are.
        first: Number of the first unit.
        count: Number of units.
        width: Rows of one unit (``kv_channels`` for heads and groups, else 1).
    """

    part: str
    axis: Axis
    first: int
    count: int
    width: int


def runs(dim: Dim, model: ModelConfig) -> tuple[Run, ...]:
    """Lay out one dimension as runs of units, in order."""
    match dim:
        case Dim.hidden:
            return (Run("all", Axis.hidden, 0, model.hidden_size, 1),)
        case Dim.ffn:
            return (Run("all", Axis.ffn, 0, model.ffn_hidden_size, 1),)
        case Dim.gate_up:
            size = model.ffn_hidden_size
            return (Run("gate", Axis.ffn, 0, size, 1), Run("up", Axis.ffn, 0, size, 1))
        case Dim.heads:
            return (Run("all", Axis.head, 0, model.num_attention_heads, model.kv_channels),)
        case Dim.head_dim:
            return (Run("all", Axis.channel, 0, model.kv_channels, 1),)
        case Dim.experts:
            return (Run("all", Axis.expert, 0, model.num_moe_experts or 0, 1),)
        case Dim.vocab:
            return (Run("all", Axis.vocab, 0, model.vocab_size, 1),)
        case Dim.qkv:
            per_group, width = model.heads_per_group, model.kv_channels
            return tuple(
                run
                for group in range(model.num_query_groups)
                for run in (
                    Run("q", Axis.head, group * per_group, per_group, width),
                    Run("k", Axis.group, group, 1, width),
                    Run("v", Axis.group, group, 1, width),
                )
            )


def dim_size(dim: Dim, model: ModelConfig) -> int:
    """Length of a dimension."""
    return sum(run.count * run.width for run in runs(dim, model))


def part_rows(dim: Dim, part: str, model: ModelConfig) -> Indices:
    """Positions along ``dim`` that one Hugging Face part fills, in the part's own row order."""
    return _positions(dim, model, lambda run: _range(run.count) if run.part == part else None)


def kept_positions(dim: Dim, model: ModelConfig, kept: Mapping[Axis, Sequence[int]]) -> Indices:
    """Positions along ``dim`` that survive when only the ``kept`` units of each axis do.

    The original order is kept. An axis absent from ``kept`` is kept whole.

    Args:
        dim: Layout of the dimension.
        model: The model before pruning.
        kept: Sorted unit numbers by axis, for the layer at hand.
    """
    units = {axis: np.asarray(numbers, dtype=np.int64) for axis, numbers in kept.items()}

    def select(run: Run) -> Indices:
        if run.axis not in units:
            return _range(run.count)
        numbers = units[run.axis]
        inside = (numbers >= run.first) & (numbers < run.first + run.count)
        return numbers[inside] - run.first

    return _positions(dim, model, select)


def _range(count: int) -> Indices:
    return np.arange(count, dtype=np.int64)


def _positions(dim: Dim, model: ModelConfig, select: Callable[[Run], Indices | None]) -> Indices:
    """Row numbers of the selected units of every run, run after run."""
    found: list[Indices] = []
    start = 0
    for run in runs(dim, model):
        chosen = select(run)
        if chosen is not None and len(chosen):
            rows = start + chosen[:, None] * run.width + _range(run.width)[None, :]
            found.append(rows.reshape(-1))
        start += run.count * run.width
    return np.concatenate(found) if found else _range(0)
