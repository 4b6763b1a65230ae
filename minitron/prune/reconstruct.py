"""Fit the kept weights to the source model on calibration text, in closed form, layer by layer.

Slicing breaks a layer in two ways. What reads the residual stream misses the channels that were cut; what writes into
it misses the neurons and heads that were cut, and passes on the errors of all layers before. Both are linear maps, so
the best kept weights are least-squares solutions (`least_squares`):

* A reader (``linear_qkv``, ``linear_fc1``) is fitted to what the source's own computes from all channels: with x the
  source's normed channels, z the pruned model's, W the source's rows of the kept units and W_K their kept columns,
  ``min |x W^T - z V^T|^2 + damping |V - W_K|^2`` over V.
* A writer (``linear_proj``, ``linear_fc2``) is fitted to what the pruned model's stream lacks to be the source's, in
  the kept channels, after the half layer, and after the dropped layers that follow it.
* The output layer is one more reader. Tied to the embedding it cannot change; then the final norm's weight, one scale
  for each channel in front of it, is fitted to the source's logits.

Both streams are carried down the network together: the source's, and that of the pruned model with all that is fitted
above, so errors are corrected and do not add up. Every rank holds one layer of each model at a time and its own share
of the calibration sequences, whatever the layout of the job; the sums are added over the ranks.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from minitron.checkpoint.folder import weights_dir
from minitron.checkpoint.store import CheckpointReader
from minitron.checkpoint.stream import CHUNK_BYTES
from minitron.config.parallel import ParallelConfig
from minitron.config.reconstruct import Linear, ReconstructConfig
from minitron.data.batch import Batch
from minitron.models.axes import OUTPUT_LAYER_KEY, ParamAxes, kept_positions, layer_shape, params_of
from minitron.parallel.groups import second_layout
from minitron.prune.least_squares import LeastSquares
from minitron.prune.one_layer import HALVES, MLP, Half, OneLayer
from minitron.prune.slicer import SliceItem, slice_param
from minitron.prune.spec import PruneSpec
from minitron.runtime.session import Session

EMBEDDING_KEY = "embedding.word_embeddings.weight"
FINAL_NORM_KEY = "decoder.final_layernorm.weight"


@dataclass
class _State:
    """The residual streams of a micro-batch on their way down.

    Attributes:
        source_SBH: The source's, fp32.
        pruned_SBK: The pruned model's, fp32.
        inside_SBX: What the pruned model's writer of the half layer at hand reads.
    """

    source_SBH: Tensor
    pruned_SBK: Tensor
    inside_SBX: Tensor | None = None


@contextmanager
def reconstruction(
    spec: PruneSpec,
    *,
    source: Path,
    batches: Callable[[int, int], Sequence[Batch]],
    seq_length: int,
    session: Session,
    on_progress: Callable[[int, int], None] | None = None,
) -> Iterator["Reconstruction"]:
    """Prepare to fit on a job's ranks; all of them enter and leave the block together.

    Whatever the layout of the job, its ranks are data-parallel ones in the block, with a whole layer each.

    Args:
        spec: What is kept.
        source: Checkpoint folder of the source.
        batches: The calibration sequences of one of so many data-parallel ranks.
        seq_length: Tokens of each sequence.
        session: The running job; ``prune.reconstruct`` says what to fit, and how.
        on_progress: See `Reconstruction`.
    """
    parallel = ParallelConfig(data_parallel_size=session.groups.world_size)
    with second_layout(parallel) as second, second.active() as groups:
        source_layer, pruned_layer = (
            OneLayer(model, parallel, session.config.precision, groups, device=session.device, seq_length=seq_length)
            for model in (spec.source, spec.target)
        )
        yield Reconstruction(
            spec,
            source=source,
            batches=batches(groups.dp_rank, groups.dp.size()),
            config=session.config.prune.reconstruct,
            source_layer=source_layer,
            pruned_layer=pruned_layer,
            group=groups.dp,
            device=session.torch_device,
            on_progress=on_progress,
        )


class Reconstruction:
    """The fitted weights of a pruned model, one layer after another; see `apply_spec`.

    Args:
        spec: What is kept.
        source: Checkpoint folder of the source.
        batches: This rank's calibration sequences.
        config: What to fit, and how.
        source_layer: A layer of the source's shape.
        pruned_layer: A layer of the pruned model's shape.
        group: The ranks that share the calibration sequences.
        device: Where to compute.
        on_progress: Called after each kept layer with their number so far and in all.

    Attributes:
        keys: Checkpoint keys of the parameters that are fitted.
    """

    def __init__(
        self,
        spec: PruneSpec,
        *,
        source: Path,
        batches: Sequence[Batch],
        config: ReconstructConfig,
        source_layer: OneLayer,
        pruned_layer: OneLayer,
        group: ProcessGroup,
        device: torch.device,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self._spec = spec
        self._reader = CheckpointReader(weights_dir(source))
        self._batches = batches
        self._damping = config.damping
        self._fits = set(config.modules)
        self._source, self._pruned = source_layer, pruned_layer
        self._group = group
        self._device = device
        self._on_progress = on_progress
        params = {param.key: param for param in params_of(spec.source)}
        self._params = {key: param for key, param in params.items() if param.stacked}
        self._hidden = torch.tensor(spec.hidden, device=device)
        linears = [(half, linear) for half in HALVES for linear in (half.reader, half.writer)]
        keys = {half.key(linear) for half, linear in linears if self._has(linear)}
        self._output = params.get(OUTPUT_LAYER_KEY, params[FINAL_NORM_KEY])
        self.keys: Collection[str] = keys | ({self._output.key} if self._has(Linear.output_layer) else set())

    def _has(self, linear: Linear) -> bool:
        return linear in self._fits

    @torch.no_grad()
    def __iter__(self) -> Iterator[tuple[SliceItem, Tensor]]:
        """Every fitted weight with its place; all ranks get all of them, and go on together."""
        states = self._embedded()
        self._pass_through(range(self._spec.layers[0]), states)
        for kept in range(len(self._spec.layers)):
            for key, weight in self._fit_layer(kept, states).items():
                yield SliceItem(self._params[key], kept), weight
            if self._on_progress is not None:
                self._on_progress(kept + 1, len(self._spec.layers))
        if self._has(Linear.output_layer):
            yield from self._fit_output(states)

    def _fit_layer(self, kept: int, states: list[_State]) -> dict[str, Tensor]:
        """Fit a kept layer and carry both streams through it, the source's also through what is dropped behind it."""
        layers = self._spec.layers
        whole = self._read(layers[kept])
        sliced = {key: slice_param(self._params[key], tensor, kept, self._spec) for key, tensor in whole.items()}
        self._source.load(whole)
        self._pruned.load(sliced)
        fitted: dict[str, Tensor] = {}
        for half in HALVES:
            if self._has(half.reader):
                key = half.key(half.reader)
                fitted[key] = self._fit_reader(half, kept, whole[key], sliced[key], states)
                self._pruned.load({key: fitted[key]})
            self._advance_source([half], states)
            if half is MLP:
                following = layers[kept + 1] if kept + 1 < len(layers) else self._spec.source.num_layers
                self._pass_through(range(layers[kept] + 1, following), states)
            key = half.key(half.writer)
            weight = self._fit_writer(half, kept, sliced[key], states)
            if weight is not None:
                fitted[key] = weight
        return fitted

    def _fit_reader(self, half: Half, kept: int, whole: Tensor, sliced: Tensor, states: list[_State]) -> Tensor:
        """Fit the linear that reads the normed hidden channels.

        The error of its outputs is W (x - z), z with zeros for the channels that were cut; the weight stays outside
        the sums, which are then of the hidden size.
        """
        param = self._params[half.key(half.reader)]
        squares = self._missing(partial(self._source.normed, half), partial(self._pruned.normed, half), states)
        correction_HK = squares.solve(self._damping, self._group, what=self._name(half.reader, kept))
        rows = kept_positions(param.dims[0], self._spec.source, self._spec.kept(kept))
        rows_XH = whole[torch.from_numpy(rows)].to(self._device).float()
        return _corrected(sliced, rows_XH @ correction_HK)

    def _fit_writer(self, half: Half, kept: int, sliced: Tensor, states: list[_State]) -> Tensor | None:
        """Fit the linear that writes into the residual stream, if it is to be, and carry the pruned stream on."""
        fits = self._has(half.writer)
        squares = self._least_squares(sliced.shape[1], sliced.shape[0]) if fits else None
        for state in states:
            inside_SBX, out_SBK = self._pruned.run(half, self._pruned.normed(half, state.pruned_SBK))
            if squares is None:
                state.pruned_SBK += out_SBK
                continue
            state.inside_SBX = inside_SBX
            squares.add(inside_SBX, state.source_SBH[..., self._hidden] - (state.pruned_SBK + out_SBK))
        if squares is None:
            return None
        weight = _corrected(sliced, squares.solve(self._damping, self._group, what=self._name(half.writer, kept)))
        self._pruned.load({half.key(half.writer): weight})
        for state in states:
            assert state.inside_SBX is not None
            state.pruned_SBK += self._pruned.write(half, state.inside_SBX)
            state.inside_SBX = None
        return weight

    def _fit_output(self, states: list[_State]) -> Iterator[tuple[SliceItem, Tensor]]:
        """Fit the output layer, a chunk of rows at a time, or the scales in front of one that is the embedding."""
        self._source.load({FINAL_NORM_KEY: self._reader.read(FINAL_NORM_KEY)})
        sliced = self._reader.read(FINAL_NORM_KEY)[self._spec.hidden]
        self._pruned.load({FINAL_NORM_KEY: sliced})
        squares = self._missing(self._source.final_normed, self._pruned.final_normed, states)
        if self._output.key == OUTPUT_LAYER_KEY:
            correction_HK = squares.solve(self._damping, self._group, what="the output layer")
            for first, rows_VH in self._rows(OUTPUT_LAYER_KEY):
                kept_VK = rows_VH[:, self._spec.hidden]
                item = SliceItem(self._output, None, (first, len(rows_VH)))
                yield item, _corrected(kept_VK, rows_VH.to(self._device).float() @ correction_HK)
            return
        between_KH = self._embedding_products()
        squares = squares.of_scales(between_KH[:, self._hidden], between_KH)
        scales_1K = 1 + squares.solve(self._damping, self._group, what="the final norm")
        yield SliceItem(self._output, None), (sliced.float() * scales_1K[0].to(sliced.device)).to(sliced.dtype)

    def _embedding_products(self) -> Tensor:
        """``[K, H]``: products of the embedding's kept columns with all, their means taken off.

        A softmax does not see what is added to all logits of a token.
        """
        num_hidden, num_rows = self._spec.source.hidden_size, self._spec.source.vocab_size
        products_HH = torch.zeros(num_hidden, num_hidden, dtype=torch.float64, device=self._device)
        mean_H = torch.zeros(num_hidden, dtype=torch.float64, device=self._device)
        for _, rows_VH in self._rows(EMBEDDING_KEY):
            here_VH = rows_VH.to(self._device).float()
            products_HH += here_VH.T @ here_VH
            mean_H += here_VH.sum(dim=0, dtype=torch.float64) / num_rows
        return (products_HH - num_rows * torch.outer(mean_H, mean_H))[self._hidden]

    def _missing(
        self, source_normed: Callable[[Tensor], Tensor], pruned_normed: Callable[[Tensor], Tensor], states: list[_State]
    ) -> LeastSquares:
        """Sums of what a linear lacks that reads the pruned model's normed channels in place of the source's."""
        squares = self._least_squares(self._spec.target.hidden_size, self._spec.source.hidden_size)
        for state in states:
            kept_SBK = pruned_normed(state.pruned_SBK)
            missing_SBH = source_normed(state.source_SBH).float()
            missing_SBH[..., self._hidden] -= kept_SBK.float()
            squares.add(kept_SBK, missing_SBH)
        return squares

    def _pass_through(self, layers: range, states: list[_State]) -> None:
        """Carry the source's stream through layers that the pruned model does not have."""
        for layer in layers:
            self._source.load(self._read(layer))
            self._advance_source(HALVES, states)

    def _advance_source(self, halves: Sequence[Half], states: list[_State]) -> None:
        for state in states:
            for half in halves:
                _, out_SBH = self._source.run(half, self._source.normed(half, state.source_SBH))
                state.source_SBH += out_SBH

    def _least_squares(self, num_inputs: int, num_errors: int) -> LeastSquares:
        return LeastSquares(num_inputs, num_errors, device=self._device)

    def _name(self, linear: Linear, kept: int) -> str:
        return f"{linear.value} of layer {self._spec.layers[kept]}"

    def _read(self, layer: int) -> dict[str, Tensor]:
        """The source's weights of one layer."""
        return {key: self._read_one(param, layer) for key, param in self._params.items()}

    def _read_one(self, param: ParamAxes, layer: int) -> Tensor:
        shape = layer_shape(param, self._spec.source)
        return self._reader.read(param.key, (layer, *[0] * len(shape)), (1, *shape)).squeeze(0)

    def _rows(self, key: str) -> Iterator[tuple[int, Tensor]]:
        """Chunks of the rows of an embedding or output layer of the source, each with its first row."""
        width, vocab = self._spec.source.hidden_size, self._spec.source.vocab_size
        step = max(1, CHUNK_BYTES // (4 * width))
        for first in range(0, vocab, step):
            yield first, self._reader.read(key, (first, 0), (min(step, vocab - first), width))

    def _embedded(self) -> list[_State]:
        """The streams where they begin; rows that only fill up a micro-batch are left out."""
        tokens = [batch.tokens_BS[batch.loss_mask_BS.amax(dim=1) > 0].T for batch in self._batches]
        tokens = [tokens_SB for tokens_SB in tokens if tokens_SB.numel()]
        hidden = [torch.zeros(*tokens_SB.shape, self._spec.source.hidden_size) for tokens_SB in tokens]
        for first, rows_VH in self._rows(EMBEDDING_KEY):
            for tokens_SB, hidden_SBH in zip(tokens, hidden, strict=True):
                here = (tokens_SB >= first) & (tokens_SB < first + len(rows_VH))
                hidden_SBH[here] = rows_VH[tokens_SB[here] - first].float()
        whole = [hidden_SBH.to(self._device) for hidden_SBH in hidden]
        return [_State(hidden_SBH, hidden_SBH[..., self._hidden]) for hidden_SBH in whole]


def _corrected(weight: Tensor, correction: Tensor) -> Tensor:
    """A weight with its correction added in fp32, in its own dtype and place."""
    return (weight.float() + correction.to(weight.device)).to(weight.dtype)
