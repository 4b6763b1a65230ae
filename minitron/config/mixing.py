"""How a second loss is weighed against the logit loss."""

from enum import StrEnum


class Mixing(StrEnum):
    """``fixed``: by a number. ``scaled``: brought to the size of the logit loss first, by a detached factor.

    The factor is never negative: a logit loss below 0 (possible with ``top_k_rest=drop`` or a cache of draws) counts by
    its absolute value. Where the second loss is 0 the factor is 0.
    """

    fixed = "fixed"
    scaled = "scaled"
