"""One micro-batch of token sequences."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minitron.parallel.context import context_positions
from minitron.parallel.groups import Groups

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
            A micro-batch's loss is the mean over its mask; a step's is the mean over its micro-batches and DP ranks.
        sample_index_B: which sequence of its split each row is, int64, on the host; `NO_SAMPLE` on rows
            that only fill up. With the dataset and the sequence length it names the row's content, whatever the run.
        context_parallel_size: ranks that share the sequences; S is this rank's part of them.
        whole_loss_tokens: sum of the mask over the whole sequences, where S is a part; see `num_loss_tokens`.
    """

    tokens_BS: Tensor
    labels_BS: Tensor
    position_ids_BS: Tensor
    loss_mask_BS: Tensor
    sample_index_B: Tensor
    context_parallel_size: int = 1
    whole_loss_tokens: Tensor | None = None

    @property
    def seq_length(self) -> int:
        """Tokens of a whole sequence, whichever part of it is here."""
        return self.tokens_BS.shape[1] * self.context_parallel_size

    @property
    def num_loss_tokens(self) -> Tensor:
        """Sum of the mask over the whole sequences, a scalar equal on all ranks that share them."""
        return self.loss_mask_BS.sum() if self.whole_loss_tokens is None else self.whole_loss_tokens

    def on_rank(self, groups: Groups, device: torch.device) -> "Batch":
        """What a rank works on: its part of the sequences, on its device."""
        return self.context_shard(rank=groups.cp_rank, size=groups.cp.size()).to(device)

    def context_shard(self, *, rank: int, size: int) -> "Batch":
        """Cut out the part of the sequences that one context-parallel rank holds; the positions tell which.

        Args:
            rank: place in the context-parallel group.
            size: ranks of the group.
        """
        if size == 1:
            return self
        assert self.context_parallel_size == 1, "the batch is cut already"
        here = context_positions(self.seq_length, rank=rank, size=size).to(self.tokens_BS.device)
        return replace(
            self,
            tokens_BS=self.tokens_BS[:, here],
            labels_BS=self.labels_BS[:, here],
            position_ids_BS=self.position_ids_BS[:, here],
            loss_mask_BS=self.loss_mask_BS[:, here],
            context_parallel_size=size,
            whole_loss_tokens=self.num_loss_tokens,
        )

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device, without a wait (see `to_device`)."""
        whole = self.whole_loss_tokens
        return replace(
            self,
            tokens_BS=to_device(self.tokens_BS, device),
            labels_BS=to_device(self.labels_BS, device),
            position_ids_BS=to_device(self.position_ids_BS, device),
            loss_mask_BS=to_device(self.loss_mask_BS, device),
            whole_loss_tokens=None if whole is None else to_device(whole, device),
        )


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a tensor; to a GPU through pinned memory, so that the host does not wait for the copy."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
