"""From the config to the loss that the engine runs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from minitron.config.logit_loss import LogitLossConfig, LogitLossKind
from minitron.losses.dense import JensenShannon, cosine, forward_kl, mse, reverse_kl
from minitron.losses.divergence import Block, Divergence
from minitron.losses.sparse import TopKKL
from minitron.losses.vocab import VocabShard


@dataclass(frozen=True)
class Tempered:
    """T^2 times a divergence of both models' logits over T; the teacher's in the student's dtype.

    Attributes:
        divergence: the loss of two rows of logits in one dtype.
        temperature: T.
    """

    divergence: Divergence[Tensor]
    temperature: float

    def __call__(self, block: Block[Tensor]) -> Tensor:
        """Compute one block, see `Divergence`."""
        student_Cv, target, grad_Cv, weight_C, _, scratch = block
        target = scratch.cast("teacher", target, student_Cv.dtype)
        if self.temperature == 1:
            return self.divergence(block._replace(target=target))
        inverse = 1 / self.temperature
        target = torch.mul(target, inverse, out=scratch.like("teacher", target))
        out_Cv = scratch.like("tempered", student_Cv) if grad_Cv is None else grad_Cv
        student_Cv = torch.mul(student_Cv, inverse, out=out_Cv)
        # The gradient is with respect to s / T, and T^2 / T is left.
        tempered = block._replace(student_Cv=student_Cv, target=target, weight_C=weight_C * self.temperature)
        return self.divergence(tempered) * self.temperature**2


def kernel_of(loss: LogitLossConfig, *logits: Tensor) -> Divergence[Tensor] | None:
    """Our own kernel for the configured divergence, which takes logits of any dtype and many tokens at once.

    Args:
        loss: which.
        logits: student's and teacher's, or what they are made of: device, dtype and layout count.

    Returns:
        None where there is no kernel for it.
    """
    fits = all(tensor.is_cuda and tensor.dtype != torch.float64 and tensor.stride(-1) == 1 for tensor in logits)
    if not fits or loss.kind is not LogitLossKind.forward_kl or loss.top_k:
        return None
    from minitron.losses.kernels import FusedForwardKL  # Triton, which torch brings where there is CUDA

    return FusedForwardKL(loss.temperature)


def select(loss: LogitLossConfig, vocab: VocabShard) -> Divergence[Tensor]:
    """The configured divergence of two rows of logits.

    Args:
        loss: which.
        vocab: this rank's columns.

    Raises:
        ConfigError: K is larger than the vocabulary.
    """
    loss.check_vocabulary(vocab.vocab_size)
    divergence: Divergence[Tensor]
    match loss.kind:
        case LogitLossKind.forward_kl:
            divergence = TopKKL(loss.top_k, loss.top_k_rest) if loss.top_k else forward_kl
        case LogitLossKind.reverse_kl:
            divergence = reverse_kl
        case LogitLossKind.jensen_shannon:
            divergence = JensenShannon(loss.beta)
        case LogitLossKind.mse:
            divergence = mse
        case LogitLossKind.cosine:
            divergence = cosine
    return Tempered(divergence, loss.temperature)
