"""Transformer Engine: the only file that imports it, and only where it is used.

Megatron-Core imports it by itself when it is installed. What is asked here is whether it works, and what it can do on
the GPU at hand.
"""

import functools

from minitron.config.precision import Fp8Recipe
from minitron.errors import PlatformError

_FROM = (
    "it comes with NVIDIA's PyTorch container (docker/Dockerfile, target gpu), or install it beside torch with "
    "pip install 'minitron[gpu]' --no-build-isolation; device=cpu needs none"
)


@functools.cache
def import_error() -> str | None:
    """Why Transformer Engine cannot be imported, in one line; None when it can."""
    try:
        import transformer_engine.pytorch  # noqa: F401  # what loads its libraries
    # A library that is missing or was built for another torch; its own assertions about how it was installed.
    except (ImportError, OSError, RuntimeError, AssertionError) as error:
        return str(error).partition("\n")[0] or type(error).__name__
    return None


def require_transformer_engine() -> None:
    """Make sure that models can be built from its modules.

    Raises:
        PlatformError: It is not installed, or does not load.
    """
    if reason := import_error():
        raise PlatformError(f"device=cuda needs Transformer Engine, which does not load ({reason}): {_FROM}")


def unsupported(recipe: Fp8Recipe) -> str | None:
    """Why Transformer Engine refuses an FP8 recipe on the current GPU, in its own words; None when it does not.

    Args:
        recipe: The recipe; the current GPU is this rank's.

    Raises:
        PlatformError: It is not installed, or does not load.
    """
    require_transformer_engine()
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

    asked = {
        Fp8Recipe.blockwise: FP8GlobalStateManager.is_fp8_block_scaling_available,
        Fp8Recipe.mxfp8: FP8GlobalStateManager.is_mxfp8_available,
    }.get(recipe, FP8GlobalStateManager.is_fp8_available)
    available, reason = asked()
    return None if available else str(reason)
