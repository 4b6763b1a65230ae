"""How a second loss is weighed against the logit loss."""

from enum import StrEnum


class Mixing(StrEnum):
    """``fixed``: by a number. ``scaled``: brought to the size of the logit loss first, by a detached factor."""

    fixed = "fixed"
    scaled = "scaled"
