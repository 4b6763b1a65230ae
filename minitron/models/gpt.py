"""Build this rank's part of a model on Megatron-Core, and run it up to its final hidden state."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from minitron.compat.layer_norm import layer_norm_1p
from minitron.compat.te import require_transformer_engine
from minitron.config.model import ModelConfig
from minitron.config.parallel import ParallelConfig, padded_vocab_size
from minitron.config.precision import PrecisionConfig
from minitron.config.run import Device
from minitron.data.batch import Batch
from minitron.models.axes import block_of
from minitron.models.transformer_config import transformer_config
from minitron.parallel.groups import Groups

logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)  # GPTModel "is deprecated"


@dataclass(frozen=True)
class FinalState:
    """What the last pipeline stage hands to a loss instead of logits, which are never materialised.

    Attributes:
        hidden_SBH: Normed hidden state of the last layer (``s`` of S under sequence parallelism).
        weight_vH: This rank's rows of the output layer.
    """

    hidden_SBH: Tensor
    weight_vH: Tensor

    @property
    def device(self) -> torch.device:
        """Where it is: Megatron's schedules ask the output of a mixture of experts for it."""
        return self.hidden_SBH.device


class Chunks(torch.nn.ModuleList):
    """This pipeline stage's part of a model: one `GPTModel`, or under interleaving one per virtual stage, in order."""

    def __init__(self, chunks: Iterable[GPTModel]) -> None:
        super().__init__(chunks)

    def __iter__(self) -> Iterator[GPTModel]:
        return super().__iter__()

    @property
    def config(self) -> TransformerConfig:
        """Megatron's description of the model, shared by the chunks."""
        config: TransformerConfig = self[0].config
        return config

    @property
    def collection(self) -> ProcessGroupCollection:
        """The process groups that the model is built on."""
        collection: ProcessGroupCollection = self[0].pg_collection
        return collection


def build_gpt(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    groups: Groups,
    *,
    device: Device,
    initialize: bool = False,
    local_spec: bool = False,
    vocab_rows: int | None = None,
) -> Chunks:
    """Build this pipeline stage of a model.

    Args:
        model: The architecture.
        parallel: The layout.
        precision: Number formats.
        groups: This rank's process groups.
        device: ``cpu`` or ``cuda``.
        initialize: Draw Megatron's random weights, which depend on the layout, instead of leaving them undefined. For
            timings: a run from scratch starts from `minitron.models.random_weights`.
        local_spec: Use Megatron's own modules even on CUDA, without FP8. Scoring needs it: Transformer Engine fuses
            the norms into the linears, where no hook can see their output.
        vocab_rows: Rows of embedding and output layer over all tensor-parallel ranks, where another model decides;
            None pads the model's own vocabulary.

    Raises:
        PlatformError: Transformer Engine is needed and not there.
    """
    assert not (precision.fp8 and device is Device.cpu), "refused before anything starts (runtime.device)"
    if local_spec or device is Device.cpu:
        local_spec, precision = True, precision.plain()
    else:
        require_transformer_engine()
    config = transformer_config(model, parallel, precision, device=device, initialize=initialize, local_spec=local_spec)
    spec = _layer_spec(model, device, local=local_spec)
    rows = vocab_rows or padded_vocab_size(model.vocab_size, parallel.tensor_model_parallel_size)
    chunks = Chunks(
        _build_chunk(index, model, parallel, config, spec, groups, rows) for index in range(parallel.num_chunks)
    )
    return chunks if device is Device.cpu else chunks.cuda()


def _build_chunk(
    index: int,
    model: ModelConfig,
    parallel: ParallelConfig,
    config: TransformerConfig,
    spec: ModuleSpec,
    groups: Groups,
    vocab_rows: int,
) -> GPTModel:
    scaling = model.rope_scaling
    return GPTModel(
        config,
        spec,
        vocab_size=vocab_rows,
        max_sequence_length=model.max_position_embeddings,
        pre_process=groups.is_first_stage and index == 0,
        post_process=groups.is_last_stage and index == parallel.num_chunks - 1,
        share_embeddings_and_output_weights=model.share_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_percent=model.rotary_percent,
        rotary_base=model.rotary_base,  # Megatron says int, and computes in float
        rope_scaling=scaling is not None,
        rope_scaling_factor=scaling.factor if scaling else 1.0,
        pg_collection=groups.collection,
        vp_stage=index if parallel.num_chunks > 1 else None,
    )


def _layer_spec(model: ModelConfig, device: Device, *, local: bool) -> ModuleSpec:
    """Megatron's own modules or Transformer Engine's; checkpoints of the two have the same names."""
    block, experts = block_of(model), model.num_moe_experts
    if not local:
        return get_gpt_layer_with_transformer_engine_spec(
            num_experts=experts, moe_grouped_gemm=experts is not None, qk_layernorm=block.qk_layernorm
        )
    spec = get_gpt_layer_local_spec(
        num_experts=experts, normalization=block.normalization, qk_layernorm=block.qk_layernorm
    )
    if block.layernorm_zero_centered_gamma and device is not Device.cpu:  # Megatron's local norm refuses it
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = layer_norm_1p
    if experts is not None:  # Transformer Engine's spec does not fuse this norm, and checkpoints are the same for both
        del spec.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    return spec


def forward_to_final_state(gpt: torch.nn.Module, batch: Batch) -> Tensor | FinalState:
    """Run this stage of a model on a micro-batch.

    Args:
        gpt: One chunk: a `GPTModel`, or Megatron's wrapper around one.
        batch: Tokens [B, S]; used by the first stage (and for the positions by all).

    Returns:
        The hidden state to send on [S, B, H]; on the last stage a `FinalState`.
    """
    output: Tensor | FinalState = gpt(batch.tokens_BS, batch.position_ids_BS, None, output_processor=_final_state)
    return output


def _final_state(*, hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None, **_: object) -> FinalState:
    """Megatron's hook in place of the output layer."""
    weight = output_layer.weight if output_weight is None else output_weight
    return FinalState(hidden_SBH=hidden_states, weight_vH=weight)
