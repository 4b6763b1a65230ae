"""The model card (README.md) of an exported model: where it comes from, its shape, and measured figures."""

from collections.abc import Mapping
from typing import Any

import yaml

from minitron.config.model import SHAPE, ModelConfig
from minitron.models.axes import num_embedding_parameters, num_parameters
from minitron.models.origin import LICENSE_KEYS

_SIZES = (*SHAPE, "num_moe_experts")

_ROWS = {
    "teacher": "source, unpruned (the teacher)",
    "pruned": "pruned, before distillation",
    "distilled": "**pruned and distilled (this model)**",
    "baseline": "same shape from random weights, cross-entropy, same tokens",
}


def model_card(
    *,
    name: str,
    source: str,
    origin: Mapping[str, str],
    before: ModelConfig,
    after: ModelConfig,
    figures: Mapping[str, Mapping[str, Any]],
    distill_tokens: int,
    environment: Mapping[str, str],
) -> str:
    """Write the card in Markdown, with Hugging Face's front matter.

    Args:
        name: Name of the run.
        source: Name of the source model.
        origin: Its base model and licence, where they are known (`minitron.models.origin`).
        before: Its architecture.
        after: The pruned architecture.
        figures: ``loss`` (nats per token), ``perplexity`` and ``num_tokens`` of each evaluated model.
        distill_tokens: Tokens the student was distilled on.
        environment: Versions it was made with.
    """
    sizes = "\n".join(
        f"| {size} | {getattr(before, size)} | {getattr(after, size)} |"
        for size in _SIZES
        if getattr(before, size) is not None
    )
    rows = "\n".join(
        f"| {text} | {figures[key]['loss']:.4f} | {figures[key]['perplexity']:.2f} |"
        for key, text in _ROWS.items()
        if key in figures
    )
    tokens = next((figure["num_tokens"] for figure in figures.values()), 0)
    made_with = ", ".join(f"{key} {value}" for key, value in environment.items() if key != "machine")
    known = {key: origin[key] for key in ("base_model", *LICENSE_KEYS) if key in origin}
    front = yaml.safe_dump(known, sort_keys=False, allow_unicode=True) if known else ""
    return f"""---
{front}library_name: transformers
pipeline_tag: text-generation
tags:
- minitron
- pruning
- distillation
---

# {name}

{source}, pruned by activation importance and distilled from the unpruned model with
[minitron](https://arxiv.org/abs/2407.14679) (forward KL on full logits, {distill_tokens:,} tokens).

| | source | this model |
|---|---|---|
| parameters | {num_parameters(before):,} | {num_parameters(after):,} |
| without embeddings | {_body(before):,} | {_body(after):,} |
{sizes}

Measured on {tokens:,} held-out tokens of the run's own text:

| model | loss, nats per token | perplexity |
|---|---|---|
{rows}

Made with {made_with}.
"""


def _body(model: ModelConfig) -> int:
    return num_parameters(model) - num_embedding_parameters(model)
