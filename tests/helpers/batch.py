"""Micro-batches of given tokens."""

import torch
from torch import Tensor

from minitron.data.batch import NO_SAMPLE, Batch


def batch_of(tokens_BT: Tensor) -> Batch:
    """A micro-batch of sequences that come from no data folder.

    Args:
        tokens_BT: token ids, one more than the sequence length: the last one is a label only.
    """
    size, length = tokens_BT.shape[0], tokens_BT.shape[1] - 1
    return Batch(
        tokens_BS=tokens_BT[:, :-1].contiguous(),
        labels_BS=tokens_BT[:, 1:].contiguous(),
        position_ids_BS=torch.arange(length).repeat(size, 1),
        loss_mask_BS=torch.ones(size, length),
        sample_index_B=torch.full((size,), NO_SAMPLE),
    )
