"""The solver by itself, and what it says where there is no solution."""

import pytest
import torch

from minitron.config.reconstruct import Linear, ReconstructConfig
from minitron.errors import ConfigError
from tests.helpers.pool import PoolError, WorkerPool
from tests.unit.prune import workers


def _problem(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(tokens, 6, generator=generator) * torch.tensor([3.0, 1.0, 1.0, 0.1, 2.0, 0.0])
    return inputs, torch.randn(tokens, 4, generator=generator)


@pytest.mark.parametrize("damping", [1e-6, 0.1, 10.0])
def test_solution_is_the_minimum_and_never_raises_the_error(pool: WorkerPool, damping: float) -> None:
    """Over two ranks, with an input that is always 0 and so cannot be solved for without damping."""
    inputs, errors = _problem(50)
    have, other = (d.double() for d in pool.run(workers.solve, 2, inputs, errors, damping))
    assert torch.equal(have, other)
    inputs, errors = inputs.double(), errors.double()
    weight = damping * inputs.square().sum(0).mean()

    def cost(correction: torch.Tensor) -> torch.Tensor:
        return (errors - inputs @ correction.T).square().sum() + weight * correction.square().sum()

    wanted = torch.autograd.functional.jacobian(cost, have)
    assert wanted.abs().max() < 1e-3
    assert (errors - inputs @ have.T).square().sum() < errors.square().sum()


def test_no_finite_solution_is_one_line(pool: WorkerPool) -> None:
    inputs, errors = _problem(5)
    inputs[2, 1] = torch.nan
    with pytest.raises(PoolError, match=r"least squares of linear_fc2 of layer 3 have no finite solution"):
        pool.run(workers.solve, 1, inputs, errors, 0.1)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"damping": 0.0}, r"prune\.reconstruct\.damping=0\.0 must be a number above 0"),
        ({"damping": float("nan")}, r"damping=nan must be"),
        ({"num_samples": 0}, r"prune\.reconstruct\.num_samples=0 must be at least 1"),
        ({"modules": []}, r"prune\.reconstruct\.modules=\[\] must name each linear once"),
        ({"modules": [Linear.linear_fc1] * 2}, r"modules=\['linear_fc1', 'linear_fc1'\] must name each"),
    ],
)
def test_bad_values_are_one_line(changes: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ReconstructConfig(**changes)  # type: ignore[arg-type]
