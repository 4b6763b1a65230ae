"""A tiny transformers Llama, and the way between it and a checkpoint folder: the independent reference."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from minitron.checkpoint.folder import SIDE_DIR, WEIGHTS_DIR, read_model_config, write_model_config
from minitron.checkpoint.store import CheckpointReader, CheckpointWriter
from minitron.config.model import Architecture, ModelConfig
from minitron.models.axes import layer_shape, params_of, part_rows


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


def llama(model: ModelConfig, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> LlamaForCausalLM:
    """A transformers model with random weights, its norms included."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        num_hidden_layers=model.num_layers,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_query_groups,
        head_dim=model.kv_channels,
        vocab_size=model.vocab_size,
        max_position_embeddings=model.max_position_embeddings,
        rms_norm_eps=model.layernorm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": model.rotary_base},
        tie_word_embeddings=model.share_embeddings_and_output_weights,
        use_cache=False,
        attn_implementation="sdpa",  # the eager one takes its softmax in fp32
    )
    reference = LlamaForCausalLM(config)
    for name, module in list(reference.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":  # computes in fp32; torch's keeps its input's type
            norm = torch.nn.RMSNorm(model.hidden_size, eps=model.layernorm_epsilon)
            reference.set_submodule(name, norm)
    reference = reference.to(dtype).eval()
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    return reference


def logits(reference: LlamaForCausalLM, tokens_BS: Tensor) -> Tensor:
    with torch.no_grad():
        return reference(tokens_BS).logits


def tokens(model: ModelConfig, *, batch: int = 3, length: int = 11, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.vocab_size, (batch, length), generator=generator)


def canonical(reference: LlamaForCausalLM, model: ModelConfig) -> dict[str, Tensor]:
    """The checkpoint's tensors, put together from the transformers model's."""
    state = reference.state_dict()
    out = {}
    for param in params_of(model):
        layers = []
        for layer in range(model.num_layers if param.stacked else 1):
            tensor = torch.full(layer_shape(param, model), torch.nan, dtype=torch.float64)
            for hf in param.hf:
                rows = torch.from_numpy(part_rows(param.dims[0], hf.part, model))
                tensor[rows] = state[hf.name.format(layer=layer)].double()
            layers.append(tensor)
        out[param.key] = torch.stack(layers) if param.stacked else layers[0]
    return out


def restore(tensors: dict[str, Tensor], model: ModelConfig) -> LlamaForCausalLM:
    """A transformers model from the checkpoint's tensors."""
    reference = llama(model)
    state = {}
    for param in params_of(model):
        for layer in range(model.num_layers if param.stacked else 1):
            tensor = tensors[param.key][layer] if param.stacked else tensors[param.key]
            for hf in param.hf:
                rows = torch.from_numpy(part_rows(param.dims[0], hf.part, model))
                state[hf.name.format(layer=layer)] = tensor[rows]
    if model.share_embeddings_and_output_weights:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    reference.load_state_dict(state)
    return reference


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
