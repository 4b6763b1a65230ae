"""What pruning kept and dropped, in figures, and the check that it wrote what was planned."""

from math import prod
from pathlib import Path

import numpy as np

from minitron.checkpoint.folder import weights_dir
from minitron.checkpoint.store import CheckpointReader
from minitron.config.model import ModelConfig
from minitron.config.prune import SIZES, HeadResidual
from minitron.errors import CheckpointError
from minitron.models.axes import num_embedding_parameters, num_parameters
from minitron.prune.depth_scores import Floats
from minitron.prune.spec import PruneSpec, write_units

_NAMES = {
    "num_layers": "layers",
    "hidden_size": "hidden",
    "ffn_hidden_size": "ffn",
    "num_attention_heads": "heads",
    "num_query_groups": "groups",
    "num_moe_experts": "experts",
}


def check_parameters(folder: Path, target: ModelConfig) -> int:
    """Count the parameters of a pruned checkpoint; cheap, for only its metadata is read.

    Args:
        folder: The checkpoint folder.
        target: The architecture that it should have.

    Returns:
        The count.

    Raises:
        CheckpointError: It is not that of the architecture.
    """
    tensors = CheckpointReader(weights_dir(folder)).tensors
    count, planned = sum(prod(info.shape) for info in tensors.values()), num_parameters(target)
    if count != planned:
        raise CheckpointError(
            f"{folder} holds {count:,} parameters, but the pruned model has {planned:,}; remove the folder and prune "
            "again"
        )
    return count


def describe(spec: PruneSpec) -> dict[str, object]:
    """Sizes before and after, and what was dropped, for the summary of a prune stage."""
    source, target = spec.source, spec.target
    summary: dict[str, object] = {}
    for size in SIZES:
        before, after = getattr(source, size), getattr(target, size)
        if before is not None and (size != "num_query_groups" or before != after):
            summary[_NAMES[size]] = f"{before} -> {after}"
    summary["dropped_layers"] = write_units([n for n in range(source.num_layers) if n not in spec.layers])
    if spec.head_residual is not HeadResidual.none:
        summary["merged_heads"] = sum(map(len, spec.head_pairs))
    summary["parameters"] = num_parameters(target)
    summary["non_embedding"] = num_parameters(target) - num_embedding_parameters(target)
    return summary


def scores_kept(
    spec: PruneSpec, *, ffn: Floats, head: Floats, hidden: Floats, layer: Floats | None
) -> dict[str, object]:
    """Share of the sum of scores that every pruned axis keeps, for the summary; of neurons and heads in kept layers.

    Args:
        spec: What is kept.
        ffn: Scores of the neurons, ``[L, F]``.
        head: Scores of the query heads, ``[L, N]``.
        hidden: Scores of the channels, ``[H]``.
        layer: Scores of the layers one by one, ``[L]``; None where they were chosen by something else.
    """
    sums = {
        "hidden": (hidden[spec.hidden].sum(), hidden.sum()),
        "ffn": _of_layers(ffn, spec.layers, spec.ffn),
        "heads": _of_layers(head, spec.layers, spec.heads),
    }
    if layer is not None:
        sums["layers"] = (layer[spec.layers].sum(), layer.sum())
    pruned = {name for size, name in _NAMES.items() if getattr(spec.source, size) != getattr(spec.target, size)}
    return {
        f"score_kept_{axis}": round(float(kept / whole), 4)
        for axis, (kept, whole) in sums.items()
        if axis in pruned and whole > 0
    }


def _of_layers(scores_LX: Floats, layers: list[int], kept: list[list[int]]) -> tuple[float, float]:
    inside = sum(float(np.sum(scores_LX[layer, units])) for layer, units in zip(layers, kept, strict=True))
    return inside, float(scores_LX[layers].sum())
