"""Token losses on the full vocabulary, computed chunk by chunk and split over the vocabulary.

`linear_kl` and `linear_cross_entropy` include the output layer, so full logits never exist;
`kl_from_logits` is for logits that exist already.
"""

from minitron.losses.fused import kl_from_logits, linear_cross_entropy, linear_kl

__all__ = ["kl_from_logits", "linear_cross_entropy", "linear_kl"]
