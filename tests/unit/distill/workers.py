"""What the worker processes of these tests run."""

import numpy as np
import torch
import torch.distributed as dist

from minitron.config.teacher_logits import TeacherLogitsConfig
from minitron.distill.cache_format import Entries
from minitron.distill.sparsify import sparse_entries
from minitron.losses.vocab import VocabShard


def entries_of_shard(
    hidden_SH: torch.Tensor, weight_VH: torch.Tensor, vocab_size: int, settings: TeacherLogitsConfig, sample: int
) -> Entries:
    """The entries with the output layer's rows spread over the ranks."""
    rows = weight_VH.chunk(dist.get_world_size())[dist.get_rank()]
    vocab = VocabShard.build(vocab_size, len(rows), dist.group.WORLD)
    return sparse_entries(hidden_SH, rows, sample, settings, vocab)


def dense_softmax(hidden_SH: torch.Tensor, weight_VH: torch.Tensor, vocab_size: int) -> np.ndarray:
    """Probabilities in fp64, [S, V]."""
    logits = (hidden_SH.double() @ weight_VH.double().t())[:, :vocab_size]
    return torch.softmax(logits, dim=-1).numpy()
