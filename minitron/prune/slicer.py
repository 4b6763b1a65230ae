"""Applying a prune spec: slice one parameter, or stream a whole checkpoint through."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed import ProcessGroup

from minitron.checkpoint.folder import (
    WEIGHTS_DIR,
    copy_side_files,
    read_model_config,
    side_dir,
    weights_dir,
    write_model_config,
)
from minitron.checkpoint.store import CheckpointReader, CheckpointWriter
from minitron.checkpoint.stream import CHUNK_BYTES, Memory, Workspace, deal, fresh_memory, read_ahead
from minitron.errors import CheckpointError, PruneError
from minitron.models.axes import Dim, Indices, ParamAxes, global_shape, kept_positions, layer_shape, params_of
from minitron.models.hf_names import blocks
from minitron.prune.head_residual import merge_heads
from minitron.prune.spec import PruneSpec

_CACHED_BYTES = 2**19
"""Rows that are taken apart at a time."""

_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Types that NumPy knows, by the bytes of an element."""


@dataclass(frozen=True)
class SliceItem:
    """One read and one write of the streaming pass.

    Attributes:
        param: The parameter.
        layer: Number of the layer in the pruned model; None outside the layers.
        expert: Number of the expert in the pruned layer, where each has its own parameter.
        rows: First row and number of rows, for a chunk of an embedding; else None.
    """

    param: ParamAxes
    layer: int | None
    rows: tuple[int, int] | None = None
    expert: int | None = None


class Fitted(Protocol):
    """Weights that take the place of sliced ones (`minitron.prune.reconstruct`).

    Attributes:
        keys: Checkpoint keys of the parameters that it gives, for every layer.
    """

    keys: Collection[str]

    def __iter__(self) -> Iterator[tuple[SliceItem, Tensor]]:
        """The weights in the pruned shape; the same on every rank, all of which go through them together."""


def slice_param(
    param: ParamAxes,
    tensor: Tensor,
    layer: int | None,
    spec: PruneSpec,
    memory: Memory = fresh_memory,
    expert: int | None = None,
) -> Tensor:
    """The part of one parameter that the pruned model keeps.

    Vocabulary rows are never pruned, so a chunk of an embedding's rows may be given.

    Args:
        param: The parameter's axes.
        tensor: One layer (one expert) of it in the source, without the dimensions it is stacked over, or all of it
            when the checkpoint does not stack it.
        layer: Number of the layer in the pruned model; None when not stacked.
        spec: What to keep.
        memory: Where to put what is taken out of the tensor.
        expert: Number of the expert in the pruned layer, where each has its own.
    """
    tensor = merge_heads(param, tensor, layer, spec)
    kept = spec.kept(layer, expert)
    positions = [
        np.arange(size) if dim is Dim.vocab else kept_positions(dim, spec.source, kept)
        for dim, size in zip(param.dims, tensor.shape, strict=True)
    ]
    shape = tuple(map(len, positions))
    if shape == tensor.shape:
        return tensor
    units = tensor.view(_SAME_SIZE[tensor.element_size()]).numpy()
    out = memory(prod(shape) * units.itemsize).view(units.dtype).reshape(shape)
    _take(units, positions, out)
    return torch.from_numpy(out).view(tensor.dtype)


