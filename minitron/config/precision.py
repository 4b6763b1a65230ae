"""Number formats of weights, activations and matrix products."""

from dataclasses import asdict, dataclass, replace
from enum import StrEnum

from minitron.errors import ConfigError


class Dtype(StrEnum):
    """Number format of weights and activations in training and evaluation."""

    fp32 = "fp32"
    bf16 = "bf16"


class Fp8Format(StrEnum):
    """FP8 formats, under Megatron's names: ``hybrid`` is e4m3 forward and e5m2 for the gradients of outputs."""

    e4m3 = "e4m3"
    hybrid = "hybrid"


class Fp8Recipe(StrEnum):
    """How FP8 tensors are scaled, under Megatron's names; each is a recipe of Transformer Engine.

    ``delayed``: one factor a tensor, from the maxima of earlier steps. ``tensorwise``: one factor a tensor, from its
    own maximum ("current scaling"). ``blockwise``: one factor for 1 x 128 values, 128 x 128 of a weight. ``mxfp8``:
    one factor for 32 values.
    """

    delayed = "delayed"
    tensorwise = "tensorwise"
    blockwise = "blockwise"
    mxfp8 = "mxfp8"


class AmaxComputeAlgo(StrEnum):
    """Which maximum of its history `Fp8Recipe.delayed` scales by."""

    most_recent = "most_recent"
    max = "max"


@dataclass(kw_only=True)
class PrecisionConfig:
    """Number formats. FP8 is for the linears of the layers, in training; evaluation and scoring run in `dtype`.

    The names are Megatron's.
    """

    dtype: Dtype = Dtype.fp32
    """Weights and activations in training and scoring; the optimizer's copy is always fp32."""
    fp8: Fp8Format | None = None
    """Format of the FP8 products of the trained model's linears (`hybrid`, `e4m3`); null multiplies in `dtype`."""
    fp8_recipe: Fp8Recipe = Fp8Recipe.delayed
    """How FP8 tensors are scaled: delayed, tensorwise, blockwise, mxfp8."""
    fp8_amax_history_len: int = 1024
    """For ``delayed``: micro-batches of a rank whose maxima count."""
    fp8_amax_compute_algo: AmaxComputeAlgo = AmaxComputeAlgo.max
    """For ``delayed``: the largest of the history, or the most recent."""
    first_last_layers_bf16: bool = False
    """Leave the layers at both ends of the model in bf16; not with ``delayed``."""
    num_layers_at_start_in_bf16: int = 1
    """For `first_last_layers_bf16`: layers at the start."""
    num_layers_at_end_in_bf16: int = 1
    """For `first_last_layers_bf16`: layers at the end."""

    def __post_init__(self) -> None:
        """Refuse settings that exclude each other."""
        for name, least in (
            ("fp8_amax_history_len", 1),
            ("num_layers_at_start_in_bf16", 0),
            ("num_layers_at_end_in_bf16", 0),
        ):
            if getattr(self, name) < least:
                raise ConfigError(f"precision.{name}={getattr(self, name)} must be at least {least}")
        if self.fp8 is None:
            return
        if self.dtype is not Dtype.bf16:
            raise ConfigError(
                f"precision.fp8={self.fp8} needs precision.dtype=bf16 for everything else, but it is {self.dtype}"
            )
        if self.first_last_layers_bf16 and self.fp8_recipe is Fp8Recipe.delayed:
            raise ConfigError(
                "precision.first_last_layers_bf16=true is not offered with precision.fp8_recipe=delayed, whose factors "
                "are renewed for all layers at once (Megatron-Core refuses it); use tensorwise, blockwise or mxfp8"
            )

    def plain(self) -> "PrecisionConfig":
        """The same without FP8: for a model that is evaluated, scored or exported."""
        return PrecisionConfig(dtype=self.dtype)

    def in_force(self) -> dict[str, str | int]:
        """The settings that decide a result, by name: those of FP8 where it is on, those of a recipe where it is."""
        if self.fp8 is None:
            return {"dtype": self.dtype.value}
        unread = set()
        if self.fp8_recipe is not Fp8Recipe.delayed:
            unread |= {"fp8_amax_history_len", "fp8_amax_compute_algo"}
        if not self.first_last_layers_bf16:
            unread |= {"num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"}
        values = {key: value for key, value in asdict(self).items() if key not in unread}
        return {key: str(value) if isinstance(value, StrEnum) else value for key, value in values.items()}

    def for_teacher(self, dtype: Dtype | None, recipe: Fp8Recipe | None) -> "PrecisionConfig":
        """The number formats of a teacher beside a model in these.

        Args:
            dtype: Its own number format; None takes this one's.
            recipe: Its own FP8 recipe; None runs it without FP8.

        Raises:
            ConfigError: FP8 with a dtype that excludes it, or with a recipe that only training gives its factors.
        """
        dtype = dtype or self.dtype
        if recipe is None:
            return PrecisionConfig(dtype=dtype)
        if dtype is not Dtype.bf16:
            raise ConfigError(
                f"distill.teacher.fp8_recipe={recipe} needs the teacher in bf16, but it is in {dtype}; "
                "set distill.teacher.dtype=bf16"
            )
        if recipe is Fp8Recipe.delayed:
            raise ConfigError(
                "distill.teacher.fp8_recipe=delayed is not possible: its factors come from earlier training steps, and "
                "Transformer Engine renews none in a forward pass without gradients; use tensorwise, blockwise or mxfp8"
            )
        # Forward both formats are e4m3.
        return replace(self, dtype=dtype, fp8=self.fp8 or Fp8Format.hybrid, fp8_recipe=recipe)

    @property
    def label(self) -> str:
        """In a word or a few: ``bf16``, ``fp8 tensorwise``, ``fp8 mxfp8 but 1+1 layers``."""
        if self.fp8 is None:
            return self.dtype.value
        ends = f"{self.num_layers_at_start_in_bf16}+{self.num_layers_at_end_in_bf16}"
        return f"fp8 {self.fp8_recipe}" + (f" but {ends} layers" if self.first_last_layers_bf16 else "")
