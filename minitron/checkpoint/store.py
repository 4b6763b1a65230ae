"""Streaming reader and writer of Megatron's ``torch_dist`` checkpoints (laid out as in `format`).

Megatron's own `save` and `load` need a sharded model in memory. Import, pruning and export need
none: they move one slice after another, so their memory is bounded by a slice, and Megatron loads
what was written at any TP x PP x DP.
"""

import contextlib
import json
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import (
    FileSystemReader,
    FileSystemWriter,
    _StorageInfo,  # pickled inside `.metadata`
)
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.checkpoint.utils import _create_file_view

from minitron.checkpoint.format import (
    COMMON_STATE,
    EXTRA_STATE,
    FORMAT_FILE,
    METADATA_FILE,
    Shape,
    StoredBox,
    by_key,
    check_tiling,
    disk_errors,
    is_inside,
)
from minitron.checkpoint.stream import Memory, fresh_memory
from minitron.errors import ArtefactError, CheckpointError


@dataclass(frozen=True)
class TensorInfo:
    """Shape and element type of a whole tensor."""

    shape: Shape
    dtype: torch.dtype


class CheckpointReader:
    """Reads boxes of a ``torch_dist`` checkpoint's tensors, whatever layout saved it.

    Only stored boxes that overlap the one asked for are touched, and of those only the rows needed.

    Args:
        path: The folder that holds ``.metadata``.

    Attributes:
        tensors: Every tensor by key; FP8 history (``_extra_state``) is left out.
        extra_states: Keys of what layers keep beside their weights; a CPU's layers and a GPU's have different ones.

    Raises:
        CheckpointError: The folder or a file is missing, cut short, or of another format.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        metadata = _metadata(self.path)
        self._boxes = by_key(_stored_boxes(metadata))
        self._check_files()
        self.tensors: Mapping[str, TensorInfo] = {
            key: TensorInfo(boxes[0].global_shape, boxes[0].dtype) for key, boxes in self._boxes.items()
        }
        objects = (key.partition("/shard_")[0] for key in metadata.state_dict_metadata)
        self.extra_states = frozenset(key for key in objects if key.endswith(EXTRA_STATE))

    def read(
        self,
        key: str,
        offsets: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        memory: Memory = fresh_memory,
    ) -> Tensor:
        """Read one box of a tensor.

        Args:
            key: The tensor's key.
            offsets: Where the box begins; None is the origin.
            lengths: Extent of the box; None is everything from ``offsets`` on.
            memory: Where to read to; whoever gives memory that is used again must be done with what was read before.

        Returns:
            A contiguous CPU tensor of shape ``lengths``.

        Raises:
            CheckpointError: No such key, a box outside the tensor, or a part that was never saved.
        """
        if key not in self.tensors:
            raise CheckpointError(f"{self.path} has no tensor {key}; it has {', '.join(sorted(self.tensors))}")
        info = self.tensors[key]
        start = tuple(offsets) if offsets is not None else (0,) * len(info.shape)
        if lengths is None:
            lengths = [size - first for size, first in zip(info.shape, start, strict=False)]
        size = tuple(lengths)
        if not is_inside(start, size, info.shape):
            raise CheckpointError(
                f"{self.path}: {key} has shape {info.shape}; a box of shape {size} at {start} is not inside"
            )
        return self._assemble(key, start, size, info.dtype, memory)

    def _assemble(self, key: str, start: Shape, size: Shape, dtype: torch.dtype, memory: Memory) -> Tensor:
        out: Tensor | None = None
        found = 0
        for box in self._boxes[key]:
            low = tuple(map(max, start, box.offsets))
            stops = zip(start, size, box.offsets, box.lengths, strict=True)
            high = tuple(min(a + m, b + n) for a, m, b, n in stops)
            part = tuple(last - first for first, last in zip(low, high, strict=True))
            if not all(extent > 0 for extent in part):
                continue
            inside = tuple(a - b for a, b in zip(low, box.offsets, strict=True))
            piece = self._read_archive(box, inside, part, memory)
            if part == size:
                return piece.contiguous()
            out = torch.empty(size, dtype=dtype) if out is None else out
            place = tuple(slice(a - b, a - b + n) for a, b, n in zip(low, start, part, strict=True))
            out[place] = piece
            found += prod(part)
        if out is None or found != prod(size):
            raise CheckpointError(
                f"{self.path}: {key}: only {found} of the {prod(size)} elements of the box "
                f"of shape {size} at {start} were saved"
            )
        return out

    def _read_archive(self, box: StoredBox, start: Shape, size: Shape, memory: Memory) -> Tensor:
        """Read a part of one stored box; ``start`` counts from the box's own corner."""
        with (self.path / box.file).open("rb") as stream:
            try:
                view = cast(IO[bytes], _create_file_view(stream, box.start, box.num_bytes))
                # Reads the shape, the strides and the place of the bytes, not the bytes themselves.
                frame = torch.load(view, map_location="meta", weights_only=True)
                if frame.shape == box.lengths and frame.is_contiguous():
                    return _read_rows(stream, box, frame, start, size, memory)
                view.seek(0)
                whole = torch.load(view, map_location="cpu", weights_only=True)
            except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
                raise CheckpointError(
                    f"{self.path / box.file}: {box.key} at {box.offsets} cannot be read: {str(error).splitlines()[0]}"
                ) from error
        place = tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))
        part: Tensor = whole.view(box.lengths)[place]
        return part.clone()

    def _check_files(self) -> None:
        """Find a missing or shortened file before any work starts."""
        ends: dict[str, int] = {}
        for box in (box for boxes in self._boxes.values() for box in boxes):
            ends[box.file] = max(ends.get(box.file, 0), box.start + box.num_bytes)
        for name, end in ends.items():
            file = self.path / name
            if not file.is_file():
                raise CheckpointError(f"{self.path}: the file {name} is missing")
            if file.stat().st_size < end:
                raise CheckpointError(f"{file} is cut short: {file.stat().st_size} of at least {end} bytes")


