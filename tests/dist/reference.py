"""Tiny models as Hugging Face and checkpoint folders, and dense fp64 formulas on transformers' Llama."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from minitron.config.model import ModelConfig
from minitron.config.parallel import ParallelConfig
from minitron.config.run import RandomModelConfig
from minitron.models.axes import params_of, part_rows
from minitron.models.hf_import import import_model
from minitron.models.random_source import write_random_model

VOCAB_SIZE = 257


def make_model(folder: Path, *, seed: int, std: float = 0.2, **changes: Any) -> Path:
    """Make ``folder/hf`` and ``folder/checkpoint`` of a Llama whose weights are large enough to matter."""
    write_random_model(RandomModelConfig(), folder / "hf")  # for its tokenizer
    values: dict[str, Any] = {
        "num_hidden_layers": 4,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(seed)
    llama = LlamaForCausalLM(LlamaConfig(**{**values, **changes}))
    for parameter in llama.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=std)
    llama.save_pretrained(folder / "hf")
    import_model(folder / "hf", folder / "checkpoint")
    return folder


def random_tokens(*shape: int, seed: int = 1, vocab_size: int = VOCAB_SIZE) -> Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def layout(tp: int = 1, pp: int = 1, dp: int = 1) -> ParallelConfig:
    return ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, data_parallel_size=dp)


def dense(hf: Path) -> LlamaForCausalLM:
    """The model in fp64 throughout: transformers' norm computes in fp32, torch's keeps its input's type."""
    llama = LlamaForCausalLM.from_pretrained(hf, dtype=torch.float64, attn_implementation="sdpa")
    for name, module in list(llama.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":
            norm = torch.nn.RMSNorm(llama.config.hidden_size, eps=llama.config.rms_norm_eps, dtype=torch.float64)
            norm.load_state_dict(module.state_dict())
            llama.set_submodule(name, norm)
    return llama.eval()


def dense_logits(hf: Path, tokens_BS: Tensor) -> Tensor:
    with torch.no_grad():
        return dense(hf)(tokens_BS, use_cache=False).logits


def dense_kl(teacher: Path, student: Path, tokens_GS: Tensor) -> tuple[float, dict[str, Tensor]]:
    """KL(teacher || student), the mean over all tokens, and its gradient for each parameter of the student."""
    log_p = dense_logits(teacher, tokens_GS).log_softmax(-1)
    model = dense(student)
    log_q = model(tokens_GS, use_cache=False).logits.log_softmax(-1)
    loss = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def hf_tensors(canonical: dict[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """A checkpoint's tensors under transformers' names; rows that pad the vocabulary are left out."""
    out = {}
    for param in params_of(model):
        for layer in range(model.num_layers if param.stacked else 1):
            tensor = canonical[param.key][layer] if param.stacked else canonical[param.key]
            for hf in param.hf:
                rows = torch.from_numpy(part_rows(param.dims[0], hf.part, model))
                out[hf.name.format(layer=layer)] = tensor[rows]
    return out
