"""What ranks that have TRITON_INTERPRET=1 run: the Triton kernels on the CPU."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from minitron.losses.divergence import Block, Scratch
from minitron.losses.vocab import VocabShard


@dataclass(frozen=True)
class Case:
    """Logits over the whole vocabulary, and how they are given to the kernels."""

    student_TV: Tensor
    teacher_TV: Tensor
    weight_T: Tensor
    temperature: float
    in_place: bool


def fused_forward_kl(case: Case) -> tuple[Tensor, Tensor]:
    """Loss per token, and the gradient of this rank's columns, where the ranks share the vocabulary."""
    from minitron.losses.kernels import FusedForwardKL

    vocab_size, ranks = case.student_TV.shape[1], dist.get_world_size()
    vocab = VocabShard.build(vocab_size, -(-vocab_size // ranks), dist.group.WORLD if ranks > 1 else None)
    mine = slice(vocab.start, vocab.start + vocab.num_valid)
    student_Tv, teacher_Tv = case.student_TV[:, mine].clone(), case.teacher_TV[:, mine].clone()
    grad_Tv = student_Tv if case.in_place else torch.full_like(student_Tv, torch.nan)
    block = Block(student_Tv, teacher_Tv, grad_Tv, case.weight_T, vocab, Scratch())
    return FusedForwardKL(case.temperature)(block), grad_Tv
