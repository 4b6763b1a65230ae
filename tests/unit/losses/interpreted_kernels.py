"""Run the Triton kernels on the CPU, in a process of its own that has TRITON_INTERPRET=1 before it imports Triton.

``python -m tests.unit.losses.interpreted_kernels IN OUT``
"""

import sys

import torch

from minitron.losses.divergence import Block, Scratch
from minitron.losses.kernels import FusedForwardKL
from minitron.losses.vocab import VocabShard


def main(given: str, wanted: str) -> None:
    results = []
    for case in torch.load(given):
        student_TV, vocab_size = case["student"], case["student"].shape[1]
        grad_TV = student_TV if case["in_place"] else torch.full_like(student_TV, torch.nan)
        vocab = VocabShard.build(vocab_size, vocab_size, None)
        block = Block(student_TV, case["teacher"], grad_TV, case["weight"], vocab, Scratch())
        results.append((FusedForwardKL(case["temperature"])(block), grad_TV))
    torch.save(results, wanted)


if __name__ == "__main__":
    main(*sys.argv[1:])
