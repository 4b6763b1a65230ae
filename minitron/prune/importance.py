"""Importance scores of a Megatron model from a forward-only pass, seen through forward hooks."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.hooks import RemovableHandle

from minitron.config.model import ModelConfig
from minitron.config.score import Aggregation, FfnActivation, HeadNorm, Reduction
from minitron.errors import DataError, PlatformError
from minitron.models.axes import Axis, ScoreSite, score_sites_of
from minitron.prune.collect import all_reduce, first_linear, gather_layers, join_shards
from minitron.prune.depth_scores import Floats
from minitron.prune.experts import expert_scores, output_norms, spread
from minitron.prune.scores import Scores, WidthScores
from minitron.prune.statistics import (
    SQUARES,
    TOTAL,
    cosine_distance,
    reduce_batch,
    reduce_sequence,
)


@dataclass(frozen=True)
class _Sums:
    """Sums over samples for all layers of one stage, float64.

    Attributes:
        width: By site and sequence reduction, ``[L, 2, width]``: sum, and sum of squares.
        samples: ``[L, number of sites]``: samples seen at each site.
        layer: ``[L, 2]``: sum of ``1 - cos`` over tokens, and tokens.
        expert: ``[L, 2, E]``: sum over its routed tokens of the norm of what an expert adds, and the tokens.
        final: By sequence reduction, ``[2, H]`` of the final norm; empty where that is on another stage.
    """

    width: dict[tuple[int, Reduction], Tensor]
    samples: Tensor
    layer: Tensor
    final: dict[Reduction, Tensor]
    expert: Tensor

    def tensors(self) -> list[Tensor]:
        """All of them, in an order that every rank of a stage shares."""
        return [*self.width.values(), self.samples, self.layer, self.expert, *self.final.values()]


class ImportanceCollector:
    """Context manager that watches a forward-only pass and gives `Scores` at the end.

    The hooks are registered on entering and removed on leaving, however the block ends. Needs
    Megatron's local layer spec, and no sequence parallelism (the local norm refuses it as well).

        with ImportanceCollector(gpt.decoder.layers, gpt.decoder.final_layernorm, model, ...) as collector:
            for batch in batches:
                collector.observe(weights_B)
                forward(batch)
        scores = collector.reduce(source_id=..., dp_group=..., tp_group=..., pp_group=...)
    """

    def __init__(
        self,
        layers: Iterable[nn.Module],
        final_norm: nn.Module | None,
        model: ModelConfig,
        *,
        seq_length: int,
        aggregations: Sequence[Aggregation] = (Aggregation.l2_mean,),
        head_norm: HeadNorm = HeadNorm.token,
        ffn_activation: FfnActivation = FfnActivation.after,
    ) -> None:
        """Prepare empty sums.

        Args:
            layers: This rank's ``TransformerLayer`` modules; ``layer_number`` counts from 1 over
                the whole model.
            final_norm: The norm after the last layer, where this rank has it.
            model: Architecture of the whole model.
            seq_length: Tokens of every calibration sequence.
            aggregations: What `reduce` is to compute.
            head_norm: Where the norm over a head's channels is taken.
            ffn_activation: On which side of the activation function neurons are seen.

        Raises:
            PlatformError: A norm is fused into the linear after it, so its output cannot be seen.
        """
        self._layers = list(layers)
        self._final_norm = final_norm
        self._model = model
        self._seq_length = seq_length
        self._aggregations = list(aggregations)
        self._seq_reductions = sorted({a.seq for a in aggregations}, key=lambda r: r.value)
        self._head_norm = head_norm
        self._ffn_activation = ffn_activation
        self._sites = score_sites_of(model)
        self._weights_B: Tensor | None = None
        self._handles: list[RemovableHandle] = []
        self._sums = self._empty_sums()

    def __enter__(self) -> Self:
        """Register the hooks."""
        for index, layer in enumerate(self._layers):
            self._handles.append(layer.register_forward_hook(self._layer_hook(index), with_kwargs=True))
            for number, site in enumerate(self._sites):
                name = site.module
                if site.axis is Axis.ffn and self._ffn_activation is FfnActivation.before:
                    name = name.replace("linear_fc2", "linear_fc1")  # the activation function comes after it
                module = layer.get_submodule(name)
                self._handles.append(module.register_forward_hook(self._site_hook(index, number, site)))
            for expert in range(self._model.num_moe_experts or 0):
                module = layer.get_submodule(f"mlp.experts.local_experts.{expert}")
                self._handles.append(module.register_forward_hook(self._expert_hook(index, expert)))
        if self._final_norm is not None:
            self._handles.append(self._final_norm.register_forward_hook(self._final_hook))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def observe(self, weights_B: Tensor | None) -> None:
        """Set the weights of the samples in the next forward passes.

        Args:
            weights_B: 1 for a sample that counts, 0 for one that only fills up the batch; None when
                all count.
        """
        self._weights_B = weights_B

    def reduce(
        self,
        *,
        source_id: str,
        dp_group: ProcessGroup | None = None,
        tp_group: ProcessGroup | None = None,
        pp_group: ProcessGroup | None = None,
    ) -> Scores:
        """Bring the sums of all ranks together; every rank gets the scores of the whole model.

        Sums add up over data-parallel ranks, neurons and heads are joined over tensor-parallel
        ranks in rank order, layers over pipeline stages by number. None stands for one rank.

        Args:
            source_id: Identity of the scored weights.
            dp_group: Ranks with other samples and the same weights.
            tp_group: Ranks with other heads and neurons of the same layers.
            pp_group: Ranks with other layers.

        Raises:
            DataError: No sample was seen.
            NumericsError: A score is not finite.
        """
        if dp_group is not None:
            all_reduce(self._sums.tensors(), dp_group)
        stage = {_number(layer): self._layer_sums(index, tp_group) for index, layer in enumerate(self._layers)}
        if self._final_norm is not None:
            stage[self._model.num_layers] = self._final_sums(tp_group)
        layers = gather_layers(stage, pp_group)
        final = layers.pop(self._model.num_layers)
        assert sorted(layers) == list(range(self._model.num_layers)), sorted(layers)
        return self._finish([layers[number] for number in sorted(layers)], final, source_id)

    def _empty_sums(self) -> _Sums:
        """Zeros of this stage's shapes, known from the weights, so that no rank lacks one."""
        depth = len(self._layers)
        width: dict[tuple[int, Reduction], Tensor] = {}
        device = torch.device("cpu")
        for number, site in enumerate(self._sites):
            weights = [_weight(layer, site) for layer in self._layers]
            device = weights[0].device
            size = weights[0].shape[-1]
            if site.axis is Axis.head and self._head_norm is HeadNorm.token:
                size //= self._model.kv_channels
            for reduction in self._seq_reductions:
                width[number, reduction] = torch.zeros(depth, 2, size, dtype=torch.float64, device=device)
        return _Sums(
            width=width,
            samples=torch.zeros(depth, len(self._sites), dtype=torch.float64, device=device),
            layer=torch.zeros(depth, 2, dtype=torch.float64, device=device),
            final={
                reduction: torch.zeros(2, self._model.hidden_size, dtype=torch.float64, device=device)
                for reduction in (self._seq_reductions if self._final_norm is not None else [])
            },
            expert=torch.zeros(depth, 2, self._model.num_moe_experts or 0, dtype=torch.float64, device=device),
        )

    def _site_hook(self, index: int, number: int, site: ScoreSite) -> Any:
        """Hook that adds one activation to the sums of layer ``index``."""
        per_head = None
        if site.axis is Axis.head and self._head_norm is HeadNorm.token:
            per_head = self._model.kv_channels
        before = site.axis is Axis.ffn and self._ffn_activation is FfnActivation.before
        width = _weight(self._layers[index], site).shape[-1]

        @torch.no_grad()
        def hook(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if before:
                activation_SBX = first_linear(output, width)
            else:
                seen = args[0] if site.sees == "input" else output
                activation_SBX = seen[0] if isinstance(seen, tuple) else seen
            if site.expert is not None:
                activation_SBX = spread(activation_SBX, self._layers[index], site.expert, self._seq_length)
            sums = {reduction: self._sums.width[number, reduction][index] for reduction in self._seq_reductions}
            self._sums.samples[index, number] += self._add(sums, activation_SBX, per_head)

        return hook

    @torch.no_grad()
    def _final_hook(self, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        """Hook that adds the final norm's output to its sums."""
        self._add(self._sums.final, output[0] if isinstance(output, tuple) else output, None)

    def _add(self, sums: Mapping[Reduction, Tensor], activation_SBX: Tensor, per_head: int | None) -> Tensor:
        """Add an activation's reductions to their sums; gives the number of its samples."""
        weights_B = self._check(activation_SBX)
        reduced = reduce_sequence(activation_SBX, self._seq_reductions, per_head=per_head)
        for reduction, value_BX in reduced.items():
            sums[reduction][TOTAL] += weights_B @ value_BX
            sums[reduction][SQUARES] += weights_B @ value_BX.square()
        return weights_B.sum()

    def _expert_hook(self, index: int, expert: int) -> Any:
        """Hook that adds the norms of one expert's output to its sum."""

        @torch.no_grad()
        def hook(_module: nn.Module, _args: object, output: tuple[Tensor, None]) -> None:
            norms_T1 = output_norms(output[0], self._layers[index])
            both = torch.cat([norms_T1, torch.ones_like(norms_T1)], dim=-1)
            total_SB2 = spread(both, self._layers[index], expert, self._seq_length)
            self._sums.expert[index, :, expert] += self._check(total_SB2) @ total_SB2.sum(dim=0)

        return hook

    def _layer_hook(self, index: int) -> Any:
        """Hook that adds one layer's ``1 - cos(input, output)`` to its sum."""

        @torch.no_grad()
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
            before_SBH: Tensor = args[0] if args else kwargs["hidden_states"]
            after_SBH: Tensor = output[0] if isinstance(output, tuple) else output
            weights_B = self._check(after_SBH)
            distance_B = cosine_distance(before_SBH, after_SBH)
            self._sums.layer[index, 0] += weights_B @ distance_B
            self._sums.layer[index, 1] += weights_B.sum() * self._seq_length

        return hook

    def _check(self, activation_SBX: Tensor) -> Tensor:
        """Check an activation's shape; gives the weights of its samples in float64."""
        length, batch = activation_SBX.shape[:2]
        if length != self._seq_length:
            raise DataError(
                f"score: an activation is {length} tokens long instead of {self._seq_length}; give "
                "calibration sequences of one length, with parallel.sequence_parallel=false"
            )
        weights_B = self._weights_B
        if weights_B is None:
            weights_B = torch.ones(batch)
        assert len(weights_B) == batch, (len(weights_B), batch)
        return weights_B.to(activation_SBX.device, torch.float64)

    def _layer_sums(self, index: int, tp_group: ProcessGroup | None) -> dict[str, Floats]:
        """One layer's sums at full width, as arrays."""
        sums = {
            "samples": self._sums.samples[index].cpu().numpy(),
            "layer": self._sums.layer[index].cpu().numpy(),
            "expert": self._sums.expert[index].cpu().numpy(),
        }
        for (number, reduction), tensor in self._sums.width.items():
            full = tensor[index]
            if tp_group is not None:
                replicated = self._sites[number].axis is Axis.hidden
                full = join_shards(full, tp_group, replicated=replicated)
            sums[_name(number, reduction)] = full.cpu().numpy()
        return sums

    def _final_sums(self, tp_group: ProcessGroup | None) -> dict[str, Floats]:
        """The final norm's sums, as arrays."""
        sums = {}
        for reduction, tensor in self._sums.final.items():
            whole = tensor if tp_group is None else join_shards(tensor, tp_group, replicated=True)
            sums[reduction.value] = whole.cpu().numpy()
        return sums

    def _finish(self, layers: Sequence[Mapping[str, Floats]], final: Mapping[str, Floats], source_id: str) -> Scores:
        """Scores from the sums of all layers."""
        samples = np.stack([layer["samples"] for layer in layers])
        count = int(samples.flat[0])
        assert (samples == count).all(), "some hooks have not seen every sample"
        if count == 0:
            raise DataError("score: no calibration sample was seen; check score.num_samples")
        distance = np.stack([layer["layer"] for layer in layers])
        scores = Scores(
            model=self._model,
            source_id=source_id,
            num_samples=count,
            seq_length=self._seq_length,
            head_norm=self._head_norm,
            ffn_activation=self._ffn_activation,
            width={a: self._width_scores(layers, final, a, count) for a in self._aggregations},
            layer=distance[:, 0] / distance[:, 1],
            expert=expert_scores(np.stack([layer["expert"] for layer in layers]))
            if self._model.num_moe_experts
            else None,
        )
        scores.validate()
        return scores

    def _width_scores(
        self,
        layers: Sequence[Mapping[str, Floats]],
        final: Mapping[str, Floats],
        aggregation: Aggregation,
        count: int,
    ) -> WidthScores:
        """The three width axes under one aggregation."""
        rows: dict[Axis, list[Floats]] = {Axis.ffn: [], Axis.head: [], Axis.hidden: []}
        for layer in layers:
            for number, site in enumerate(self._sites):
                sums = layer[_name(number, aggregation.seq)]
                score = reduce_batch(sums, count, aggregation.batch)
                if site.axis is Axis.head and self._head_norm is HeadNorm.channel:
                    score = np.linalg.norm(score.reshape(-1, self._model.kv_channels), axis=1)
                rows[site.axis].append(score)
        return WidthScores(
            ffn=np.stack(rows[Axis.ffn]).reshape(self._model.num_layers, -1),  # with experts, a row for each
            head=np.stack(rows[Axis.head]),
            hidden=np.stack(rows[Axis.hidden]),
            final=reduce_batch(final[aggregation.seq.value], count, aggregation.batch),
        )


def _number(layer: nn.Module) -> int:
    """Number of a layer in the whole model, from 0."""
    number = layer.layer_number
    assert isinstance(number, int)
    return number - 1


def _name(number: int, reduction: Reduction) -> str:
    return f"{number}.{reduction.value}"


def _weight(layer: nn.Module, site: ScoreSite) -> Tensor:
    """Weight of a site's module; its last dimension is this rank's width of the site."""
    weight = getattr(layer.get_submodule(site.module), "weight", None)
    if not isinstance(weight, Tensor):
        raise PlatformError(
            f"score: layer {_number(layer)} has no {site.module} of its own: Transformer Engine "
            "fuses it into the next linear; build the model with local_spec=True to score it"
        )
    return weight
