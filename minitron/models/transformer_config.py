"""Fill Megatron's `TransformerConfig` from ours: the only place that does."""

import importlib.util
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.activations import squared_relu
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from minitron.config.model import ModelConfig
from minitron.config.parallel import ParallelConfig, layers_per_stage
from minitron.config.precision import Dtype, PrecisionConfig
from minitron.config.run import Device
from minitron.errors import ModelError
from minitron.models.axes import block_of

TORCH_DTYPE = {Dtype.fp32: torch.float32, Dtype.bf16: torch.bfloat16}

_MEGATRON_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""Megatron-Core 0.19 fixes these three of the llama3 rotary scaling and takes only the factor."""


def transformer_config(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    *,
    device: Device,
    initialize: bool,
    local_spec: bool = False,
) -> TransformerConfig:
    """Describe one model to Megatron.

    Args:
        model: The architecture.
        parallel: The layout it is split over.
        precision: Number formats.
        device: ``cpu`` turns off the fused CUDA kernels.
        initialize: Draw random weights; without it they are left for a checkpoint to fill.
        local_spec: See `minitron.models.gpt.build_gpt`.
    """
    check_rope(model)
    block = block_of(model)
    on_cpu = device is Device.cpu
    activation = _activation(block.activation_func, on_cpu=on_cpu)
    dtype = TORCH_DTYPE[precision.dtype]
    stages = layers_per_stage(model.num_layers, parallel)
    uneven, interleaved = len(set(stages)) > 1, parallel.num_chunks > 1
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        layernorm_epsilon=model.layernorm_epsilon,
        init_method_std=model.init_method_std,
        **asdict(block) | {"activation_func": activation},
        **_experts(model, grouped=not on_cpu and not local_spec),
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=precision.dtype is Dtype.bf16,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        virtual_pipeline_model_parallel_size=parallel.num_chunks if interleaved else None,
        num_layers_in_first_pipeline_stage=stages[0] if uneven else None,
        # Two stages are told by the first: with both, Megatron-Core 0.19 divides by its 0 stages between them.
        num_layers_in_last_pipeline_stage=stages[-1] if uneven and len(stages) > 2 else None,
        recompute_granularity=parallel.recompute_granularity and parallel.recompute_granularity.value,
        recompute_method=parallel.recompute_method and parallel.recompute_method.value,
        recompute_num_layers=parallel.recompute_num_layers,
        perform_initialization=initialize,
        use_cpu_initialization=on_cpu,
        gradient_accumulation_fusion=not on_cpu and _has_apex_kernel(),
        masked_softmax_fusion=False,  # Megatron's own attention alone reads it, and would need Apex's kernels
        bias_activation_fusion=not on_cpu and activation is F.silu,  # no other of ours has a fused kernel
        bias_dropout_fusion=not on_cpu,
        apply_rope_fusion=not on_cpu,
        # The schedules wait for pipeline sends one by one: gloo has no batched isend/irecv.
        batch_p2p_comm=not on_cpu and not interleaved,
        batch_p2p_sync=False,  # a wait for the device after every send, for versions of torch older than ours
        overlap_p2p_comm=interleaved,
        deallocate_pipeline_outputs=True,
        **_fp8_fields(precision),
    )


def _fp8_fields(precision: PrecisionConfig) -> dict[str, Any]:
    """The fields that make Megatron enter Transformer Engine's FP8 context around the layers; none without FP8.

    Weights stay in bf16 beside their FP8 copies (no ``fp8_param``): a checkpoint then has what the optimizer rounds,
    not what FP8 left of it.
    """
    if precision.fp8 is None:
        return {}
    return {
        "fp8": precision.fp8.value,
        "fp8_recipe": precision.fp8_recipe.value,
        "fp8_amax_history_len": precision.fp8_amax_history_len,
        "fp8_amax_compute_algo": precision.fp8_amax_compute_algo.value,
        "first_last_layers_bf16": precision.first_last_layers_bf16,
        "num_layers_at_start_in_bf16": precision.num_layers_at_start_in_bf16,
        "num_layers_at_end_in_bf16": precision.num_layers_at_end_in_bf16,
    }


def _has_apex_kernel() -> bool:
    """Whether Apex's product that adds to the fp32 gradient is installed; NVIDIA's container has it, PyPI does not.

    Megatron's output layer refuses to be built with the fusion and without the kernel. Results are the same.
    """
    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def _experts(model: ModelConfig, *, grouped: bool) -> dict[str, Any]:
    """Settings of a mixture of experts; routing is balanced by no loss of its own."""
    if model.num_moe_experts is None:
        return {}
    return {
        "num_moe_experts": model.num_moe_experts,
        "moe_ffn_hidden_size": model.ffn_hidden_size,
        "moe_router_topk": model.moe_router_topk,
        "moe_router_pre_softmax": model.moe_router_pre_softmax,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_token_dispatcher_type": "allgather",
        "moe_grouped_gemm": grouped,
    }


def _activation(name: str, *, on_cpu: bool) -> Callable[[Tensor], Tensor]:
    if name == "silu":
        return F.silu
    assert name == "squared_relu", name
    return _squared_relu if on_cpu else squared_relu  # Megatron's is compiled, which takes seconds and a C++ compiler


def _squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


def check_rope(model: ModelConfig) -> None:
    """Refuse a rotary scaling that Megatron cannot express.

    Raises:
        ModelError: With the values that differ.
    """
    if model.rope_scaling is None:
        return
    other = {
        name: getattr(model.rope_scaling, name)
        for name, value in _MEGATRON_ROPE.items()
        if getattr(model.rope_scaling, name) != value
    }
    if other:
        raise ModelError(f"llama3 rotary scaling with {other} cannot be run: Megatron-Core fixes {_MEGATRON_ROPE}")
