"""Who takes what, and reading ahead."""

import threading

import pytest

from minitron.checkpoint.stream import Workspace, deal, read_ahead


def test_work_is_dealt_by_size() -> None:
    items = [("a", 5), ("b", 1), ("c", 1), ("d", 3), ("e", 4), ("f", 0)]
    # Loads after each: 5 | 5 1 | 5 1 1 | 5 4 1 | 5 4 5 | 5 4 5; equal loads go to the lower rank.
    by_rank = [deal(items, rank=rank, world_size=3) for rank in range(3)]
    assert by_rank == [["a"], ["b", "d", "f"], ["c", "e"]]
    assert deal(items, rank=0, world_size=1) == list("abcdef")
    assert deal([], rank=1, world_size=2) == []


def test_the_next_is_read_meanwhile() -> None:
    """While an item is worked on the next is read, and no other."""
    started = [threading.Event() for _ in range(4)]

    def read(number: int) -> int:
        started[number].set()
        return number * number

    for number, square in read_ahead(range(4), read):
        assert square == number * number
        if number < 3:
            assert started[number + 1].wait(5)
        if number < 2:
            assert not started[number + 2].is_set()
    assert list(read_ahead([], read)) == []


def test_what_goes_wrong_in_reading_comes_up() -> None:
    def read(number: int) -> int:
        if number == 2:
            raise ValueError("the second")
        return number

    results = read_ahead([1, 2, 3], read)
    assert next(results) == (1, 1)
    with pytest.raises(ValueError, match="the second"):
        next(results)


def test_memory_is_used_again() -> None:
    work = Workspace()
    large = work.memory("a")(8)
    large[:] = 7
    small, other = work.memory("a")(3), work.memory("b")(8)
    assert small.tolist() == [7, 7, 7]
    other[:] = 1
    assert large.tolist() == [7] * 8
    grown = work.memory("a")(9)
    grown[:] = 2
    assert large.tolist() == [7] * 8
    assert work.memory("a")(2).base is grown.base
