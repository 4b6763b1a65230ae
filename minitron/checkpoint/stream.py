"""Streaming through a checkpoint: who takes what, reading on while the last piece is written, in memory used again."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

CHUNK_BYTES = 64 * 2**20
"""Rows of an embedding that are held at a time, so that a rank's memory does not grow with the vocabulary."""

Memory = Callable[[int], NDArray[np.uint8]]
"""Gives so many bytes to write to."""


def fresh_memory(num_bytes: int) -> NDArray[np.uint8]:
    """Bytes of their own. NumPy asks for huge pages, which makes the first touch cheaper."""
    return np.empty(num_bytes, dtype=np.uint8)


class Workspace:
    """Memory that is used again: the first touch of fresh memory can cost more than all that is done with it."""

    def __init__(self) -> None:
        self._held: dict[str, NDArray[np.uint8]] = {}

    def memory(self, name: str) -> Memory:
        """The memory of a name, as large as what was asked of it most."""

        def give(num_bytes: int) -> NDArray[np.uint8]:
            if name not in self._held or len(self._held[name]) < num_bytes:
                self._held.pop(name, None)
                self._held[name] = fresh_memory(num_bytes)
            return self._held[name][:num_bytes]

        return give


def deal[T](items: Iterable[tuple[T, int]], *, rank: int, world_size: int) -> list[T]:
    """This rank's part of the work, in order: every item goes to the rank that has least so far.

    Args:
        items: Items with their sizes, in any unit; the same on every rank.
        rank: This rank.
        world_size: Number of ranks that share the work.
    """
    loads = [0] * world_size
    mine = []
    for item, size in items:
        to = loads.index(min(loads))
        loads[to] += size
        if to == rank:
            mine.append(item)
    return mine


def read_ahead[T, R](items: Sequence[T], read: Callable[[T], R]) -> Iterator[tuple[T, R]]:
    """Every item with what was read for it; the next one is read in a thread while the caller works on this one.

    Args:
        items: What to read, in order.
        read: Reads one; what it raises comes up here. Two results exist at a time.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead") as thread:
        pending = thread.submit(read, items[0]) if items else None
        for number, item in enumerate(items, start=1):
            assert pending is not None
            result = pending.result()
            pending = thread.submit(read, items[number]) if number < len(items) else None
            yield item, result
            del result
