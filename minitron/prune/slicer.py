"""Applying a prune spec: slice one parameter, or stream a whole checkpoint through."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
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
from minitron.errors import CheckpointError, PruneError
from minitron.models.axes import Dim, ParamAxes, global_shape, kept_positions, layer_shape, params_of, stack_shape
from minitron.prune.spec import PruneSpec

CHUNK_BYTES = 64 * 2**20
"""Row chunks of an embedding, so that a rank's memory does not grow with the vocabulary."""


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


def slice_param(
    param: ParamAxes, tensor: Tensor, layer: int | None, spec: PruneSpec, expert: int | None = None
) -> Tensor:
    """The part of one parameter that the pruned model keeps.

    Vocabulary rows are never pruned, so a chunk of an embedding's rows may be given.

    Args:
        param: The parameter's axes.
        tensor: One layer (one expert) of it in the source, without the dimensions it is stacked over, or all of it
            when the checkpoint does not stack it.
        layer: Number of the layer in the pruned model; None when not stacked.
        spec: What to keep.
        expert: Number of the expert in the pruned layer, where each has its own.
    """
    kept = spec.kept(layer, expert)
    for number, dim in enumerate(param.dims):
        if dim is Dim.vocab:
            continue
        positions = torch.from_numpy(kept_positions(dim, spec.source, kept))
        if len(positions) < tensor.shape[number]:
            tensor = tensor.index_select(number, positions.to(tensor.device))
    return tensor


def slice_items(spec: PruneSpec, element_sizes: Mapping[str, int]) -> Iterator[SliceItem]:
    """Every item of the pruned checkpoint, in a fixed order.

    Args:
        spec: What to keep.
        element_sizes: Bytes of one element, by parameter key.
    """
    for param in params_of(spec.source):
        if param.stacked:
            for layer, *expert in np.ndindex(stack_shape(param, spec.target)):
                yield SliceItem(param, layer, expert=expert[0] if expert else None)
        elif param.dims[0] is Dim.vocab:
            size = spec.source.vocab_size
            step = max(1, CHUNK_BYTES // (spec.source.hidden_size * element_sizes[param.key]))
            for first in range(0, size, step):
                yield SliceItem(param, None, (first, min(step, size - first)))
        else:
            yield SliceItem(param, None)


def apply_spec(
    spec: PruneSpec,
    *,
    source: Path,
    out: Path,
    rank: int = 0,
    world_size: int = 1,
    group: ProcessGroup | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write the pruned checkpoint folder, streaming; any number of ranks gives the same bytes.

    Each rank holds one slice at a time. Items are dealt over the ranks in turn.

    Args:
        spec: What to keep.
        source: Checkpoint folder of the source model.
        out: Checkpoint folder to make.
        rank: This rank.
        world_size: Number of ranks that share the work.
        group: Their process group; None when alone.
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
    items = list(slice_items(spec, sizes))[rank::world_size]
    for done, item in enumerate(items, start=1):
        _copy_item(item, spec, reader, writer)
        if on_progress is not None:
            on_progress(done, len(items))
    writer.finish(group)


def _copy_item(item: SliceItem, spec: PruneSpec, reader: CheckpointReader, writer: CheckpointWriter) -> None:
    """Read, slice and write one item."""
    param, key = item.param, item.param.key
    shape = list(layer_shape(param, spec.source))
    source_index, target_index = spec.places(item.layer, item.expert)
    offsets = [0] * len(shape)
    if item.rows is not None:
        offsets[0], shape[0] = item.rows
    stack = [1] * len(source_index)
    tensor = reader.read(key, (*source_index, *offsets), (*stack, *shape)).reshape(shape)
    kept = slice_param(param, tensor, item.layer, spec, item.expert)
    writer.write(
        key,
        kept.reshape(*stack, *kept.shape).contiguous(),
        global_shape=global_shape(param, spec.target),
        offsets=(*target_index, *offsets),
    )


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
