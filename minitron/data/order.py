"""In which order a run reads the training sequences. Light: planning needs it, and needs no Megatron."""

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


def random_state(*entropy: int) -> np.random.RandomState:
    """A generator for a tuple of numbers.

    ``SeedSequence`` keeps (seed 0, epoch 1) apart from (seed 1, epoch 0); ``RandomState`` is the one
    generator whose stream NumPy promises never to change, which an exact resume depends on.
    """
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence(entropy)))


def epoch_order(num_samples: int, *, seed: int, epoch: int) -> Indices:
    """Sample indices of one epoch in the order they are read.

    Args:
        num_samples: sequences in the training split.
        seed: the run's seed.
        epoch: counted from 0.
    """
    order = np.arange(num_samples, dtype=np.int64)
    random_state(seed, epoch).shuffle(order)
    return order


def samples_of_run(num_samples: int, *, num_positions: int, seed: int) -> Indices:
    """The sample indices that a run reads at least once, ascending.

    Args:
        num_samples: sequences in the training split.
        num_positions: steps x global batch size.
        seed: the run's seed.
    """
    if num_positions >= num_samples:
        return np.arange(num_samples, dtype=np.int64)
    return np.sort(epoch_order(num_samples, seed=seed, epoch=0)[:num_positions])
