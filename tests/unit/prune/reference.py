"""A tiny transformers model, and the way between it and a checkpoint folder: the independent reference."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from minitron.checkpoint.folder import SIDE_DIR, WEIGHTS_DIR, read_model_config, write_model_config
from minitron.checkpoint.store import CheckpointReader, CheckpointWriter
from minitron.config.model import Architecture, ModelConfig
from minitron.models.axes import layer_shape, params_of, part_rows, stack_shape
from minitron.models.hf_config import to_hf_config
from tests.helpers.hf_experts import per_expert


def shape(**changes: object) -> ModelConfig:
    """A tiny architecture: 8 heads in 4 groups, heads * kv_channels != hidden_size."""
    values: dict[str, object] = {
        "architecture": Architecture.llama,
        "num_layers": 4,
        "hidden_size": 24,
        "ffn_hidden_size": 20,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "kv_channels": 4,
        "vocab_size": 50,
        "max_position_embeddings": 64,
        "layernorm_epsilon": 1e-5,
        "rotary_base": 10000.0,
    }
    return ModelConfig(**{**values, **changes})  # type: ignore[arg-type]


FAMILIES: dict[str, dict[str, object]] = {
    "llama": {},
    "qwen2": {"architecture": Architecture.qwen2},
    "qwen3": {"architecture": Architecture.qwen3},
    "nemotron": {"architecture": Architecture.nemotron, "rotary_percent": 0.5},
    "qwen3_moe": {
        "architecture": Architecture.qwen3_moe,
        "ffn_hidden_size": 10,
        "num_moe_experts": 6,
        "moe_router_topk": 2,
    },
}
"""What makes a `shape` one of each family that lays its parameters out in another way."""


def llama(model: ModelConfig, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> LlamaForCausalLM:
    """A transformers Llama with random weights, its norms included."""
    reference = hf_model(model, seed=seed, dtype=dtype)
    assert isinstance(reference, LlamaForCausalLM)
    return reference


def hf_model(model: ModelConfig, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """A transformers model of any family with random weights, its norms and biases included."""
    torch.manual_seed(seed)
    values = to_hf_config(model, {})
    config = AutoConfig.for_model(values.pop("model_type"), **values, use_cache=False)
    reference = AutoModelForCausalLM.from_config(
        config,
        attn_implementation="sdpa",  # eager's softmax is in fp32
        experts_implementation="eager",  # the grouped product wants rows of 16 bytes
    )
    for name, module in list(reference.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):  # computes in fp32; torch's keeps its input's type
            norm = torch.nn.RMSNorm(module.weight.shape, eps=model.layernorm_epsilon)
            reference.set_submodule(name, norm)
    reference = reference.to(dtype).eval()
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    return reference


def logits(reference: Any, tokens_BS: Tensor) -> Tensor:
    with torch.no_grad():
        return reference(tokens_BS).logits


def tokens(model: ModelConfig, *, batch: int = 3, length: int = 11, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.vocab_size, (batch, length), generator=generator)


def canonical(reference: Any, model: ModelConfig) -> dict[str, Tensor]:
    """The checkpoint's tensors, put together from the transformers model's."""
    state = state_of(reference)
    out = {}
    for param in params_of(model):
        stack = stack_shape(param, model)
        tensor = torch.full((*stack, *layer_shape(param, model)), torch.nan, dtype=torch.float64)
        for index in np.ndindex(stack):
            for hf in param.hf:
                rows = torch.from_numpy(part_rows(param.dims[0], hf.part, model))
                tensor[index][rows] = state[place(hf.name, index)].double()
        out[param.key] = tensor
    return out


def restore(tensors: dict[str, Tensor], model: ModelConfig) -> Any:
    """A transformers model from the checkpoint's tensors."""
    state = {}
    for param in params_of(model):
        for index in np.ndindex(stack_shape(param, model)):
            for hf in param.hf:
                rows = torch.from_numpy(part_rows(param.dims[0], hf.part, model))
                state[place(hf.name, index)] = tensors[param.key][index][rows]
    if model.share_embeddings_and_output_weights:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    reference = hf_model(model)
    load_state(reference, state)
    return reference


def place(name: str, index: Sequence[int]) -> str:
    return name.format(**dict(zip(("layer", "expert"), index, strict=False)))


def state_of(reference: Any) -> dict[str, Tensor]:
    """The model's tensors as its files have them."""
    return per_expert(reference.state_dict())


def load_state(reference: Any, state: dict[str, Tensor]) -> None:
    """Inverse of `state_of`, in place."""
    held = state_of(reference)
    assert held.keys() == state.keys()
    for name, tensor in held.items():  # views of the model's own
        tensor.copy_(state[name])


def write_checkpoint(folder: Path, tensors: dict[str, Tensor], model: ModelConfig) -> Path:
    writer = CheckpointWriter(folder / WEIGHTS_DIR)
    for key, tensor in tensors.items():
        writer.write(key, tensor, global_shape=tensor.shape, offsets=(0,) * tensor.dim())
    write_model_config(folder, model)
    (folder / SIDE_DIR).mkdir()
    (folder / SIDE_DIR / "config.json").write_text("{}")
    writer.finish()
    return folder


def read_checkpoint(folder: Path) -> tuple[dict[str, Tensor], ModelConfig]:
    reader = CheckpointReader(folder / WEIGHTS_DIR)
    return {key: reader.read(key) for key in reader.tensors}, read_model_config(folder)


def rows_of(units: Sequence[int], width: int) -> Tensor:
    """Rows of units of a width, worked out apart from the axes table."""
    return torch.from_numpy(np.concatenate([np.arange(u * width, (u + 1) * width) for u in units]))
