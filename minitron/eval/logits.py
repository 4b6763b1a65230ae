"""Full logits of a model in its parallel layout, for samples and for comparison with another implementation."""

from pathlib import Path

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from minitron.data.batch import NO_SAMPLE, Batch
from minitron.data.loader import heldout_batches
from minitron.models.gpt import Chunks, FinalState
from minitron.parallel.context import whole_sequence
from minitron.parallel.groups import Groups
from minitron.train.heldout import forward_only


def model_logits(
    gpt: Chunks,
    tokens_BS: Tensor,
    groups: Groups,
    *,
    vocab_size: int,
    last_only: bool = False,
) -> Tensor:
    """Logits of every position, on every rank. Materialises them: for a few tokens only.

    Args:
        gpt: This rank's part of the model.
        tokens_BS: Token ids [B, S], the same on every rank.
        groups: This rank's process groups.
        vocab_size: True size of the vocabulary; padding columns are cut off.
        last_only: Only the last position.

    Returns:
        fp32 logits [B, S, V], or [B, 1, V].
    """
    size, length = tokens_BS.shape
    sequence_parallel = gpt.config.sequence_parallel
    # A split sequence must divide; no position sees what comes after it, so what fills it up changes nothing.
    parts = (groups.tp.size() if sequence_parallel else 1) * (2 * groups.cp.size() if groups.cp.size() > 1 else 1)
    tokens_BS = torch.cat([tokens_BS, tokens_BS.new_zeros(size, -length % parts)], dim=1)
    batch = Batch(
        tokens_BS=tokens_BS,
        labels_BS=tokens_BS,
        position_ids_BS=torch.arange(tokens_BS.shape[1], device=tokens_BS.device).repeat(size, 1),
        loss_mask_BS=torch.ones(tokens_BS.shape, device=tokens_BS.device),
        sample_index_B=torch.full((size,), NO_SAMPLE),
    ).on_rank(groups, tokens_BS.device)

    def logits_of(state: FinalState, _batch: Batch) -> Tensor:
        hidden_SBH = state.hidden_SBH
        if sequence_parallel:
            hidden_SBH = gather_from_sequence_parallel_region(hidden_SBH, group=groups.tp)
        hidden_SBH = whole_sequence(hidden_SBH, groups.cp)
        hidden_SBH = hidden_SBH[length - 1 : length] if last_only else hidden_SBH[:length]
        return (hidden_SBH @ state.weight_vH.t()).float().transpose(0, 1).contiguous()

    collected = forward_only(gpt, [batch], logits_of)
    positions = 1 if last_only else length
    full = torch.empty(size, positions, vocab_size, device=tokens_BS.device)
    if groups.is_last_stage:
        shards = [torch.empty_like(collected[0]) for _ in range(groups.tp.size())]
        torch.distributed.all_gather(shards, collected[0], group=groups.tp)
        full.copy_(torch.cat(shards, dim=-1)[..., :vocab_size])
    torch.distributed.broadcast(full, src=groups.last_stage_source, group=groups.pp)
    return full


def greedy_tokens(
    gpt: Chunks, prompt: list[int], groups: Groups, *, num_tokens: int, vocab_size: int, stop: int | None
) -> list[int]:
    """Continue a prompt with the likeliest token each time; no cache, so for short samples only.

    Args:
        gpt: This rank's part of the model, in evaluation mode.
        prompt: Token ids.
        groups: This rank's process groups.
        num_tokens: Most tokens to add.
        vocab_size: True size of the vocabulary.
        stop: Token that ends the sample.

    Returns:
        The added tokens.
    """
    tokens = list(prompt)
    device = next(gpt.parameters()).device
    for _ in range(num_tokens):
        logits = model_logits(gpt, torch.tensor([tokens], device=device), groups, vocab_size=vocab_size, last_only=True)
        tokens.append(int(logits[0, -1].argmax()))
        if tokens[-1] == stop:
            break
    return tokens[len(prompt) :]


def logit_error(ours_BSV: Tensor, theirs_BSV: Tensor) -> float:
    """Largest difference between two sets of logits, relative to the largest logit."""
    return float((ours_BSV - theirs_BSV).abs().max() / theirs_BSV.abs().max())


def example_tokens(data: Path, *, seq_length: int) -> Tensor:
    """A few tokens to compare logits on: the first two held-out sequences, or the one there is, [B, S].

    Args:
        data: The data folder.
        seq_length: Tokens of a sequence.
    """
    batches = heldout_batches(
        data, seq_length=seq_length, micro_batch_size=1, dp_rank=0, dp_size=1, max_tokens=2 * seq_length
    )
    return torch.cat([batch.tokens_BS for batch in batches])