def _metadata(path: Path) -> Metadata:
    """What ``.metadata`` says."""
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint folder {path}")
    if not (path / METADATA_FILE).is_file():
        raise CheckpointError(f"{path} has no {METADATA_FILE}: not a torch_dist checkpoint, or not a finished one")
    try:
        return FileSystemReader(path).read_metadata()
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError) as error:
        raise CheckpointError(f"{path / METADATA_FILE} cannot be read: {error}") from error


def _stored_boxes(metadata: Metadata) -> list[StoredBox]:
    """Every stored box of every tensor."""
    boxes = []
    for key, tensor in metadata.state_dict_metadata.items():
        if not isinstance(tensor, TensorStorageMetadata) or EXTRA_STATE in key:
            continue
        for chunk in tensor.chunks:
            info = metadata.storage_data[MetadataIndex(key, chunk.offsets)]
            boxes.append(
                StoredBox(
                    key=key,
                    dtype=tensor.properties.dtype,
                    global_shape=tuple(tensor.size),
                    offsets=tuple(chunk.offsets),
                    lengths=tuple(chunk.sizes),
                    file=info.relative_path,
                    start=info.offset,
                    num_bytes=info.length,
                )
            )
    return boxes


def _read_rows(stream: BinaryIO, box: StoredBox, frame: Tensor, start: Shape, size: Shape, memory: Memory) -> Tensor:
    """Read the smallest run of bytes that covers the part, straight from a contiguous archive."""
    split = next((dim for dim, extent in enumerate(size) if extent > 1), max(len(size) - 1, 0))
    strides = frame.stride()
    first = frame.storage_offset() + sum(a * stride for a, stride in zip(start[: split + 1], strides, strict=False))
    shape = (*size[: split + 1], *box.lengths[split + 1 :])
    data = torch.from_numpy(memory(prod(shape) * frame.element_size()))
    # The documented way to find a tensor's bytes in its archive ("Serialization semantics").
    in_archive = frame.untyped_storage()._checkpoint_offset
    assert in_archive is not None
    stream.seek(box.start + in_archive + int(first) * frame.element_size())
    if stream.readinto(memoryview(data.numpy())) != data.numel():  # type: ignore[attr-defined]
        raise EOFError("the file ends inside the tensor")
    part = data.view(frame.dtype).view(shape)
    for dim in range(split + 1, len(size)):
        part = part.narrow(dim, start[dim], size[dim])
    return part


