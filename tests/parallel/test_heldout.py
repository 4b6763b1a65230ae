"""Held-out loss equals transformers' cross-entropy in every layout."""

import math
from pathlib import Path

import pytest
import torch.nn.functional as F

from tests.helpers.pool import WorkerPool
from tests.parallel import workers
from tests.parallel.reference import dense_logits, layout, random_tokens

TOKENS_BT = random_tokens(5, 25, seed=6)


@pytest.mark.parametrize(
    ("axes", "vp"),
    [
        *[(axes, None) for axes in [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (1, 2, 2)]],
        ((1, 2, 1), 2),  # 3 micro-batches: an interleaved schedule takes 4
    ],
)
def test_heldout_loss_is_transformers_cross_entropy(
    pool: WorkerPool, teacher: Path, axes: tuple[int, int, int], vp: int | None
) -> None:
    logits_BSV = dense_logits(teacher / "hf", TOKENS_BT[:, :-1])
    want = float(F.cross_entropy(logits_BSV.flatten(0, 1), TOKENS_BT[:, 1:].flatten()))
    # 5 sequences in micro-batches of 2: the last of each data-parallel rank holds sequences of weight 0.
    job = (teacher / "checkpoint", layout(*axes, vp), TOKENS_BT)
    for result in pool.run(workers.heldout, math.prod(axes), *job, micro_batch_size=2):
        assert result.num_tokens == 5 * 24
        assert result.loss == pytest.approx(want, rel=1e-6)
        assert result.perplexity == pytest.approx(math.exp(want), rel=1e-5)
