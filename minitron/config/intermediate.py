"""Losses between hidden states inside teacher and student, and which layers they pair."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from minitron.config.mixing import Mixing
from minitron.config.model import ModelConfig
from minitron.config.parallel import ParallelConfig
from minitron.errors import ConfigError

_SECTION = "distill.intermediate"


class HiddenLoss(StrEnum):
    """Loss between two hidden states of one token."""

    cosine = "cosine"
    mse = "mse"


class StateKind(StrEnum):
    """A kind of intermediate state; also the name of its loss in the log, or its first part (see `log_names`)."""

    embedding = "embedding"
    block_output = "block_output"
    mlp_input = "mlp_input"
    attention_relations = "attention_relations"


@dataclass(kw_only=True)
class IntermediateConfig:
    """Intermediate states of the student pulled towards the teacher's (arXiv 2407.14679, sections 3 and A.4).

    Each list holds pairs of layers counted from 0: ``29:13`` (teacher's : student's; quote it in YAML), ``last-2:13``,
    or a rule for both sides, ``last-2`` or ``last``. The loss is the sum over all pairs of the mean over tokens. Each
    pair is logged by itself and unweighted, under its kind, or where the kind has several as ``block_output.29:13``.
    """

    embedding: bool = False
    """Pair the embedding outputs, as the first block reads them (after its norm)."""
    block_output: list[str] = field(default_factory=list)
    """Pairs of blocks whose outputs are matched as the next block reads them (after its norm; after the last block,
    the final norm). The papers' choice where many layers are cut: ``[last-2]``, with `embedding`."""
    mlp_input: list[str] = field(default_factory=list)
    """Pairs of blocks whose MLP inputs (after the norm before the MLP) are matched."""
    attention_relations: list[str] = field(default_factory=list)
    """Pairs of blocks whose query-query, key-key and value-value relations are matched (MiniLMv2)."""
    relation_heads: int = 8
    """Heads that queries, keys and values are regrouped into for their relations, whatever heads the models have."""
    loss: HiddenLoss = HiddenLoss.cosine
    """Loss of hidden states: ``cosine`` is 1 - cos of a token's states, ``mse`` the mean over channels."""
    mixing: Mixing = Mixing.scaled
    """``scaled``: the intermediate losses together are brought to the size of the logit loss (the papers' alpha =
    L_logits / L_is, detached, of each micro-batch; |L_logits| should it be negative), then weighed. ``fixed``: weight
    alone. ``alpha`` in the log is the mean over micro-batches of what ``scaled`` multiplies by, weight included."""
    weight: float = 1.0
    """Weight of the intermediate losses beside the logit loss."""

    def __post_init__(self) -> None:
        """Refuse what is wrong for every model."""
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise ConfigError(f"{_SECTION}.weight={self.weight} must be above 0; to leave the losses out give no pairs")
        if self.relation_heads < 1:
            raise ConfigError(f"{_SECTION}.relation_heads={self.relation_heads} must be at least 1")
        for kind, pairs in self.pairs():
            for pair in pairs:
                _sides(kind, pair)

    @property
    def enabled(self) -> bool:
        """Whether there is any pair."""
        return self.embedding or any(pairs for _, pairs in self.pairs())

    def pairs(self) -> list[tuple[StateKind, list[str]]]:
        """The pairs of each kind that has layers."""
        return [
            (StateKind.block_output, self.block_output),
            (StateKind.mlp_input, self.mlp_input),
            (StateKind.attention_relations, self.attention_relations),
        ]


@dataclass(frozen=True, order=True)
class State:
    """One state of a model: the input of a norm-and-linear, or the queries, keys and values of a block.

    Attributes:
        kind: What it is.
        layer: Its block, from 0; 0 for the embedding.
    """

    kind: StateKind
    layer: int

    @property
    def name(self) -> str:
        """Its key in a teacher's signal."""
        return f"{self.kind.value}.{self.layer}"

    @property
    def reader(self) -> int:
        """The block whose modules show it; the number of layers means the final norm."""
        return self.layer + 1 if self.kind is StateKind.block_output else self.layer

    def stage(self, stage_layers: Sequence[int]) -> int:
        """The pipeline stage that holds its reader.

        Args:
            stage_layers: Layers of each stage of its model.
        """
        reader = min(self.reader, sum(stage_layers) - 1)
        ends = 0
        for stage, layers in enumerate(stage_layers):
            ends += layers
            if reader < ends:
                return stage
        raise AssertionError(f"layer {reader} of {ends}")


