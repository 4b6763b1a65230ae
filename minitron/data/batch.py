"""One micro-batch of token sequences."""

from dataclasses import dataclass

import torch
from torch import Tensor

NO_SAMPLE = -1
"""Sample index of a row that only fills up a batch, or does not come from a data folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One micro-batch. B is the micro-batch size, S the sequence length.

    Attributes:
        tokens_BS: input ids, int64.
        labels_BS: the ids one position further on, int64.
        position_ids_BS: 0 to S - 1 in each row, int64; documents inside a row do not restart it.
        loss_mask_BS: float32; 1 everywhere, or 0 throughout a row that only fills up the batch.
            Losses are divided by the sum of the mask over all micro-batches and DP ranks.
        sample_index_B: which sequence of its split each row is, int64; `NO_SAMPLE` on rows that only
            fill up. With the dataset and S it names the row's content, whatever the run.
    """

    tokens_BS: Tensor
    labels_BS: Tensor
    position_ids_BS: Tensor
    loss_mask_BS: Tensor
    sample_index_B: Tensor

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Batch":
        """Return the batch on a device."""
        return Batch(
            tokens_BS=self.tokens_BS.to(device, non_blocking=non_blocking),
            labels_BS=self.labels_BS.to(device, non_blocking=non_blocking),
            position_ids_BS=self.position_ids_BS.to(device, non_blocking=non_blocking),
            loss_mask_BS=self.loss_mask_BS.to(device, non_blocking=non_blocking),
            sample_index_B=self.sample_index_B,  # looked up on the host
        )
