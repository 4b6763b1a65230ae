"""Comparing candidates: who goes on, how steady the order is, and who is beaten by none."""

from collections.abc import Mapping, Sequence

import numpy as np


def best(losses: Mapping[str, float], keep: int) -> list[str]:
    """The candidates of lowest loss, the best first; equal losses by name."""
    return sorted(losses, key=lambda name: (losses[name], name))[:keep]


def num_survivors(number: int, factor: int) -> int:
    """Candidates that go on to the next rung: one in ``factor``, rounded up."""
    return -(-number // factor)


def rank_correlation(before: Sequence[float], after: Sequence[float]) -> float | None:
    """Spearman's: the correlation of two orders, equal values sharing their mean rank.

    Returns:
        A number in [-1, 1]; None for fewer than three values, or where all values of one side are equal.
    """
    if len(before) < 3:
        return None
    one, other = _ranks(before), _ranks(after)
    if one.std() == 0 or other.std() == 0:
        return None
    return float(np.corrcoef(one, other)[0, 1])


def pareto_front(points: Mapping[str, tuple[float, float]]) -> set[str]:
    """Who is beaten by none.

    Args:
        points: Cost and loss by name.

    Returns:
        Those for which no other has both at most as high, and one of the two lower.
    """
    return {
        name
        for name, (cost, loss) in points.items()
        if not any(
            other_cost <= cost and other_loss <= loss and (other_cost, other_loss) != (cost, loss)
            for other_cost, other_loss in points.values()
        )
    }


def _ranks(values: Sequence[float]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    array = np.asarray(values, dtype=np.float64)
    below = (array[None, :] < array[:, None]).sum(1)
    equal = (array[None, :] == array[:, None]).sum(1)
    ranks: np.ndarray[tuple[int], np.dtype[np.float64]] = below + (equal - 1) / 2
    return ranks