def _take(units: NDArray[Any], positions: Sequence[Indices], out: NDArray[Any]) -> None:
    """Rows, or rows and columns. NumPy takes elements of a row three times as fast as torch does on a CPU."""
    rows, *columns = positions
    if not columns or len(columns[0]) == units.shape[1]:
        np.take(units, rows, axis=0, out=out, mode="clip")  # the default mode makes a copy of out
        return
    step = max(1, _CACHED_BYTES // (units.shape[1] * units.itemsize))
    for first in range(0, len(rows), step):
        block = slice(first, first + step)
        np.take(units[rows[block]], columns[0], axis=1, out=out[block], mode="clip")


def slice_items(spec: PruneSpec, element_sizes: Mapping[str, int]) -> Iterator[tuple[SliceItem, int]]:
    """Every item of the pruned checkpoint with the bytes to read for it, layer by layer, as import wrote the source.

    Args:
        spec: What to keep.
        element_sizes: Bytes of one element, by parameter key.
    """
    for param, index in blocks(spec.target):
        shape = layer_shape(param, spec.source)
        element, row = element_sizes[param.key], prod(shape[1:])
        if param.stacked or param.dims[0] is not Dim.vocab:
            layer, expert = (*index, None, None)[:2]
            yield SliceItem(param, layer, expert=expert), shape[0] * row * element
            continue
        step = max(1, CHUNK_BYTES // (row * element))
        for first in range(0, shape[0], step):
            rows = min(step, shape[0] - first)
            yield SliceItem(param, None, (first, rows)), rows * row * element


def apply_spec(
    spec: PruneSpec,
    *,
    source: Path,
    out: Path,
    rank: int = 0,
    world_size: int = 1,
    group: ProcessGroup | None = None,
    fitted: Fitted | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write the pruned checkpoint folder, streaming; any number of ranks gives the same bytes.

    Each rank writes one slice while it reads the next. Items are dealt over the ranks by their size.

    Args:
        spec: What to keep.
        source: Checkpoint folder of the source model.
        out: Checkpoint folder to make.
        rank: This rank.
        world_size: Number of ranks that share the work.
        group: Their process group; None when alone.
        fitted: Weights to write in place of sliced ones, in the source's dtype.
        on_progress: Called after each item of this rank with items done and items in all.

    Raises:
        PruneError: The folder's architecture is not the spec's source.
        CheckpointError: A tensor is missing, is not known, or has another shape.
    """
    spec.validate()
    if read_model_config(source) != spec.source:
        raise PruneError(
            f"{source}: model.json is not the architecture that the prune spec was made for; prune this model again"
        )
    side_dir(source)  # missing: an error on every rank, now, and not on rank 0 while others wait
    reader = CheckpointReader(weights_dir(source))
    _check_tensors(spec, {key: tuple(info.shape) for key, info in reader.tensors.items()}, source)
    writer = CheckpointWriter(out / WEIGHTS_DIR, rank=rank, world_size=world_size)
    if rank == 0:
        write_model_config(out, spec.target)
        copy_side_files(source, out)
    sizes = {key: info.dtype.itemsize for key, info in reader.tensors.items()}
    todo = (pair for pair in slice_items(spec, sizes) if fitted is None or pair[0].param.key not in fitted.keys)
    items = deal(todo, rank=rank, world_size=world_size)
    for done, (item, kept) in enumerate(read_ahead(items, _Slicing(spec, reader).read), start=1):
        _write_item(item, kept, spec, writer)
        if on_progress is not None:
            on_progress(done, len(items))
    for number, (item, weight) in enumerate(fitted or ()):
        if number % world_size == rank:
            _write_item(item, weight, spec, writer)
    writer.finish(group)


def _write_item(item: SliceItem, kept: Tensor, spec: PruneSpec, writer: CheckpointWriter) -> None:
    """Write one item in the pruned shape, without the dimensions it is stacked over."""
    _, index = spec.places(item.layer, item.expert)
    first = item.rows[0] if item.rows is not None else 0
    offsets = (*index, first, *[0] * (kept.dim() - 1))
    whole = kept.reshape(*[1] * len(index), *kept.shape).contiguous()
    writer.write(item.param.key, whole, global_shape=global_shape(item.param, spec.target), offsets=offsets)


class _Slicing:
    """Reads items and slices them, in memory for one source and two results: one is read while the other is written."""

    def __init__(self, spec: PruneSpec, reader: CheckpointReader) -> None:
        self._spec = spec
        self._reader = reader
        self._workspace = Workspace()
        self._turn = 0

    def read(self, item: SliceItem) -> Tensor:
        """Read one item, and slice it; without its layer dimension."""
        spec, param = self._spec, item.param
        shape = list(layer_shape(param, spec.source))
        offsets = [0] * len(shape)
        if item.rows is not None:
            offsets[0], shape[0] = item.rows
        index, _ = spec.places(item.layer, item.expert)
        self._turn = 1 - self._turn
        result = source = self._workspace.memory(f"result {self._turn}")
        if layer_shape(param, spec.source) != layer_shape(param, spec.target):
            source = self._workspace.memory("source")
        tensor = self._reader.read(param.key, (*index, *offsets), (*[1] * len(index), *shape), source)
        return slice_param(param, tensor.reshape(shape), item.layer, spec, result, item.expert)


def _check_tensors(spec: PruneSpec, shapes: Mapping[str, tuple[int, ...]], source: Path) -> None:
    """The checkpoint holds the source's tensors and no other."""
    params = params_of(spec.source)
    known = {param.key for param in params}
    extra = [key for key in shapes if key not in known]
    if extra:
        raise CheckpointError(
            f"{source} holds {len(extra)} tensors that the architecture does not have "
            f"(first: {extra[0]}); it is not a checkpoint of {spec.source.architecture.value}"
        )
    for param in params:
        want = global_shape(param, spec.source)
        have = shapes.get(param.key)
        if have is None:
            raise CheckpointError(f"{source} lacks {param.key}; import the model again")
        # Tensor parallelism may have padded the vocabulary; the padding is not copied.
        padded = param.dims[0] is Dim.vocab and len(have) == len(want) and have[0] >= want[0]
        if have != want and not (padded and have[1:] == want[1:]):
            raise CheckpointError(
                f"{source}: {param.key} has shape {have}, but model.json needs {want}; import the model again"
            )
