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
from minitron.prune.scores import WidthScores
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


def describe(spec: PruneSpec, *, width: WidthScores | None, layer: Floats | None) -> dict[str, object]:
    """The summary of a prune stage: sizes, what was dropped, and the share of the scores that was kept.

    Args:
        spec: What is kept.
        width: Scores that channels, neurons and heads were ranked by; None where there were none.
        layer: Scores that layers were ranked by.
    """
    source, target = spec.source, spec.target
    summary: dict[str, object] = {}
    for size in SIZES:
        before, after = getattr(source, size), getattr(target, size)
        if before is not None and (size != "num_query_groups" or before != after):
            summary[_NAMES[size]] = f"{before} -> {after}"
    dropped = [number for number in range(source.num_layers) if number not in spec.layers]
    if dropped:
        summary["dropped_layers"] = write_units(dropped)
    if spec.head_residual is not HeadResidual.none:
        summary["merged_heads"] = sum(map(len, spec.head_pairs))
    summary["parameters"] = num_parameters(target)
    summary["non_embedding"] = num_parameters(target) - num_embedding_parameters(target)
    if width is not None and layer is not None:
        summary |= {f"score_kept_{axis}": round(share, 4) for axis, share in scores_kept(spec, width, layer).items()}
    return summary


def scores_kept(spec: PruneSpec, width: WidthScores, layer: Floats) -> dict[str, float]:
    """Share of the sum of scores that every pruned axis keeps; neurons and heads are those of kept layers.

    Args:
        spec: What is kept.
        width: Scores of channels (summed over norms), neurons and heads.
        layer: Scores of the layers, ``[L]``.
    """
    hidden_H = width.hidden.sum(axis=0)
    sums = {
        "layers": (layer[spec.layers].sum(), layer.sum()),
        "hidden": (hidden_H[spec.hidden].sum(), hidden_H.sum()),
        "ffn": _of_layers(width.ffn, spec.layers, spec.ffn),
        "heads": _of_layers(width.head, spec.layers, spec.heads),
    }
    pruned = {name for size, name in _NAMES.items() if getattr(spec.source, size) != getattr(spec.target, size)}
    return {axis: float(kept / whole) for axis, (kept, whole) in sums.items() if axis in pruned and whole > 0}


def _of_layers(scores_LX: Floats, layers: list[int], kept: list[list[int]]) -> tuple[float, float]:
    inside = sum(float(np.sum(scores_LX[layer, units])) for layer, units in zip(layers, kept, strict=True))
    return inside, float(scores_LX[layers].sum())
