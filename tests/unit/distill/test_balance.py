"""What brings a loss to the size of another, by hand."""

import pytest
import torch

from minitron.distill.balance import factor_to_size


@pytest.mark.parametrize(
    ("loss", "of", "factor"), [(4.0, 2.0, 0.5), (4.0, -2.0, 0.5), (0.0, 2.0, 0.0), (0.0, 0.0, 0.0), (4.0, 0.0, 0.0)]
)
def test_factor(loss: float, of: float, factor: float) -> None:
    have = factor_to_size(torch.tensor(loss), torch.tensor(of))
    assert have.dtype == torch.float32
    assert have.item() == factor
