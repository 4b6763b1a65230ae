"""Tiny random Hugging Face models with a tokenizer, saved as folders."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCAB_SIZE = 96
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "pad_token_id": 3,
}
LLAMA3_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# Every variant that lays weights or config out in another way.
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "llama-wide-heads": {"head_dim": 10},  # 4 x 10 != 24
    "llama-llama3-rope": {"rope_parameters": LLAMA3_ROPE, "num_key_value_heads": 4},
    "llama-one-group": {"num_key_value_heads": 1},
    "mistral": {"sliding_window": None},
    "mistral-window": {"sliding_window": 5, "head_dim": 8, "tie_word_embeddings": True},
    "mistral-hidden-not-multiple": {"hidden_size": 22, "head_dim": 6},
    "qwen2": {"vocab_size": VOCAB_SIZE + 1},  # transformers' class of its tokenizer adds a token
    "qwen2-tied": {"vocab_size": VOCAB_SIZE + 1, "tie_word_embeddings": True, "hidden_size": 22, "head_dim": 6},
    "qwen3": {"head_dim": 10},
    "qwen3-tied": {"tie_word_embeddings": True, "hidden_size": 22, "head_dim": 8},
    "qwen3_moe": {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 10, "norm_topk_prob": True},
    "nemotron": {},
    "nemotron-tied": {"tie_word_embeddings": True, "hidden_size": 22, "head_dim": 8, "partial_rotary_factor": 0.25},
}


def save_tiny(folder: Path, variant: str = "llama", *, dtype: torch.dtype = torch.float32, **save: Any) -> Path:
    """Make one of `VARIANTS` with weights that all differ, and a tokenizer, in ``folder``."""
    torch.manual_seed(len(variant))
    values = SIZES | VARIANTS[variant]
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(variant.split("-")[0], **values))
    with torch.no_grad():
        for parameter in model.parameters():  # norms too: transformers starts them at one
            parameter.copy_(torch.randn(parameter.shape) * 0.2 + 0.1)
    model.to(dtype).save_pretrained(folder, **save)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path, size: int = VOCAB_SIZE) -> None:
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3}
    vocab |= {f"w{n}": n for n in range(len(vocab), size)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", bos_token="<s>"
    ).save_pretrained(folder)


def read_folder(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's safetensors files."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                assert name not in tensors
                tensors[name] = opened.get_tensor(name)
    return tensors