class CheckpointWriter:
    """Writes a ``torch_dist`` checkpoint box by box; keeps nothing but where each box went.

    Every rank of ``world_size`` makes one writer for the same folder, writes its own boxes, and
    calls `finish`.

    Args:
        path: Folder to write; made when it is not there.
        rank: This process's number among the writers.
        world_size: How many processes write.

    Raises:
        ArtefactError: The folder holds a finished checkpoint already, or cannot be written.
    """

    def __init__(self, path: Path, *, rank: int = 0, world_size: int = 1) -> None:
        self.path = Path(path)
        self.rank = rank
        self.world_size = world_size
        self._boxes: list[StoredBox] = []
        self._file_name = f"__{rank}_0.distcp"
        if (self.path / METADATA_FILE).exists():
            raise ArtefactError(f"{self.path} holds a checkpoint already; remove it or write elsewhere")
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._stream = (self.path / self._file_name).open("wb")

    def write(self, key: str, tensor: Tensor, *, global_shape: Sequence[int], offsets: Sequence[int]) -> None:
        """Append one box of the global tensor ``key`` to this rank's file.

        Args:
            key: Megatron's key of the tensor.
            tensor: The box; leading dimensions of one (the layer) included.
            global_shape: Shape of the whole tensor.
            offsets: Where the box begins in every dimension.

        Raises:
            CheckpointError: The box does not lie inside ``global_shape``.
            ArtefactError: The disk is full or cannot be written.
        """
        lengths, shape = tuple(tensor.shape), tuple(global_shape)
        if not is_inside(offsets, lengths, shape):
            raise CheckpointError(f"{key}: a box of shape {lengths} at {tuple(offsets)} is not inside {shape}")
        start, num_bytes = self._append(_packed(tensor))
        self._boxes.append(
            StoredBox(
                key=key,
                dtype=tensor.dtype,
                global_shape=shape,
                offsets=tuple(offsets),
                lengths=lengths,
                file=self._file_name,
                start=start,
                num_bytes=num_bytes,
            )
        )

    def finish(self, group: dist.ProcessGroup | None = None) -> None:
        """Close the files, check that every tensor is complete, and write the metadata.

        Collective over ``group`` when ``world_size`` > 1; every rank raises the same error.

        Args:
            group: The writers, in order of ``rank``; None is the default group.

        Raises:
            CheckpointError: A tensor's boxes overlap, leave a hole, or disagree on shape or dtype.
            ArtefactError: The disk is full or cannot be written.
        """
        error: Exception | None = None
        common = (0, 0)
        try:
            with disk_errors(self.path), contextlib.closing(self._stream):
                if self.rank == 0:
                    common = self._append([{}])
                self._stream.flush()
                os.fsync(self._stream.fileno())
        except ArtefactError as caught:
            error = caught
        gathered = self._gather((error, self._boxes), group)
        if self.rank == 0:
            error = next((e for e, _ in gathered if e is not None), None)
            try:
                if error is None:
                    boxes = [box for _, of_rank in gathered for box in of_rank]
                    check_tiling(boxes)
                    self._write_metadata(boxes, common)
            except (ArtefactError, CheckpointError) as caught:
                error = caught
        error = self._share(error, group)
        if error is not None:
            raise error

    def _append(self, value: Any) -> tuple[int, int]:
        """Pickle a value at the end of this rank's file; return its first byte and its length."""
        with disk_errors(self.path), _without_checksums():
            start = self._stream.tell()
            torch.save(value, self._stream)
            return start, self._stream.tell() - start

    def _gather(
        self, value: tuple[Exception | None, list[StoredBox]], group: dist.ProcessGroup | None
    ) -> list[tuple[Exception | None, list[StoredBox]]]:
        if self.world_size == 1:
            return [value]
        gathered: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        dist.gather_object(value, gathered, group=group, group_dst=0)
        return gathered or []

    def _share(self, error: Exception | None, group: dist.ProcessGroup | None) -> Exception | None:
        """Rank 0's outcome, on every rank; nobody leaves before the metadata is on disk."""
        if self.world_size == 1:
            return error
        shared = [error]
        dist.broadcast_object_list(shared, group=group, group_src=0)
        return shared[0]

    def _write_metadata(self, all_boxes: list[StoredBox], common: tuple[int, int]) -> None:
        tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        results = [_written(MetadataIndex(COMMON_STATE), self._file_name, *common)]
        for key, boxes in by_key(all_boxes).items():
            tensors[key] = TensorStorageMetadata(
                TensorProperties(dtype=boxes[0].dtype),
                torch.Size(boxes[0].global_shape),
                [ChunkStorageMetadata(torch.Size(b.offsets), torch.Size(b.lengths)) for b in boxes],
            )
            results += [
                _written(MetadataIndex(key, box.offsets, n), box.file, box.start, box.num_bytes)
                for n, box in enumerate(boxes)
            ]
        tensors[COMMON_STATE] = BytesStorageMetadata()
        backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        with disk_errors(self.path):
            (self.path / FORMAT_FILE).write_text(json.dumps(backend))
            # Last, and by an atomic rename: a folder with `.metadata` in it is complete.
            FileSystemWriter(self.path).finish(Metadata(tensors), [results])


@contextlib.contextmanager
def _without_checksums() -> Iterator[None]:
    """Let `torch.save` leave checksums out: `torch.load` does not look at them, and they take longer than writing."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _written(index: MetadataIndex, file: str, start: int, num_bytes: int) -> WriteResult:
    return WriteResult(index, num_bytes, _StorageInfo(file, start, num_bytes))


def _packed(tensor: Tensor) -> Tensor:
    """A contiguous CPU tensor with a storage of its own: `torch.save` writes whole storages."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor
