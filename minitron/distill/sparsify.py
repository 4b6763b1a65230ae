"""What a cache keeps of the teacher's distributions: draws, the likeliest tokens, and the entropy.

The full logits never exist: they are made for a few tokens at a time, on this rank's columns of the vocabulary,
in the same precision as the online teacher's. Sums over the vocabulary are fp64.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minitron.config.logit_loss import CUDA_CHUNK_BYTES
from minitron.config.teacher_logits import CacheMethod, TeacherLogitsConfig
from minitron.data.order import random_state
from minitron.distill.cache_format import Array, Entries
from minitron.losses.vocab import VocabShard, row_max

DRAW_SEED = 250316870
"""With the sample index, the seed of a sequence's draws: no layout, run or batch size changes them."""

_CHUNK_BYTES = 32 * 2**20
"""Of fp64 sums on a CPU; a GPU takes `CUDA_CHUNK_BYTES`, for products that fill it."""


class _Softmax(NamedTuple):
    """A chunk's distribution, spread over the tensor-parallel ranks.

    Attributes:
        exp_Cv: exp(logit - this rank's maximum).
        log_sum_C: log-sum-exp over the whole vocabulary.
        entropy_C: Entropy of the whole distribution, in nats.
        mass_PC: Share of each rank's columns in the whole distribution.
    """

    exp_Cv: Tensor
    log_sum_C: Tensor
    entropy_C: Tensor
    mass_PC: Tensor


