"""The prune spec: which units of the source a pruned model keeps, as a JSON file to review."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Self

from minitron.config.model import ModelConfig
from minitron.config.prune import SIZES, HeadResidual
from minitron.errors import MinitronError, PruneError
from minitron.models.axes import Axis

FORMAT = 1

_PER_LAYER = ("ffn", "heads", "groups")


class HeadPair(NamedTuple):
    """A kept query head, and the dropped one that is merged into it."""

    kept: int
    dropped: int


@dataclass(frozen=True, kw_only=True)
class PruneSpec:
    """What to keep. Every list is sorted, so kept units stay in their original order.

    Attributes:
        source: Architecture of the source model.
        target: Architecture of the pruned model.
        source_id: Identity of the source weights, as the caller names it (a content hash).
        layers: Kept layers, counted from 0.
        hidden: Kept channels, the same in the whole network.
        ffn: Kept neurons, one list per kept layer; with experts, neuron n of expert e is ``e * ffn_hidden_size + n``.
        heads: Kept query heads, one list per kept layer.
        groups: Kept query groups, one list per kept layer.
        experts: Kept experts, one list per kept layer; empty for a model without.
        head_residual: Whether dropped query heads are merged into kept ones, and with which sign.
        head_pairs: The pairs to merge, one list per kept layer; empty where none are.
    """

    source: ModelConfig
    target: ModelConfig
    source_id: str
    layers: list[int]
    hidden: list[int]
    ffn: list[list[int]]
    heads: list[list[int]]
    groups: list[list[int]]
    experts: list[list[int]] = field(default_factory=list)
    head_residual: HeadResidual = HeadResidual.none
    head_pairs: list[list[HeadPair]] = field(default_factory=list)

    @classmethod
    def identity(cls, model: ModelConfig, *, source_id: str = "") -> Self:
        """The spec that keeps everything."""
        depth = model.num_layers
        return cls(
            source=model,
            target=model,
            source_id=source_id,
            layers=list(range(depth)),
            hidden=list(range(model.hidden_size)),
            ffn=[list(range(model.num_ffn_units)) for _ in range(depth)],
            heads=[list(range(model.num_attention_heads)) for _ in range(depth)],
            groups=[list(range(model.num_query_groups)) for _ in range(depth)],
            experts=[list(range(model.num_moe_experts)) for _ in range(depth)] if model.num_moe_experts else [],
        )

    def kept(self, layer: int | None, expert: int | None = None) -> Mapping[Axis, Sequence[int]]:
        """Kept units by axis, as `minitron.models.axes.kept_positions` wants them.

        Args:
            layer: Number of the layer in the pruned model; None for a parameter outside the layers.
            expert: Number of the expert in the pruned layer, for a parameter of its own; neurons then count from its
                first.
        """
        if layer is None:
            return {Axis.hidden: self.hidden}
        units = {
            Axis.hidden: self.hidden,
            Axis.ffn: self.ffn[layer],
            Axis.head: self.heads[layer],
            Axis.group: self.groups[layer],
        }
        if self.experts:
            units[Axis.expert] = self.experts[layer]
        if expert is not None:
            size = self.source.ffn_hidden_size
            first = self.experts[layer][expert] * size
            units[Axis.ffn] = [unit - first for unit in self.ffn[layer] if first <= unit < first + size]
        return units

    def places(self, layer: int | None, expert: int | None = None) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Where a parameter of a layer (of one expert) is stacked, in the source and in the pruned model."""
        if layer is None:
            return (), ()
        if expert is None:
            return (self.layers[layer],), (layer,)
        return (self.layers[layer], self.experts[layer][expert]), (layer, expert)

    def validate(self) -> None:
        """Check that the lists fit the two architectures.

        Raises:
            PruneError: They do not; the message says which list and why.
        """
        source, target = self.source, self.target
        frozen = {k: v for k, v in source.to_dict().items() if k not in SIZES}
        for name, value in frozen.items():
            if target.to_dict()[name] != value:
                raise PruneError(
                    f"prune spec: {name} changes from {value} to {target.to_dict()[name]}; "
                    f"pruning may change only {', '.join(SIZES)}"
                )
        _check_units("layers", self.layers, source.num_layers, target.num_layers)
        _check_units("hidden", self.hidden, source.hidden_size, target.hidden_size)
        for name in self._per_layer:
            lists = getattr(self, name)
            if len(lists) != target.num_layers:
                raise PruneError(
                    f"prune spec: {name} has {len(lists)} lists for {target.num_layers} kept layers; give one per layer"
                )
        for i, layer in enumerate(self.layers):
            where = f"of layer {layer}"
            _check_units(f"ffn {where}", self.ffn[i], source.num_ffn_units, target.num_ffn_units)
            _check_units(
                f"heads {where}",
                self.heads[i],
                source.num_attention_heads,
                target.num_attention_heads,
            )
            _check_units(f"groups {where}", self.groups[i], source.num_query_groups, target.num_query_groups)
            self._check_groups(where, self.heads[i], self.groups[i])
            if source.num_moe_experts is not None:
                _check_units(f"experts {where}", self.experts[i], source.num_moe_experts, target.num_moe_experts or 0)
                self._check_experts(where, self.ffn[i], self.experts[i])
        self._check_pairs()

    def to_json(self) -> str:
        """Text of the file: one line per list, runs of units written as ``first-last``."""
        about = {
            "format": FORMAT,
            "source_id": self.source_id,
            "source": self.source.to_dict(),
            "target": self.target.to_dict(),
            "layers": write_units(self.layers),
            "hidden": write_units(self.hidden),
        }
        lists = {name: [write_units(u) for u in getattr(self, name)] for name in self._per_layer}
        merging: dict[str, Any] = {}
        if self.head_residual is not HeadResidual.none:
            pairs = [",".join(f"{pair.kept}<{pair.dropped}" for pair in of_layer) for of_layer in self.head_pairs]
            merging = {"head_residual": self.head_residual.value, "head_pairs": pairs}
        return json.dumps({**about, **lists, **merging}, indent=2) + "\n"

    def save(self, path: Path) -> None:
        """Write the spec, checked.

        Raises:
            PruneError: The spec is not valid.
        """
        self.validate()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Inverse of `save`.

        Raises:
            PruneError: The file is missing, is no prune spec, or does not fit its architectures.
        """
        try:
            values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if values["format"] != FORMAT:
                raise PruneError(
                    f"{path}: prune spec format {values['format']} is not {FORMAT}, which this "
                    "version reads; prune again"
                )
            spec = cls(
                source=ModelConfig.from_dict(values["source"]),
                target=ModelConfig.from_dict(values["target"]),
                source_id=values["source_id"],
                layers=read_units(values["layers"]),
                hidden=read_units(values["hidden"]),
                **{name: [read_units(u) for u in values.get(name, [])] for name in (*_PER_LAYER, "experts")},
                head_residual=HeadResidual(values.get("head_residual", HeadResidual.none)),
                head_pairs=[_read_pairs(text) for text in values.get("head_pairs", [])],
            )
            spec.validate()
        except MinitronError as error:
            raise PruneError(f"{path}: {error}") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise PruneError(
                f"{path} is no readable prune spec ({type(error).__name__}: {error}); prune again"
            ) from error
        return spec

    def content_hash(self) -> str:
        """SHA-256 of the spec, equal for equal specs."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def _check_pairs(self) -> None:
        """Every pair merges a dropped head into a kept one, and there are pairs for each layer or for none."""
        layers = 0 if self.head_residual is HeadResidual.none else self.target.num_layers
        if len(self.head_pairs) != layers:
            raise PruneError(
                f"prune spec: head_pairs has {len(self.head_pairs)} lists, but head_residual={self.head_residual} with "
                f"{self.target.num_layers} kept layers needs {layers}"
            )
        per_group = self.source.heads_per_group
        for i, pairs in enumerate(self.head_pairs):
            for kept, dropped in pairs:
                there = 0 <= dropped < self.source.num_attention_heads
                related = per_group == 1 or kept // per_group == dropped // per_group
                if kept not in self.heads[i] or dropped in self.heads[i] or not there or not related:
                    raise PruneError(
                        f"prune spec: head_pairs of layer {self.layers[i]} merge head {dropped} into head {kept}, but "
                        f"the layer keeps heads {write_units(self.heads[i])} of {self.source.num_attention_heads} in "
                        f"groups of {per_group}; name a kept head and a dropped one of its group"
                    )

    @property
    def _per_layer(self) -> tuple[str, ...]:
        return _PER_LAYER if self.source.num_moe_experts is None else (*_PER_LAYER, "experts")

    def _check_experts(self, where: str, ffn: Sequence[int], experts: Sequence[int]) -> None:
        """Every kept expert keeps as many neurons, dropped ones none."""
        for expert in range(self.source.num_moe_experts or 0):
            have = sum(unit // self.source.ffn_hidden_size == expert for unit in ffn)
            want = self.target.ffn_hidden_size if expert in experts else 0
            if have != want:
                raise PruneError(
                    f"prune spec: {where}, expert {expert} keeps {have} neurons, not {want}; kept experts "
                    f"({write_units(experts)}) keep {self.target.ffn_hidden_size}, dropped ones none"
                )

    def _check_groups(self, where: str, heads: Sequence[int], groups: Sequence[int]) -> None:
        """Every kept group keeps as many heads, and no head is kept without its group."""
        per_group = self.target.heads_per_group
        for group in range(self.source.num_query_groups):
            have = sum(head // self.source.heads_per_group == group for head in heads)
            want = per_group if group in groups else 0
            if have != want:
                raise PruneError(
                    f"prune spec: {where}, query group {group} keeps {have} heads, not {want}; "
                    f"kept groups ({write_units(groups)}) keep {per_group}, dropped ones none"
                )


def write_units(units: Sequence[int]) -> str:
    """Sorted unit numbers as text, runs shortened: ``0-3,5,9-12``."""
    if not units:
        return ""
    breaks = [i for i, (a, b) in enumerate(pairwise(units), start=1) if b != a + 1]
    parts = []
    for start, stop in pairwise([0, *breaks, len(units)]):
        first, last = units[start], units[stop - 1]
        parts.append(str(first) if first == last else f"{first}-{last}")
    return ",".join(parts)


def read_units(text: str) -> list[int]:
    """Inverse of `write_units`.

    Raises:
        ValueError: The text is not of that form.
    """
    units: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        units.extend(range(int(first), int(last or first) + 1))
    return units


def _read_pairs(text: str) -> list[HeadPair]:
    """Pairs of heads from text such as ``1<2,4<3``: head 2 is merged into head 1, head 3 into head 4."""
    pairs = (part.split("<") for part in filter(None, text.split(",")))
    return [HeadPair(int(kept), int(dropped)) for kept, dropped in pairs]


def _check_units(what: str, units: Sequence[int], have: int, want: int) -> None:
    """A list of units is sorted, inside the source and of the target's length."""
    if len(units) != want:
        raise PruneError(f"prune spec: {what} keeps {len(units)} units, but the target has {want}")
    if any(b <= a for a, b in pairwise(units)):
        raise PruneError(f"prune spec: {what} are not in increasing order; sort them, each unit once")
    if units and (units[0] < 0 or units[-1] >= have):
        raise PruneError(
            f"prune spec: {what} reach from {units[0]} to {units[-1]}, but the source has units 0 to {have - 1}"
        )
