"""The losses a user calls: their checks, and the jobs they give to the chunk engine."""

import torch
import torch.distributed as dist
from torch import Tensor

from minitron.errors import ConfigError, DataError, LayoutError
from minitron.losses.divergence import cross_entropy, forward_kl
from minitron.losses.engine import Job, choose_chunk_tokens, linear_loss, logits_loss
from minitron.losses.vocab import VocabShard

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def linear_kl(
    student_hidden_TH: Tensor,
    student_weight_vH: Tensor,
    teacher_hidden_TH: Tensor,
    teacher_weight_vH: Tensor,
    *,
    vocab_size: int,
    tp_group: dist.ProcessGroup | None = None,
    token_weights_T: Tensor | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Weighted sum of the tokens' KL(teacher || student), temperature 1, output layers included.

    Under tensor parallelism every rank passes the same hidden states (all tokens) and its own rows
    of the weights, and gets the same loss. The weight's gradient is complete for these rows. **The
    hidden state's gradient is this rank's partial sum**, over its own vocabulary rows: the true one
    is the sum over ``tp_group``. So pass the hidden state once, and only once, through Megatron's
    ``copy_to_tensor_model_parallel_region`` (its backward all-reduces) or, with sequence
    parallelism, ``gather_from_sequence_parallel_region(..., tensor_parallel_output_grad=True)``
    (its backward reduce-scatters).

    The teacher's tensors and the token weights get no gradient. Student and teacher may differ in
    hidden size and dtype.

    Args:
        student_hidden_TH: student's final hidden state.
        student_weight_vH: this rank's rows of the student's output layer.
        teacher_hidden_TH: teacher's final hidden state.
        teacher_weight_vH: this rank's rows of the teacher's output layer, as many as the student's.
        vocab_size: true vocabulary size; rows beyond it are left out and get zero gradient.
        tp_group: tensor-parallel group, None for a single rank.
        token_weights_T: weight of each token; None is 1 for all. Zero leaves a token out.
        chunk_tokens: tokens per matrix product; None chooses by the bytes of a chunk of logits.

    Returns:
        Scalar in nats, fp32 (fp64 for fp64 students).

    Raises:
        LayoutError: shapes that do not fit each other, or fewer rows than ``vocab_size``.
        ConfigError: dtypes or devices that do not fit each other.
    """
    _check_linear("student", student_hidden_TH, student_weight_vH)
    _check_linear("teacher", teacher_hidden_TH, teacher_weight_vH)
    _check_pair(student_hidden_TH, teacher_hidden_TH)
    num_tokens, num_columns = student_hidden_TH.shape[0], student_weight_vH.shape[0]
    if teacher_weight_vH.shape[0] != num_columns:
        raise LayoutError(
            f"student's output layer has {num_columns} rows on this rank, the teacher's "
            f"{teacher_weight_vH.shape[0]}: pad both vocabularies to the same size"
        )
    vocab = VocabShard.build(vocab_size, num_columns, tp_group)
    chunk_tokens = choose_chunk_tokens(chunk_tokens, student_hidden_TH, vocab)
    teacher_hidden_TH = teacher_hidden_TH.detach()
    teacher_rows_vH = teacher_weight_vH.detach()[: vocab.num_valid]
    teacher_Cv = teacher_hidden_TH.new_empty(min(chunk_tokens, num_tokens), vocab.num_valid)

    def teacher_logits(tokens: slice) -> Tensor:
        hidden_CH = teacher_hidden_TH[tokens]
        return torch.mm(hidden_CH, teacher_rows_vH.t(), out=teacher_Cv[: hidden_CH.shape[0]])

    weight_T = _token_weights(token_weights_T, student_hidden_TH)
    job = Job(forward_kl, teacher_logits, weight_T, vocab, chunk_tokens)
    return linear_loss(student_hidden_TH, student_weight_vH, job)


def linear_cross_entropy(
    hidden_TH: Tensor,
    weight_vH: Tensor,
    labels_T: Tensor,
    *,
    vocab_size: int,
    tp_group: dist.ProcessGroup | None = None,
    token_weights_T: Tensor | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Weighted sum of the tokens' cross-entropy, output layer included.

    Tensor parallelism, the partial gradient of the hidden state, token weights and chunks are as in
    `linear_kl`.

    Args:
        hidden_TH: final hidden state.
        weight_vH: this rank's rows of the output layer.
        labels_T: token ids in [0, vocab_size), int64, equal on all ranks. Masked tokens need a
            valid id and weight 0.
        vocab_size: true vocabulary size; rows beyond it are left out and get zero gradient.
        tp_group: tensor-parallel group, None for a single rank.
        token_weights_T: weight of each token; None is 1 for all.
        chunk_tokens: tokens per matrix product; None chooses by the bytes of a chunk of logits.

    Returns:
        Scalar in nats, fp32 (fp64 for fp64 inputs). On a GPU, where looking at the labels would
        wait for the device, a label outside the vocabulary makes it NaN.

    Raises:
        LayoutError: shapes that do not fit each other, or fewer rows than ``vocab_size``.
        ConfigError: dtypes or devices that do not fit each other.
        DataError: a label outside the vocabulary (checked on the CPU).
    """
    _check_linear("model", hidden_TH, weight_vH)
    vocab = VocabShard.build(vocab_size, weight_vH.shape[0], tp_group)
    _check_labels(labels_T, hidden_TH, vocab_size)
    weight_T = _token_weights(token_weights_T, hidden_TH)
    chunk_tokens = choose_chunk_tokens(chunk_tokens, hidden_TH, vocab)
    job = Job(cross_entropy, labels_T.__getitem__, weight_T, vocab, chunk_tokens)
    return linear_loss(hidden_TH, weight_vH, job)


def kl_from_logits(
    student_logits_Tv: Tensor,
    teacher_logits_Tv: Tensor,
    *,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    token_weights_T: Tensor | None = None,
) -> Tensor:
    """Weighted sum of the tokens' KL(teacher || student), from logits that exist already.

    The student's gradient, complete for these columns, is the only large allocation. The teacher
    and the token weights get no gradient.

    Args:
        student_logits_Tv: this rank's columns of the student's logits, finite.
        teacher_logits_Tv: this rank's columns of the teacher's logits, finite.
        vocab_size: true vocabulary size, None when no column is padding; columns beyond it are left
            out and get zero gradient.
        tp_group: tensor-parallel group, None for a single rank.
        token_weights_T: weight of each token; None is 1 for all.

    Returns:
        Scalar in nats, fp32 (fp64 for fp64 students).

    Raises:
        LayoutError: shapes that do not fit each other, or fewer columns than ``vocab_size``.
        ConfigError: dtypes or devices that do not fit each other.
    """
    _check_matrix("student's logits", student_logits_Tv)
    _check_matrix("teacher's logits", teacher_logits_Tv)
    _check_pair(student_logits_Tv, teacher_logits_Tv)
    if student_logits_Tv.shape[1] != teacher_logits_Tv.shape[1]:
        raise LayoutError(
            f"student's logits have {student_logits_Tv.shape[1]} columns on this rank, the teacher's "
            f"{teacher_logits_Tv.shape[1]}: pad both vocabularies to the same size"
        )
    vocab = VocabShard.build(vocab_size, student_logits_Tv.shape[1], tp_group)
    teacher_logits_Tv = teacher_logits_Tv.detach()[:, : vocab.num_valid]
    weight_T = _token_weights(token_weights_T, student_logits_Tv)
    job = Job(forward_kl, teacher_logits_Tv.__getitem__, weight_T, vocab, student_logits_Tv.shape[0])
    return logits_loss(student_logits_Tv, job)


def _token_weights(token_weights_T: Tensor | None, tokens: Tensor) -> Tensor:
    """Token weights in the dtype of the computation."""
    dtype = torch.float64 if tokens.dtype == torch.float64 else torch.float32
    if token_weights_T is None:
        return tokens.new_ones(tokens.shape[0], dtype=dtype)
    if token_weights_T.shape != tokens.shape[:1]:
        raise LayoutError(
            f"token weights have shape {list(token_weights_T.shape)}, expected [{tokens.shape[0]}], one per token"
        )
    return token_weights_T.detach().to(device=tokens.device, dtype=dtype)


def _check_matrix(name: str, tensor: Tensor) -> None:
    if tensor.dim() != 2:
        raise LayoutError(f"{name}: shape {list(tensor.shape)}, expected two dimensions; flatten the tokens first")
    if tensor.dtype not in _DTYPES:
        raise ConfigError(f"{name}: {tensor.dtype}, expected bf16, fp16, fp32 or fp64")


def _check_linear(who: str, hidden_TH: Tensor, weight_vH: Tensor) -> None:
    _check_matrix(f"{who}'s hidden state", hidden_TH)
    _check_matrix(f"{who}'s output layer", weight_vH)
    if hidden_TH.shape[1] != weight_vH.shape[1]:
        raise LayoutError(
            f"{who}'s hidden state has {hidden_TH.shape[1]} channels, its output layer takes {weight_vH.shape[1]}"
        )
    if hidden_TH.dtype != weight_vH.dtype or hidden_TH.device != weight_vH.device:
        raise ConfigError(
            f"{who}'s hidden state is {hidden_TH.dtype} on {hidden_TH.device}, its output layer "
            f"{weight_vH.dtype} on {weight_vH.device}: both need the same"
        )


def _check_pair(student: Tensor, teacher: Tensor) -> None:
    if student.shape[0] != teacher.shape[0]:
        raise LayoutError(f"student has {student.shape[0]} tokens, teacher {teacher.shape[0]}: both need the same")
    if student.device != teacher.device:
        raise ConfigError(f"student is on {student.device}, teacher on {teacher.device}: move one of them")


def _check_labels(labels_T: Tensor, hidden_TH: Tensor, vocab_size: int) -> None:
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
