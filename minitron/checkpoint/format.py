"""Boxes of Megatron's ``torch_dist`` checkpoint format.

The format, as seen in torch 2.13 and megatron-core 0.19.2 (`torch.distributed.checkpoint` files of
version 1.0.0, plus the two entries `megatron.core.dist_checkpointing` adds):

* ``__{rank}_{n}.distcp``: `torch.save` archives, one per box, one after another;
* ``.metadata``: a pickled `Metadata`: shape, dtype and boxes of each tensor, and where they lie;
* ``common_state/shard_0_1`` inside it: the non-tensor part, ``[dict]``;
* ``metadata.json``: names the format.
"""

import errno
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch

from minitron.errors import ArtefactError, CheckpointError

Shape = tuple[int, ...]

METADATA_FILE = ".metadata"
FORMAT_FILE = "metadata.json"
COMMON_STATE = "common_state/shard_0_1"  # ShardedObject("common_state", ...).unique_key
EXTRA_STATE = "_extra_state"  # Transformer Engine's FP8 history: per layer, meaningless once sliced


@dataclass(frozen=True)
class StoredBox:
    """One box of a global tensor, and the archive that holds it.

    Attributes:
        key: The tensor's key.
        dtype: Element type.
        global_shape: Shape of the whole tensor.
        offsets: First index of the box in every dimension.
        lengths: Extent of the box in every dimension.
        file: Name of the file inside the checkpoint folder.
        start: First byte of the archive in the file.
        num_bytes: Length of the archive.
    """

    key: str
    dtype: torch.dtype
    global_shape: Shape
    offsets: Shape
    lengths: Shape
    file: str
    start: int
    num_bytes: int


def is_inside(offsets: Sequence[int], lengths: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether a box that is not empty lies inside a tensor of the given shape."""
    if not len(offsets) == len(lengths) == len(shape):
        return False
    return all(
        start >= 0 and length > 0 and start + length <= size
        for start, length, size in zip(offsets, lengths, shape, strict=True)
    )


def by_key(boxes: Iterable[StoredBox]) -> dict[str, list[StoredBox]]:
    """Boxes of each tensor, in the order given."""
    found: dict[str, list[StoredBox]] = defaultdict(list)
    for box in boxes:
        found[box.key].append(box)
    return dict(found)


def check_tiling(boxes: Iterable[StoredBox]) -> None:
    """Check that the boxes of every tensor fill it exactly.

    Boxes inside a shape do so when no two overlap and their volumes add up.

    Raises:
        CheckpointError: Boxes overlap, leave a hole, or disagree on shape or dtype.
    """
    for key, of_key in by_key(boxes).items():
        kinds = sorted({f"{box.dtype} {box.global_shape}" for box in of_key})
        if len(kinds) > 1:
            raise CheckpointError(f"{key}: written as {' and as '.join(kinds)}; a tensor has one shape and one dtype")
        low = np.array([box.offsets for box in of_key], dtype=np.int64)
        high = low + np.array([box.lengths for box in of_key], dtype=np.int64)
        for n, box in enumerate(of_key):
            clash = np.all((low[n] < high[n + 1 :]) & (low[n + 1 :] < high[n]), axis=1)
            if clash.any():
                other = of_key[n + 1 + int(clash.argmax())]
                raise CheckpointError(
                    f"{key}: the boxes of shapes {box.lengths} at {box.offsets} and "
                    f"{other.lengths} at {other.offsets} overlap"
                )
        written = sum(prod(box.lengths) for box in of_key)
        shape = of_key[0].global_shape
        if written != prod(shape):
            raise CheckpointError(f"{key}: {written} of the {prod(shape)} elements of shape {shape} were written")


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what the disk says into one line.

    Raises:
        ArtefactError: An `OSError` came up, a full disk for instance.
    """
    try:
        yield
    except OSError as error:
        raise ArtefactError(f"cannot write {path}: {_reason(error)}") from error
    except RuntimeError as error:
        # torch.save closes its archive after a failed write, and reports only that this failed too.
        if not isinstance(error.__context__, OSError):
            raise
        raise ArtefactError(f"cannot write {path}: {_reason(error.__context__)}") from error


def _reason(error: OSError) -> str:
    return "no space left" if error.errno == errno.ENOSPC else error.strerror or str(error)
