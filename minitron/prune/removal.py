"""A model and many variants of it without some of its layers, run at once: what they share is computed once.

A variant takes its parent's hidden state at the first layer that only it lacks, and runs the layers above from there.
Its layers get the arguments (rotary embedding, masks) that Megatron's own forward pass of the whole model gave them.
Over pipeline stages the states of all variants that have branched off travel together, stage by stage.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from minitron.data.batch import Batch
from minitron.models.gpt import Chunks, FinalState, forward_to_final_state
from minitron.parallel.groups import Groups


@dataclass(frozen=True)
class Variant:
    """A model without some layers.

    Attributes:
        removed: The layers it lacks, by number.
        parent: Place, in the list of variants, of the one that it is like up to `first`; itself for the whole model.
        first: First layer that it lacks and its parent has.
        last: Last such layer.
    """

    removed: frozenset[int]
    parent: int
    first: int
    last: int

    def crosses(self, layer: int, *, whole: bool) -> bool:
        """Whether its state at the input of a layer is not its parent's; without ``whole`` it ends after `last`."""
        return self.first < layer and (whole or self.last >= layer)


def variants_without(removed: Sequence[int], candidates: Sequence[Sequence[int]]) -> list[Variant]:
    """The whole model, the model without ``removed``, and that one without each candidate's layers as well.

    Args:
        removed: Layers that are gone; if there are none, the first two are the same and only one is listed.
        candidates: Sets of further layers; they come last in the list, in this order.
    """
    gone = frozenset(removed)
    variants = [Variant(frozenset(), 0, -1, -1)]
    if gone:
        variants.append(Variant(gone, 0, min(gone), max(gone)))
    current = len(variants) - 1
    return variants + [Variant(gone | frozenset(c), current, min(c), max(c)) for c in candidates]


class Measure(Protocol):
    """What is read off the variants' states."""

    whole: bool
    """Whether variants run on to the end of the model, or only to where they meet their parent again."""

    def begins(self, batch: Batch) -> None:
        """See each micro-batch once, on every stage."""
        ...

    def meets(self, variant: int, state_SBH: Tensor, parent_SBH: Tensor, batch: Batch) -> None:
        """See a variant's state behind the last layer that it lacks, and its parent's there; on one stage."""
        ...

    def ends(self, variant: int, final: FinalState, whole_model: FinalState, batch: Batch) -> None:
        """See a variant's final state and the whole model's, on the last stage; first the whole model's own."""
        ...