def sparse_entries(
    hidden_SH: Tensor, weight_vH: Tensor, sample: int, settings: TeacherLogitsConfig, vocab: VocabShard
) -> Entries:
    """The entries of one sequence. All ranks of the tensor-parallel group call it together and get the same.

    Args:
        hidden_SH: The teacher's final hidden state.
        weight_vH: This rank's rows of its output layer.
        sample: The sequence's sample index.
        settings: What to keep.
        vocab: This rank's columns.
    """
    length = hidden_SH.shape[0]
    sampled = settings.method is CacheMethod.sampled
    draws_SN = torch.from_numpy(stratified_draws(sample, length, settings.num_draws)) if sampled else None
    budget = CUDA_CHUNK_BYTES if hidden_SH.is_cuda else _CHUNK_BYTES
    chunk = max(1, budget // (8 * vocab.num_columns))
    ids, weights, entropy = [], [], []
    for start in range(0, length, chunk):
        logits_Cv = hidden_SH[start : start + chunk] @ weight_vH[: vocab.num_valid].t()
        logits_Cv = logits_Cv if logits_Cv.dtype is torch.float64 else logits_Cv.float()
        softmax = _softmax(logits_Cv, vocab)
        entropy.append(softmax.entropy_C)
        if draws_SN is not None:
            ids.append(_draw(softmax, draws_SN[start : start + chunk].to(logits_Cv.device), vocab))
            continue
        ids_CK, probs_CK = _likeliest(logits_Cv, softmax.log_sum_C, settings.top_k, vocab)
        ids.append(ids_CK)
        weights.append(probs_CK)
    entropy_S = torch.cat(entropy).cpu().numpy()
    if sampled:
        return _count(torch.cat(ids).cpu().numpy(), entropy_S)
    probs_SK = torch.cat(weights)
    keep_SK = torch.ones_like(probs_SK, dtype=torch.bool)
    if settings.method is CacheMethod.top_p:  # the one that reaches top_p is kept
        keep_SK = probs_SK.cumsum(-1) - probs_SK < settings.top_p
    keep = keep_SK.cpu().numpy()
    return Entries(keep.sum(-1), torch.cat(ids).cpu().numpy()[keep], probs_SK.cpu().numpy()[keep], entropy_S)


def stratified_draws(sample: int, length: int, num_draws: int) -> Array:
    """Uniform numbers [S, N] for the inverse distribution function, ascending for each token.

    One in each of N equal parts of [0, 1). The mean of counts / N is the distribution, as with N independent draws
    (arXiv 2503.16870), and no weighted sum of the counts has a larger variance than with those.
    """
    uniform_SN = random_state(DRAW_SEED, sample).random_sample((length, num_draws))
    draws: Array = (np.arange(num_draws) + uniform_SN) / num_draws
    return draws


def _softmax(logits_Cv: Tensor, vocab: VocabShard) -> _Softmax:
    max_C = row_max(logits_Cv).clamp_(min=torch.finfo(logits_Cv.dtype).min)  # finite on a rank without columns
    shifted_Cv = logits_Cv - max_C[:, None]
    exp_Cv = shifted_Cv.exp()
    sum_C = exp_Cv.sum(-1, dtype=torch.float64)
    dot_C = shifted_Cv.mul_(exp_Cv).sum(-1, dtype=torch.float64)
    parts_P3C = _gather(torch.stack([max_C.double(), sum_C, dot_C]), vocab)
    max_PC, sum_PC, dot_PC = parts_P3C.unbind(1)
    top_C = max_PC.amax(0)
    scale_PC = (max_PC - top_C).exp()
    total_C = (sum_PC * scale_PC).sum(0)
    mean_C = ((dot_PC + (max_PC - top_C) * sum_PC) * scale_PC).sum(0) / total_C
    return _Softmax(exp_Cv, top_C + total_C.log(), total_C.log() - mean_C, sum_PC * scale_PC / total_C)


def _draw(softmax: _Softmax, draws_CN: Tensor, vocab: VocabShard) -> Tensor:
    """Invert the distribution function: the ids of the draws. The rank whose columns a draw hits finds its id."""
    upper_PC = softmax.mass_PC.cumsum(0)
    last = (vocab.vocab_size - 1) // vocab.num_columns  # ranks after it hold padding only
    owner_CN = (draws_CN >= upper_PC[:, :, None]).sum(0).clamp(max=last)
    cdf_Cv = softmax.exp_Cv.cumsum(-1, dtype=torch.float64)
    ids_CN = torch.zeros_like(owner_CN)
    if vocab.num_valid:
        mass_C = softmax.mass_PC[vocab.rank]
        inside_CN = (draws_CN - (upper_PC[vocab.rank] - mass_C)[:, None]) * (cdf_Cv[:, -1] / mass_C)[:, None]
        found_CN = torch.searchsorted(cdf_Cv, inside_CN, right=True).clamp_(max=vocab.num_valid - 1)
        ids_CN = (found_CN + vocab.start).where(owner_CN == vocab.rank, ids_CN)
    if vocab.num_ranks > 1:
        torch.distributed.all_reduce(ids_CN, group=vocab.group)
    return ids_CN


def _likeliest(logits_Cv: Tensor, log_sum_C: Tensor, num: int, vocab: VocabShard) -> tuple[Tensor, Tensor]:
    """Ids and probabilities of the likeliest tokens, the likeliest first."""
    local = min(num, vocab.num_valid)
    best_CK = logits_Cv.new_full((logits_Cv.shape[0], num), -torch.inf, dtype=torch.float64)
    ids_CK = torch.full_like(best_CK, -1, dtype=torch.int64)
    if local:
        found = logits_Cv.topk(local, dim=-1)
        best_CK[:, :local], ids_CK[:, :local] = found.values.double(), found.indices + vocab.start
    best_PCK, ids_PCK = _gather(best_CK, vocab), _gather(ids_CK, vocab)
    chosen = best_PCK.transpose(0, 1).flatten(1).topk(min(num, vocab.vocab_size), dim=-1)
    ids_CK = ids_PCK.transpose(0, 1).flatten(1).gather(1, chosen.indices)
    return ids_CK, (chosen.values - log_sum_C[:, None]).exp()


def _count(ids_SN: Array, entropy_S: Array) -> Entries:
    """Entries from draws in ascending order: equal ids stand side by side."""
    length, num_draws = ids_SN.shape
    first_SN = np.ones(ids_SN.shape, bool)
    first_SN[:, 1:] = ids_SN[:, 1:] != ids_SN[:, :-1]
    starts = np.flatnonzero(first_SN)
    counts = np.diff(starts, append=length * num_draws)
    return Entries(first_SN.sum(-1), ids_SN[first_SN], counts, entropy_S)


def _gather(tensor: Tensor, vocab: VocabShard) -> Tensor:
    """Every rank's tensor, along a new first axis."""
    if vocab.num_ranks == 1:
        return tensor[None]
    flat = tensor.new_empty((vocab.num_ranks * tensor.shape[0], *tensor.shape[1:]))
    torch.distributed.all_gather_into_tensor(flat, tensor.contiguous(), group=vocab.group)
    return flat.view(vocab.num_ranks, *tensor.shape)
