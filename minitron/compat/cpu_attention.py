"""Attention under context parallelism on the CPU, part of the device layer: Megatron's own one refuses it.

On CUDA Transformer Engine's attention passes keys and values round the ranks. Here every rank gathers them; the
backward pass adds up what the ranks found for each key and value, and hands it back to the rank that holds it.
"""

import copy
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from minitron.parallel.context import context_positions, gathered_positions


class ContextParallelAttention(DotProductAttention):
    """Megatron's attention with the keys and values of all context-parallel ranks."""

    def __init__(
        self, config: TransformerConfig, *args: Any, pg_collection: ProcessGroupCollection, **kwargs: Any
    ) -> None:
        accepted = copy.copy(config)
        accepted.context_parallel_size = 1
        super().__init__(accepted, *args, pg_collection=pg_collection, **kwargs)
        self.config = config

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Causal attention of this rank's positions to all before them.

        Args:
            query: [S of this rank, B, heads of this rank, channels].
            key: The same for key-value groups.
            value: Like ``key``.
            attention_mask: None: the mask is causal.
            *args: What else Megatron passes on.
            **kwargs: The same.

        Returns:
            [S of this rank, B, heads x channels].
        """
        group = self.pg_collection.cp
        if group.size() > 1:
            assert attention_mask is None, "context parallelism knows the causal mask only"
            assert self.attn_mask_type == AttnMaskType.causal, self.attn_mask_type
            key = gather_from_sequence_parallel_region(key, tensor_parallel_output_grad=True, group=group)
            value = gather_from_sequence_parallel_region(value, tensor_parallel_output_grad=True, group=group)
            ours = context_positions(len(key), rank=group.rank(), size=group.size())
            theirs = gathered_positions(len(key), size=group.size())
            attention_mask = (theirs[None, :] > ours[:, None])[None, None]
        context: Tensor = super().forward(query, key, value, attention_mask, *args, **kwargs)
        return context
