"""What the losses require of their inputs."""

import torch
from torch import Tensor

from minitron.errors import ConfigError, DataError, LayoutError
from minitron.losses.sparse import SparseTarget

_DTYPES = (torch.bfloat16, torch.float32, torch.float64)
"""Not fp16: gradients are written before the backward pass brings its loss scale, and most would be 0."""


def token_weights(token_weights_T: Tensor | None, tokens: Tensor) -> Tensor:
    """Token weights in the dtype of the computation."""
    dtype = torch.float64 if tokens.dtype == torch.float64 else torch.float32
    if token_weights_T is None:
        return tokens.new_ones(tokens.shape[0], dtype=dtype)
    if token_weights_T.shape != tokens.shape[:1]:
        raise LayoutError(
            f"token weights have shape {list(token_weights_T.shape)}, expected [{tokens.shape[0]}], one per token"
        )
    return token_weights_T.detach().to(device=tokens.device, dtype=dtype)


def check_matrix(name: str, tensor: Tensor) -> None:
    """Two dimensions, floating."""
    if tensor.dim() != 2:
        raise LayoutError(f"{name}: shape {list(tensor.shape)}, expected two dimensions; flatten the tokens first")
    if tensor.dtype not in _DTYPES:
        raise ConfigError(f"{name}: {tensor.dtype}, expected bf16, fp32 or fp64")


def check_linear(who: str, hidden_TH: Tensor, weight_vH: Tensor) -> None:
    """A hidden state and the output layer that takes it."""
    check_matrix(f"{who}'s hidden state", hidden_TH)
    check_matrix(f"{who}'s output layer", weight_vH)
    if hidden_TH.shape[1] != weight_vH.shape[1]:
        raise LayoutError(
            f"{who}'s hidden state has {hidden_TH.shape[1]} channels, its output layer takes {weight_vH.shape[1]}"
        )
    if hidden_TH.dtype != weight_vH.dtype or hidden_TH.device != weight_vH.device:
        raise ConfigError(
            f"{who}'s hidden state is {hidden_TH.dtype} on {hidden_TH.device}, its output layer "
            f"{weight_vH.dtype} on {weight_vH.device}: both need the same"
        )


def check_pair(student: Tensor, teacher: Tensor) -> None:
    """As many tokens on both sides, on one device."""
    if student.shape[0] != teacher.shape[0]:
        raise LayoutError(f"student has {student.shape[0]} tokens, teacher {teacher.shape[0]}: both need the same")
    if student.device != teacher.device:
        raise ConfigError(f"student is on {student.device}, teacher on {teacher.device}: move one of them")


def check_labels(labels_T: Tensor, hidden_TH: Tensor, vocab_size: int) -> None:
    """One label per token, inside the vocabulary as far as that is known without waiting for a GPU."""
    if labels_T.shape != hidden_TH.shape[:1]:
        raise LayoutError(f"labels have shape {list(labels_T.shape)}, expected [{hidden_TH.shape[0]}], one per token")
    if labels_T.dtype != torch.int64 or labels_T.device != hidden_TH.device:
        raise ConfigError(f"labels are {labels_T.dtype} on {labels_T.device}, expected int64 on {hidden_TH.device}")
    if labels_T.device.type == "cpu" and labels_T.numel():
        low, high = int(labels_T.min()), int(labels_T.max())
        if low < 0 or high >= vocab_size:
            raise DataError(
                f"labels run from {low} to {high}, outside [0, {vocab_size}): give masked tokens a valid label "
                f"and weight 0"
            )


def check_sparse(target: SparseTarget, hidden_TH: Tensor, vocab_size: int, *, sampled: bool) -> None:
    """One distribution per token; its entries are looked at on the CPU only, a GPU would be waited for."""
    ids_TK, probs_TK, entropy_T = target.ids_TK, target.probs_TK, target.entropy_T
    num_tokens = hidden_TH.shape[0]
    if ids_TK.dim() != 2 or ids_TK.shape[0] != num_tokens or ids_TK.shape[1] < 1:
        raise LayoutError(f"target's ids have shape {list(ids_TK.shape)}, expected [{num_tokens}, K], K at least 1")
    if probs_TK.shape != ids_TK.shape:
        raise LayoutError(
            f"target's probabilities have shape {list(probs_TK.shape)}, its ids {list(ids_TK.shape)}: "
            "both need the same"
        )
    if ids_TK.dtype != torch.int64 or probs_TK.dtype not in _DTYPES:
        raise ConfigError(
            f"target has ids in {ids_TK.dtype} and probabilities in {probs_TK.dtype}, expected int64 and floating"
        )
    if entropy_T is None:
        if sampled:
            raise ConfigError("target is a random sample (rest=None) without entropy_T, which its loss needs: give it")
    elif entropy_T.shape != (num_tokens,):
        raise LayoutError(
            f"target's entropies have shape {list(entropy_T.shape)}, expected [{num_tokens}], one per token"
        )
    devices = {str(x.device) for x in (hidden_TH, ids_TK, probs_TK, entropy_T) if x is not None}
    if len(devices) > 1:
        raise ConfigError(f"hidden state and target are on {sorted(devices)}: move them to one device")
    if ids_TK.device.type == "cpu" and ids_TK.numel():
        _check_entries(ids_TK, probs_TK, vocab_size)


def _check_entries(ids_TK: Tensor, probs_TK: Tensor, vocab_size: int) -> None:
    low, high = int(ids_TK.min()), int(ids_TK.max())
    if low < -1 or high >= vocab_size:
        raise DataError(f"target's ids run from {low} to {high}, outside [0, {vocab_size}) and -1 for unused slots")
    sorted_TK = ids_TK.sort(dim=1).values
    twice_TK = (sorted_TK[:, 1:] == sorted_TK[:, :-1]) & (sorted_TK[:, 1:] >= 0)
    if twice_TK.any():
        token = int(twice_TK.any(1).nonzero()[0])
        raise DataError(f"target of token {token} holds an id twice: add up its probabilities in one slot")
    if not (probs_TK >= 0).all():  # false for nan too
        raise DataError(f"target's probabilities go down to {float(probs_TK.min())}, expected none below 0")
    if probs_TK[ids_TK < 0].any():
        raise DataError("target has a probability in a slot with id -1: set it to 0")
