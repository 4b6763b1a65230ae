"""Turn a final hidden state into the flat tokens a fused loss takes, with the right gradient reduction."""

from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from minitron.data.batch import Batch
from minitron.parallel.groups import Groups


def loss_inputs(hidden_SBH: Tensor, batch: Batch, groups: Groups, *, sequence_parallel: bool) -> tuple[Tensor, Tensor]:
    """Flatten a hidden state to tokens, and weigh them so that their losses sum to a mean per token.

    The fused losses return this rank's partial gradient of the hidden state (its slice of the vocabulary).
    Both mappings used here reduce it over the tensor-parallel ranks in the backward pass, as Megatron's own
    output layer does.

    Args:
        hidden_SBH: Final hidden state; its sequence is split over TP under sequence parallelism.
        batch: The micro-batch, with its loss mask.
        groups: This rank's process groups.
        sequence_parallel: Whether the sequence is split.

    Returns:
        Hidden state [T, H] with T = S x B, and token weights [T] that sum to 1 over the
        micro-batch's unmasked tokens (all zero where every sequence only fills up the batch). Under
        context parallelism they sum to 1 over the ranks that share the sequences: each rank's loss is
        its share of the mean, and Megatron's schedule and gradient averaging expect that.
    """
    if sequence_parallel:
        hidden_SBH = gather_from_sequence_parallel_region(hidden_SBH, tensor_parallel_output_grad=True, group=groups.tp)
    else:
        hidden_SBH = copy_to_tensor_model_parallel_region(hidden_SBH, group=groups.tp)
    sequence, size, width = hidden_SBH.shape
    mask_SB = batch.loss_mask_BS.transpose(0, 1)
    weights_T = (mask_SB / batch.num_loss_tokens.clamp_min(1.0)).reshape(-1)
    return hidden_SBH.reshape(sequence * size, width), weights_T
