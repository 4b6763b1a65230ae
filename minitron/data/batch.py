"""One micro-batch of token sequences."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One micro-batch. B is the micro-batch size, S the sequence length.

    Attributes:
        tokens_BS: input ids, int64.
        labels_BS: the ids one position further on, int64.
        position_ids_BS: 0 to S - 1 in each row, int64; documents inside a row do not restart it.
        loss_mask_BS: float32; 1 everywhere, or 0 throughout a row that only fills up the batch.
            Losses are divided by the sum of the mask over all micro-batches and DP ranks.
    """

    tokens_BS: Tensor
    labels_BS: Tensor
    position_ids_BS: Tensor
    loss_mask_BS: Tensor

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device; to a GPU through pinned memory, so that the host does not wait for the copy."""
        return Batch(
            tokens_BS=_moved(self.tokens_BS, device),
            labels_BS=_moved(self.labels_BS, device),
            position_ids_BS=_moved(self.position_ids_BS, device),
            loss_mask_BS=_moved(self.loss_mask_BS, device),
        )


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
