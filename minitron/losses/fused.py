"""The losses a user calls: their checks, and the jobs they give to the chunk engine."""

import torch
import torch.distributed as dist
from torch import Tensor

from minitron.config.logit_loss import LogitLossConfig, TopKRest
from minitron.errors import LayoutError
from minitron.losses.checks import check_labels, check_linear, check_matrix, check_pair, check_sparse, token_weights
from minitron.losses.dense import cross_entropy
from minitron.losses.engine import Job, choose_chunk_tokens, linear_loss, logits_loss, workspace
from minitron.losses.select import kernel_of, select
from minitron.losses.sparse import SparseKL, SparseTarget
from minitron.losses.vocab import VocabShard


def linear_distillation(
    student_hidden_TH: Tensor,
    student_weight_vH: Tensor,
    teacher_hidden_TH: Tensor,
    teacher_weight_vH: Tensor,
    *,
    loss: LogitLossConfig,
    vocab_size: int,
    tp_group: dist.ProcessGroup | None = None,
    token_weights_T: Tensor | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Weighted sum of the tokens' divergence between teacher and student, output layers included.

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
        loss: which divergence; times the square of its temperature.
        vocab_size: true vocabulary size, of the smaller vocabulary where one of the two has tokens of
            its own at the end; rows beyond it are left out and get zero gradient.
        tp_group: tensor-parallel group, None for a single rank.
        token_weights_T: weight of each token; None is 1 for all. Zero leaves a token out.
        chunk_tokens: tokens per matrix product; None chooses by the bytes of a chunk of logits.

    Returns:
        Scalar, fp32 (fp64 for fp64 students); divergences are in nats.

    Raises:
        LayoutError: shapes that do not fit each other, or fewer rows than ``vocab_size``.
        ConfigError: dtypes or devices that do not fit each other, or a K larger than the vocabulary.
    """
    check_linear("student", student_hidden_TH, student_weight_vH)
    check_linear("teacher", teacher_hidden_TH, teacher_weight_vH)
    check_pair(student_hidden_TH, teacher_hidden_TH)
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
    teacher_Cv = workspace.chunk("teacher", (min(chunk_tokens, num_tokens), vocab.num_valid), teacher_hidden_TH)

    def teacher_logits(tokens: slice) -> Tensor:
        hidden_CH = teacher_hidden_TH[tokens]
        return torch.mm(hidden_CH, teacher_rows_vH.t(), out=teacher_Cv[: hidden_CH.shape[0]])

    weight_T = token_weights(token_weights_T, student_hidden_TH)
    kernel = kernel_of(loss, student_hidden_TH)
    job = Job(kernel or select(loss, vocab), teacher_logits, weight_T, vocab, chunk_tokens, kernel is not None)
    return linear_loss(student_hidden_TH, student_weight_vH, job)


def linear_sparse_kl(
    student_hidden_TH: Tensor,
    student_weight_vH: Tensor,
    target: SparseTarget,
    *,
    rest: TopKRest | None,
    vocab_size: int,
    tp_group: dist.ProcessGroup | None = None,
    token_weights_T: Tensor | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Weighted sum of the tokens' KL(teacher || student) from a few of the teacher's probabilities, temperature 1.

    Tensor parallelism, the partial gradient of the hidden state, token weights and chunks are as in
    `linear_distillation`.

    Args:
        student_hidden_TH: student's final hidden state.
        student_weight_vH: this rank's rows of the student's output layer.
        target: the teacher's entries, equal on all ranks.
        rest: what becomes of the probability that the target does not hold. None: the entries are a random
            sample with weights such that their mean over draws is the whole distribution (arXiv 2503.16870);
            then value and gradient are unbiased estimates of those of the full KL.
        vocab_size: true vocabulary size; rows beyond it are left out and get zero gradient.
        tp_group: tensor-parallel group, None for a single rank.
        token_weights_T: weight of each token; None is 1 for all.
        chunk_tokens: tokens per matrix product; None chooses by the bytes of a chunk of logits.

    Returns:
        Scalar in nats, fp32 (fp64 for fp64 students). On a GPU, where looking at the ids would wait for the
        device, one outside the vocabulary makes it NaN.

    Raises:
        LayoutError: shapes that do not fit each other, or fewer rows than ``vocab_size``.
        ConfigError: dtypes or devices that do not fit each other, or a sample without entropies.
        DataError: an id outside the vocabulary or twice for one token, a negative probability (looked for on the
            CPU).
    """
    check_linear("student", student_hidden_TH, student_weight_vH)
    vocab = VocabShard.build(vocab_size, student_weight_vH.shape[0], tp_group)
    check_sparse(target, student_hidden_TH, vocab_size, sampled=rest is None)
    weight_T = token_weights(token_weights_T, student_hidden_TH)
    chunk_tokens = choose_chunk_tokens(chunk_tokens, student_hidden_TH, vocab)
    job = Job(SparseKL(rest), target.__getitem__, weight_T, vocab, chunk_tokens)
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
    `linear_distillation`.

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
    check_linear("model", hidden_TH, weight_vH)
    vocab = VocabShard.build(vocab_size, weight_vH.shape[0], tp_group)
    check_labels(labels_T, hidden_TH, vocab_size)
    weight_T = token_weights(token_weights_T, hidden_TH)
    chunk_tokens = choose_chunk_tokens(chunk_tokens, hidden_TH, vocab)
    job = Job(cross_entropy, labels_T.__getitem__, weight_T, vocab, chunk_tokens)
    return linear_loss(hidden_TH, weight_vH, job)


def logits_distillation(
    student_logits_Tv: Tensor,
    teacher_logits_Tv: Tensor,
    *,
    loss: LogitLossConfig,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    token_weights_T: Tensor | None = None,
    overwrite_student: bool = False,
) -> Tensor:
    """Weighted sum of the tokens' divergence between teacher and student, from logits that exist already.

    The student's gradient, complete for these columns, is the only large allocation, and with
    ``overwrite_student`` there is none. The teacher and the token weights get no gradient.

    Args:
        student_logits_Tv: this rank's columns of the student's logits, finite.
        teacher_logits_Tv: this rank's columns of the teacher's logits, finite.
        loss: which divergence; times the square of its temperature.
        vocab_size: true vocabulary size, None when no column is padding; columns beyond it are left
            out and get zero gradient.
        tp_group: tensor-parallel group, None for a single rank.
        token_weights_T: weight of each token; None is 1 for all.
        overwrite_student: put the gradient into the memory of the student's logits, for a caller who does
            not read them afterwards; autograd refuses a backward pass that would. Nothing is written where no
            gradient is asked for.

    Returns:
        Scalar, fp32 (fp64 for fp64 students); divergences are in nats.

    Raises:
        LayoutError: shapes that do not fit each other, or fewer columns than ``vocab_size``.
        ConfigError: dtypes or devices that do not fit each other, or a K larger than the vocabulary.
    """
    check_matrix("student's logits", student_logits_Tv)
    check_matrix("teacher's logits", teacher_logits_Tv)
    check_pair(student_logits_Tv, teacher_logits_Tv)
    if student_logits_Tv.shape[1] != teacher_logits_Tv.shape[1]:
        raise LayoutError(
            f"student's logits have {student_logits_Tv.shape[1]} columns on this rank, the teacher's "
            f"{teacher_logits_Tv.shape[1]}: pad both vocabularies to the same size"
        )
    vocab = VocabShard.build(vocab_size, student_logits_Tv.shape[1], tp_group)
    teacher_logits_Tv = teacher_logits_Tv.detach()[:, : vocab.num_valid]
    weight_T = token_weights(token_weights_T, student_logits_Tv)
    kernel = kernel_of(loss, student_logits_Tv, teacher_logits_Tv)
    num_tokens, target = student_logits_Tv.shape[0], teacher_logits_Tv.__getitem__
    job = Job(kernel or select(loss, vocab), target, weight_T, vocab, num_tokens, kernel is not None)
    return logits_loss(student_logits_Tv, job, overwrite=overwrite_student)
