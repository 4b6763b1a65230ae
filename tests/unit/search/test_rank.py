import math

import pytest

from minitron.search.rank import best, num_survivors, pareto_front, rank_correlation


def test_best() -> None:
    assert best({"c": 2.0, "b": 1.0, "a": 2.0, "d": 3.0}, 3) == ["b", "a", "c"]


@pytest.mark.parametrize(("number", "factor", "left"), [(8, 2, 4), (7, 2, 4), (1, 2, 1), (7, 3, 3), (18, 4, 5)])
def test_survivors(number: int, factor: int, left: int) -> None:
    assert num_survivors(number, factor) == left


def test_rank_correlation_is_one_minus_squared_rank_differences() -> None:
    """Without ties: 1 - 6 sum d^2 / (n (n^2 - 1)); ranks 1 2 3 4 5 against 2 1 4 3 5 differ by 1 four times."""
    assert rank_correlation([1.0, 2.0, 3.0, 4.0, 5.0], [20.0, 10.0, 40.0, 30.0, 50.0]) == pytest.approx(1 - 24 / 120)
    assert rank_correlation([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == pytest.approx(-1)


def test_ties_share_their_rank() -> None:
    """Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: covariance 4.5 over the root of 4.5 x 5."""
    assert rank_correlation([1.0, 2.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))


def test_no_order_no_correlation() -> None:
    assert rank_correlation([1.0, 2.0], [1.0, 2.0]) is None
    assert rank_correlation([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None


def test_pareto_front() -> None:
    points = {"a": (1.0, 5.0), "b": (2.0, 3.0), "c": (3.0, 3.0), "d": (2.0, 4.0), "e": (4.0, 1.0), "f": (4.0, 1.0)}
    assert pareto_front(points) == {"a", "b", "e", "f"}
