"""Intermediate losses by a dense fp64 formula on transformers' Llama, differentiated by autograd."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from minitron.config.intermediate import HiddenLoss, IntermediateConfig
from minitron.config.mixing import Mixing
from tests.parallel.reference import dense


@dataclass(frozen=True)
class Dense:
    """Terms of a step, and the gradients of the student's parameters and of the projection."""

    terms: dict[str, float]
    gradients: dict[str, Tensor]
    projection: Tensor | None


@dataclass(frozen=True)
class Pairs:
    """Layers (teacher, student) of each kind, resolved by hand."""

    embedding: bool = False
    block_output: tuple[tuple[int, int], ...] = ()
    mlp_input: tuple[tuple[int, int], ...] = ()
    attention_relations: tuple[tuple[int, int], ...] = ()


def dense_step(
    teacher: Path, student: Path, tokens_GS: Tensor, pairs: Pairs, config: IntermediateConfig, projection: Tensor | None
) -> Dense:
    """One step over G micro-batches of one sequence each."""
    models = dense(teacher), dense(student)
    matrix = None if projection is None else projection.double().requires_grad_()
    sums: dict[str, float] = {}
    for tokens_S in tokens_GS:
        with torch.no_grad():
            given, log_p = _run(models[0], tokens_S[None])
        states, log_q = _run(models[1], tokens_S[None])
        kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        losses = _losses(given, states, pairs, config, matrix)
        between = torch.stack(list(losses.values())).sum()
        alpha = config.weight
        if config.mixing is Mixing.scaled:
            alpha = config.weight * (kl / between).item()
            losses["alpha"] = torch.tensor(alpha)
        total = kl + alpha * between
        (total / len(tokens_GS)).backward()
        for name, value in {**losses, "forward_kl": kl, "loss": total}.items():
            sums[name] = sums.get(name, 0.0) + value.item() / len(tokens_GS)
    gradients = {name: p.grad for name, p in models[1].named_parameters() if p.grad is not None}
    return Dense(sums, gradients, None if matrix is None else matrix.grad)


def _run(model: LlamaForCausalLM, tokens_BS: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    seen: dict[str, Tensor] = {}
    handles = [
        module.register_forward_hook(lambda _m, _a, output, name=name: seen.__setitem__(name, output))
        for name, module in model.model.named_modules()
    ]
    log_probabilities = model(tokens_BS, use_cache=False).logits.log_softmax(-1)
    for handle in handles:
        handle.remove()
    seen[f"layers.{len(model.model.layers)}.input_layernorm"] = seen["norm"]
    return seen, log_probabilities


def _losses(
    teacher: dict[str, Tensor],
    student: dict[str, Tensor],
    pairs: Pairs,
    config: IntermediateConfig,
    matrix: Tensor | None,
) -> dict[str, Tensor]:
    def hidden(left: str, right: str) -> Tensor:
        want, have = teacher[left], student[right]
        have = have if matrix is None else have @ matrix.t()
        if config.loss is HiddenLoss.mse:
            return ((have - want) ** 2).mean()
        cosine = (have * want).sum(-1) / (have.norm(dim=-1) * want.norm(dim=-1))
        return (1 - cosine).mean()

    def relations(left: int, right: int) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for part in ("q_proj", "k_proj", "v_proj"):
            log_p, log_q = (
                _relations(states[f"layers.{layer}.self_attn.{part}"], config.relation_heads)
                for states, layer in ((teacher, left), (student, right))
            )
            terms = torch.where(log_p.isfinite(), log_p.exp() * (log_p - log_q), 0.0)
            total = total + terms.sum(-1).mean()
        return total

    norm = "layers.{}.input_layernorm"
    mlp = "layers.{}.post_attention_layernorm"
    found: dict[str, Tensor] = {}
    if pairs.embedding:
        found["embedding"] = hidden(norm.format(0), norm.format(0))
    for kind, layers in (
        ("block_output", pairs.block_output),
        ("mlp_input", pairs.mlp_input),
        ("attention_relations", pairs.attention_relations),
    ):
        for t, s in layers:
            name = kind if len(layers) == 1 else f"{kind}.{t}:{s}"
            if kind == "block_output":
                found[name] = hidden(norm.format(t + 1), norm.format(s + 1))
            elif kind == "mlp_input":
                found[name] = hidden(mlp.format(t), mlp.format(s))
            else:
                found[name] = relations(t, s)
    return found


def _relations(vectors_BSX: Tensor, heads: int) -> Tensor:
    heads_BNSD = vectors_BSX.unflatten(-1, (heads, -1)).transpose(1, 2)
    scores = heads_BNSD @ heads_BNSD.transpose(2, 3) / math.sqrt(heads_BNSD.shape[-1])
    length = scores.shape[-1]
    return scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf).log_softmax(-1)
