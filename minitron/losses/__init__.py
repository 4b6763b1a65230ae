"""Token losses on the full vocabulary, computed chunk by chunk and split over the vocabulary.

The ``linear_`` losses include the output layer, so full logits never exist; `logits_distillation` is for
logits that exist already. `workspace` holds their chunks of logits from call to call on a CPU.
"""

from minitron.losses.engine import workspace
from minitron.losses.fused import linear_cross_entropy, linear_distillation, linear_sparse_kl, logits_distillation
from minitron.losses.sparse import SparseTarget

__all__ = [
    "SparseTarget",
    "linear_cross_entropy",
    "linear_distillation",
    "linear_sparse_kl",
    "logits_distillation",
    "workspace",
]
