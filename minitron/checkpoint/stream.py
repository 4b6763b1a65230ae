"""Streaming through a checkpoint: which process takes what, and reading on while the last piece is written."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor


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
