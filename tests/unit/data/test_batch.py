"""A batch cut for context parallelism, worked by hand."""

import pytest
import torch

from minitron.data.batch import NO_SAMPLE, Batch
from minitron.parallel.context import context_positions, gathered_positions


@pytest.mark.parametrize(
    ("length", "rank", "size", "positions"),
    [
        (8, 0, 1, [0, 1, 2, 3, 4, 5, 6, 7]),
        (8, 0, 2, [0, 1, 6, 7]),
        (8, 1, 2, [2, 3, 4, 5]),
        (12, 0, 3, [0, 1, 10, 11]),
        (12, 1, 3, [2, 3, 8, 9]),
        (12, 2, 3, [4, 5, 6, 7]),
    ],
)
def test_positions_by_hand(length: int, rank: int, size: int, positions: list[int]) -> None:
    assert context_positions(length, rank=rank, size=size).tolist() == positions


def test_gathered_positions_by_hand() -> None:
    assert gathered_positions(8, size=2).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]


def test_every_rank_has_as_many_pairs() -> None:
    """A query at position p sees p + 1 keys."""
    pairs = {int((context_positions(24, rank=rank, size=3) + 1).sum()) for rank in range(3)}
    assert pairs == {24 * 25 // 2 // 3}


def test_shard_cuts_everything_alike_and_keeps_the_whole_count() -> None:
    tokens_BT = torch.arange(18).view(2, 9)
    batch = Batch(
        tokens_BS=tokens_BT[:, :-1],
        labels_BS=tokens_BT[:, 1:],
        position_ids_BS=torch.arange(8).repeat(2, 1),
        loss_mask_BS=torch.tensor([[1.0] * 8, [0.0] * 8]),
        sample_index_B=torch.tensor([7, NO_SAMPLE]),
    )
    assert batch.context_shard(rank=0, size=1) is batch
    shard = batch.context_shard(rank=1, size=2).to(torch.device("cpu"))
    assert shard.tokens_BS.tolist() == [[2, 3, 4, 5], [11, 12, 13, 14]]
    assert shard.labels_BS.tolist() == [[3, 4, 5, 6], [12, 13, 14, 15]]
    assert shard.position_ids_BS.tolist() == [[2, 3, 4, 5]] * 2
    assert shard.loss_mask_BS.tolist() == [[1.0] * 4, [0.0] * 4]
    assert shard.sample_index_B.tolist() == [7, NO_SAMPLE]
    assert shard.seq_length == batch.seq_length == 8
    assert float(shard.num_loss_tokens) == float(batch.num_loss_tokens) == 8
    with pytest.raises(AssertionError, match="cut already"):
        shard.context_shard(rank=0, size=2)
