"""Tiny models as Hugging Face and checkpoint folders, and dense fp64 formulas on transformers' models."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from minitron.checkpoint.folder import WEIGHTS_DIR, read_model_config
from minitron.checkpoint.store import CheckpointReader
from minitron.config.model import ModelConfig
from minitron.config.parallel import ParallelConfig
from minitron.config.run import RandomModelConfig
from minitron.models.axes import params_of, part_rows, stack_shape
from minitron.models.hf_import import import_model
from minitron.models.random_source import write_random_model

VOCAB_SIZE = 257


def make_model(folder: Path, *, seed: int, std: float = 0.2, model_type: str = "llama", **changes: Any) -> Path:
    """Make ``folder/hf`` and ``folder/checkpoint`` of a model whose weights are large enough to matter."""
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
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**values, **changes}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=std)
    model.save_pretrained(folder / "hf")
    import_model(folder / "hf", folder / "checkpoint")
    return folder


def random_tokens(*shape: int, seed: int = 1, vocab_size: int = VOCAB_SIZE) -> Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def layout(
    tp: int = 1, pp: int = 1, dp: int = 1, vp: int | None = None, *, cp: int = 1, sp: bool = False
) -> ParallelConfig:
    return ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        data_parallel_size=dp,
        sequence_parallel=sp,
        virtual_pipeline_model_parallel_size=vp,
    )


def dense(hf: Path) -> Any:
    """The model in fp64 throughout: transformers' RMS norm computes in fp32, torch's keeps its input's type."""
    model = AutoModelForCausalLM.from_pretrained(
        hf, dtype=torch.float64, attn_implementation="sdpa", experts_implementation="eager"
    )
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            norm = torch.nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon, dtype=torch.float64)
            norm.load_state_dict(module.state_dict())
            model.set_submodule(name, norm)
    return model.eval()


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


def norm_of(gradients: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(gradient.norm()) ** 2 for gradient in gradients.values()))


def assert_gradients(
    folder: Path, student: Path, wanted: Mapping[str, Tensor], *, rel: float = 1e-4, vanishing: float = 0.0
) -> None:
    """The gradients that ranks left in a checkpoint folder are the wanted ones, each to ``rel`` of its norm.

    One whose norm is below ``vanishing`` of the norm of all is compared with that (the keys' bias: softmax ignores a
    shift).
    """
    reader = CheckpointReader(folder / WEIGHTS_DIR)
    have = hf_tensors({key: reader.read(key) for key in reader.tensors}, read_model_config(student))
    assert have.keys() == wanted.keys()
    least = vanishing * norm_of(wanted)
    for name, want in wanted.items():
        error = float((have[name].double() - want).norm()) / max(float(want.norm()), least)
        assert error < rel, f"{name}: relative error {error:.1e}"


def hf_tensors(canonical: dict[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """A checkpoint's tensors under transformers' names; rows that pad the vocabulary are left out."""
    out = {}
    for param in params_of(model):
        for index in np.ndindex(stack_shape(param, model)):
            for hf in param.hf:
                rows = torch.from_numpy(part_rows(param.dims[0], hf.part, model))
                name = hf.name.format(**dict(zip(("layer", "expert"), index, strict=False)))
                out[name] = canonical[param.key][index][rows]
    return out