@dataclass(frozen=True, order=True)
class Match:
    """A state of the student and the teacher's that it is pulled towards."""

    teacher: State
    student: State

    @property
    def layers(self) -> str:
        """The pair of layers as the configuration writes it, such as 29:13."""
        return f"{self.teacher.layer}:{self.student.layer}"


def log_names(matches: Sequence[Match]) -> dict[Match, str]:
    """The name of each pair's loss in the log: its kind, with the layers where the kind has several pairs."""
    counts = Counter(match.student.kind for match in matches)
    return {
        match: match.student.kind.value + (f".{match.layers}" if counts[match.student.kind] > 1 else "")
        for match in matches
    }


def find_matches(
    config: IntermediateConfig, teacher: ModelConfig, student: ModelConfig, parallel: ParallelConfig
) -> list[Match]:
    """Resolve every pair against two models.

    Raises:
        ConfigError: A layer that a model does not have, a pair given twice, or heads that do not divide.
    """
    found = [Match(State(StateKind.embedding, 0), State(StateKind.embedding, 0))] if config.embedding else []
    for kind, pairs in config.pairs():
        for pair in pairs:
            left, right = _sides(kind, pair)
            match = Match(
                State(kind, _layer(kind, pair, left, "teacher", teacher.num_layers)),
                State(kind, _layer(kind, pair, right, "student", student.num_layers)),
            )
            if match in found:
                raise ConfigError(
                    f"{_SECTION}.{kind.value}={pairs}: {match.layers} is there twice; leave one of them out"
                )
            found.append(match)
    if config.attention_relations:
        _check_relation_heads(config.relation_heads, teacher, student, parallel)
    return found


def _sides(kind: StateKind, pair: str) -> tuple[str, str]:
    side = r"\d+|last(?:-\d+)?"
    match = re.fullmatch(rf"({side}):({side})", pair)
    if match:
        return match.group(1), match.group(2)
    if re.fullmatch(r"last(?:-\d+)?", pair):
        return pair, pair
    raise ConfigError(
        f"{_SECTION}.{kind.value}: {pair!r} is no pair of layers; write teacher:student counted from 0 (29:13, in "
        "YAML with quotes), or last-2 for both sides"
    )


def _layer(kind: StateKind, pair: str, side: str, who: str, num_layers: int) -> int:
    layer = num_layers - 1 - int(side.removeprefix("last").removeprefix("-") or 0) if "last" in side else int(side)
    if not 0 <= layer < num_layers:
        raise ConfigError(
            f"{_SECTION}.{kind.value}: {pair} asks for layer {layer} of the {who}, whose layers are 0 to "
            f"{num_layers - 1}"
        )
    return layer


def _check_relation_heads(heads: int, teacher: ModelConfig, student: ModelConfig, parallel: ParallelConfig) -> None:
    tp = parallel.tensor_model_parallel_size
    widths = relation_widths(teacher) + relation_widths(student)
    if any(width % heads for width in widths) or heads % tp:
        common = math.gcd(*widths)
        fitting = [number for number in range(tp, common + 1, tp) if common % number == 0]
        raise ConfigError(
            f"{_SECTION}.relation_heads={heads} must divide the query and key widths {_unique(widths)} of teacher and "
            f"student and be a multiple of parallel.tensor_model_parallel_size={tp}; such numbers: {fitting}"
        )


def relation_widths(model: ModelConfig) -> tuple[int, int, int]:
    """Channels of the queries, keys and values of one block, over all ranks."""
    keys = model.num_query_groups * model.kv_channels
    return model.num_attention_heads * model.kv_channels, keys, keys


def _unique(values: Sequence[int]) -> list[int]:
    return sorted(set(values))
