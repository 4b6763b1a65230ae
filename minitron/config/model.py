"""The numbers that define an architecture, under Megatron's names."""

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Self

from minitron.errors import LayoutError, ModelError

SHAPE = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")
"""Sizes of the layers that every model has."""


class Architecture(StrEnum):
    """Architectures with an axes table (`minitron/models/axes.py`), by their Hugging Face class."""

    llama = "LlamaForCausalLM"
    mistral = "MistralForCausalLM"
    qwen2 = "Qwen2ForCausalLM"
    qwen3 = "Qwen3ForCausalLM"
    nemotron = "NemotronForCausalLM"
    qwen3_moe = "Qwen3MoeForCausalLM"


@dataclass(kw_only=True)
class RopeScaling:
    """Llama-3 scaling of the rotary frequencies (Hugging Face ``rope_type: llama3``)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(kw_only=True)
class ModelConfig:
    """One decoder-only transformer. Written as ``model.json`` beside every checkpoint.

    ``kv_channels`` (the size of one head) is always explicit: after pruning,
    ``num_attention_heads * kv_channels`` need not equal ``hidden_size``. ``rotary_percent`` is the part of a head's
    channels, the first ones, that the rotary embedding turns. In a mixture of experts every layer has
    ``num_moe_experts`` experts of ``ffn_hidden_size`` neurons each, and a token goes to ``moe_router_topk`` of them.
    ``moe_router_pre_softmax`` is Megatron's name for weights that are a softmax over all experts; without it, they are
    one over the chosen experts.
    """

    architecture: Architecture
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    max_position_embeddings: int
    layernorm_epsilon: float
    rotary_base: float
    rotary_percent: float = 1.0
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None
    share_embeddings_and_output_weights: bool = False
    init_method_std: float = 0.02
    num_moe_experts: int | None = None
    moe_router_topk: int | None = None
    moe_router_pre_softmax: bool = False

    def __post_init__(self) -> None:
        """Check that every size is positive and that the heads divide into their groups."""
        for name in (*SHAPE, "vocab_size", "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise ModelError(f"model: {name}={getattr(self, name)} must be at least 1")
        if not 0 < self.rotary_percent <= 1:
            raise ModelError(f"model: rotary_percent={self.rotary_percent} must be above 0 and at most 1")
        if self.num_attention_heads % self.num_query_groups:
            raise LayoutError(
                f"model: num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_query_groups={self.num_query_groups}; every group needs as many heads as the others"
            )

        self._check_experts()

    def _check_experts(self) -> None:
        experts, chosen = self.num_moe_experts, self.moe_router_topk
        if (experts is None) == (self.architecture is Architecture.qwen3_moe):
            raise ModelError(f"model: num_moe_experts={experts} does not go with {self.architecture.value}")
        if experts is None:
            return
        if chosen is None or not 1 <= chosen <= experts:
            raise ModelError(
                f"model: moe_router_topk={chosen} must be between 1 and num_moe_experts={experts}, of which it chooses"
            )
        if chosen == 1 and not self.moe_router_pre_softmax:
            raise ModelError(
                "model: moe_router_topk=1 with weights normalised over the one chosen are always 1: the router "
                "would get no gradient"
            )

    @property
    def num_ffn_units(self) -> int:
        """Neurons of one layer, all experts together."""
        return (self.num_moe_experts or 1) * self.ffn_hidden_size

    @property
    def longest_sequence(self) -> int:
        """Tokens up to which causal attention over all of them is what the model computes."""
        return min(self.max_position_embeddings, self.sliding_window or self.max_position_embeddings)

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key and value head."""
        return self.num_attention_heads // self.num_query_groups

    def check_sizes(self, expected: "ModelConfig", who: str) -> None:
        """Refuse a model that is not the expected one. What does not change a weight's shape is not compared.

        Args:
            expected: The model that it should be.
            who: Name of this one in the message.

        Raises:
            ModelError: With the sizes that differ.
        """
        differ = [name for name in SHAPE if getattr(self, name) != getattr(expected, name)]
        if differ:
            have, want = (", ".join(f"{n}={getattr(m, n)}" for n in differ) for m in (self, expected))
            raise ModelError(
                f"{who} has {have}, but source.model describes a model of {want}; give the right folder, or "
                "source.model=null"
            )

    def loadable_hidden_sizes(self) -> list[int]:
        """The nearest hidden sizes that transformers loads; empty where the model's own is one.

        transformers 5 refuses a LlamaConfig whose hidden size is not a multiple of its heads, with ``head_dim``
        given or not, though nothing in the model needs that.
        """
        hidden, heads = self.hidden_size, self.num_attention_heads
        if self.architecture is not Architecture.llama or hidden % heads == 0:
            return []
        lower = hidden - hidden % heads
        return [size for size in (lower, lower + heads) if size]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready values."""
        return {**asdict(self), "architecture": self.architecture.value}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Inverse of `to_dict`.

        Raises:
            ModelError: A key is unknown or missing, or the architecture has no axes table.
        """
        values = dict(values)
        known = [a.value for a in Architecture]
        if values.get("architecture") not in known:
            raise ModelError(
                f"model.json: architecture {values.get('architecture')!r} is not known; known: {', '.join(known)}"
            )
        values["architecture"] = Architecture(values["architecture"])
        if values.get("rope_scaling") is not None:
            values["rope_scaling"] = RopeScaling(**values["rope_scaling"])
        try:
            return cls(**values)
        except TypeError as error:
            raise ModelError(f"model.json does not describe a model: {error}") from error