class RemovalPass:
    """Runs micro-batches through a model and its variants; for one stage of the model in one chunk."""

    def __init__(self, gpt: Chunks, groups: Groups, variants: Sequence[Variant], measure: Measure) -> None:
        """Prepare a pass.

        Args:
            gpt: This stage's part of the model, in evaluation mode.
            groups: This rank's process groups.
            variants: As `variants_without` lists them.
            measure: What to read off.
        """
        (self._chunk,) = gpt
        self._dtype = gpt.config.pipeline_dtype  # norms are wider than the states that stages send
        self._groups = groups
        self._variants = variants
        self._measure = measure
        self._layers: list[nn.Module] = list(self._chunk.get_submodule("decoder.layers").children())
        numbers = [_number(layer) for layer in self._layers]
        self._start, self._stop = numbers[0], numbers[-1] + 1
        assert numbers == list(range(self._start, self._stop)), numbers
        self._parents = {variant.parent for variant in variants}
        self._arguments: list[Mapping[str, Any]] = []

    @torch.no_grad()
    def run(self, batch: Batch) -> None:
        """Run one micro-batch, on this rank's device; all ranks of a pipeline call it with the same micro-batches."""
        self._measure.begins(batch)
        incoming = self._receive(batch)
        states: dict[int, list[Tensor]] = {}  # of the parents: at the input of each layer of the stage, and at its end
        states[0], final = self._whole_model(batch, incoming.get(0))
        ends = {0: states[0][-1]}
        for number, variant in enumerate(self._variants[1:], start=1):
            if variant.first < self._stop and (number in incoming or variant.first >= self._start):
                ends[number] = self._run_variant(number, incoming.get(number), states, batch)
        self._send(ends)
        if final is None or not self._measure.whole:
            return
        self._measure.ends(0, final, final, batch)
        for number in range(1, len(self._variants)):
            normed = self._chunk.decoder.final_layernorm(ends[number])
            self._measure.ends(number, replace(final, hidden_SBH=normed), final, batch)

    def _whole_model(self, batch: Batch, state_SBH: Tensor | None) -> tuple[list[Tensor], FinalState | None]:
        """The whole model's states on this stage, and its final state on the last."""
        states: list[Tensor] = []
        if state_SBH is not None:
            self._chunk.set_input_tensor(state_SBH)
        with self._recorded(states):
            output = forward_to_final_state(self._chunk, batch)
        return states, output if isinstance(output, FinalState) else None

    @contextmanager
    def _recorded(self, states: list[Tensor]) -> Iterator[None]:
        """Keep the layers' inputs and arguments, and the last one's output."""
        self._arguments = []

        def hook(_layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
            assert not args, "Megatron calls its layers by keyword"
            states.append(kwargs["hidden_states"])
            self._arguments.append(kwargs)
            if len(states) == len(self._layers):
                states.append(_hidden(output))

        handles = [layer.register_forward_hook(hook, with_kwargs=True) for layer in self._layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _run_variant(
        self, number: int, incoming_SBH: Tensor | None, states: dict[int, list[Tensor]], batch: Batch
    ) -> Tensor:
        """One variant's state at the end of the stage; or where it ends, if it does not run on."""
        variant = self._variants[number]
        parents = states.get(variant.parent, states[0])
        first = max(variant.first, self._start)
        state = parents[first - self._start] if incoming_SBH is None else incoming_SBH
        mine = parents[: first - self._start]
        for layer in range(first, self._stop):
            mine.append(state)
            if layer not in variant.removed:
                inputs = {**self._arguments[layer - self._start], "hidden_states": state}
                state = _hidden(self._layers[layer - self._start](**inputs))
            if layer == variant.last:
                self._measure.meets(number, state, parents[layer + 1 - self._start], batch)
                if not self._measure.whole and number not in self._parents:
                    return state
        if number in self._parents:
            states[number] = [*mine, state]
        return state

    def _crossing(self, layer: int) -> list[int]:
        """Variants whose states are handed over at the input of a layer, in order."""
        return [
            number
            for number, variant in enumerate(self._variants)
            if number == 0 or variant.crosses(layer, whole=self._measure.whole or number in self._parents)
        ]

    def _receive(self, batch: Batch) -> dict[int, Tensor]:
        if self._groups.is_first_stage:
            return {}
        numbers = self._crossing(self._start)
        size, length = batch.tokens_BS.shape
        width = self._chunk.config.hidden_size
        together = torch.empty(len(numbers), length, size, width, dtype=self._dtype, device=batch.tokens_BS.device)
        dist.recv(together, group=self._groups.pp, group_src=self._groups.pp_rank - 1)
        return dict(zip(numbers, together, strict=True))

    def _send(self, ends: Mapping[int, Tensor]) -> None:
        if self._groups.is_last_stage:
            return
        together = torch.stack([ends[number] for number in self._crossing(self._stop)])
        dist.send(together, group=self._groups.pp, group_dst=self._groups.pp_rank + 1)


def everywhere(sums: Tensor, groups: Groups) -> NDArray[np.float64]:
    """What a measure has summed, over stages, of which one sees each number, and data-parallel ranks; a collective."""
    total = sums.clone()
    dist.all_reduce(total, group=groups.pp)
    dist.all_reduce(total, group=groups.dp)
    array: NDArray[np.float64] = total.cpu().numpy()
    return array


def _hidden(output: Any) -> Tensor:
    """The hidden state in what a layer returns."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _number(layer: nn.Module) -> int:
    """Number of a layer in the whole model, from 0."""
    number = layer.layer_number
    assert isinstance(number, int)
    return number - 1
