"""Importance scores of one model: what the calibration pass leaves and pruning reads."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from minitron.config.model import ModelConfig
from minitron.config.prune import HiddenNorm
from minitron.config.score import Aggregation, DepthMetric, FfnActivation, HeadNorm
from minitron.errors import ArtefactError, NumericsError, PruneError
from minitron.models.axes import Axis, score_sites_of
from minitron.prune.depth_scores import DepthScores, Floats

ARRAYS_FILE = "scores.safetensors"
ABOUT_FILE = "scores.json"
WIDTH_AXES = ("ffn", "head", "hidden", "final")
"""Arrays of one aggregation."""


@dataclass(kw_only=True)
class WidthScores:
    """Scores of the three width axes under one aggregation; higher is more important.

    Attributes:
        ffn: ``[L, F]``, per layer and neuron; with experts ``[L, E * F]``, the layer's experts one after the other.
        head: ``[L, N]``, per layer and query head.
        hidden: ``[M, H]``, per norm of a layer and channel, the norms in network order (Llama: two per
            layer, so row ``2 * layer`` is the input norm). Kept per norm, for how to sum them is a
            decision of the ranking.
        final: ``[H]``, of the final norm.
    """

    ffn: Floats
    head: Floats
    hidden: Floats
    final: Floats


@dataclass(kw_only=True)
class Scores:
    """All scores of one calibration pass.

    Attributes:
        model: Architecture of the scored model.
        source_id: Identity of the scored weights, as the caller names it (a content hash).
        num_samples: Calibration sequences seen.
        seq_length: Tokens in each.
        head_norm: Where the norm over a head's channels was taken.
        ffn_activation: On which side of the activation function neurons were seen.
        width: Scores by aggregation.
        expert: ``[L, E]``, the mean over the tokens that are routed to an expert of the norm of what it adds to the
            layer's output, its routing weight included (arXiv 2510.13999); None for a model without experts.
        layer: ``[L]``, block importance ``1 - E[cos(layer input, layer output)]`` over all tokens
            (paper 1, section 2.2); higher is more important.
        depth: What was measured by taking layers out.
    """

    model: ModelConfig
    source_id: str
    num_samples: int
    seq_length: int
    head_norm: HeadNorm
    width: dict[Aggregation, WidthScores]
    layer: Floats
    ffn_activation: FfnActivation = FfnActivation.after
    depth: DepthScores = field(default_factory=DepthScores)
    expert: Floats | None = None

    def validate(self) -> None:
        """Check shapes and values.

        Raises:
            PruneError: An array has not the model's shape.
            NumericsError: A score is not finite.
        """
        shapes = _shapes(self.model)
        depth = self.depth.shapes(self.model.num_layers)
        if self.model.num_moe_experts and self.expert is None:
            raise PruneError("scores: those of the experts are missing; score this model again")
        for name, array in self._arrays().items():
            want = depth[name] if name in depth else shapes[name.split(".")[-1]]
            if array.shape != want:
                raise PruneError(
                    f"scores: {name} has shape {array.shape}, but the model needs {want}; score this model again"
                )
            if not np.isfinite(array).all():
                count = int((~np.isfinite(array)).sum())
                raise NumericsError(
                    f"scores: {count} of {array.size} values of {name} are not finite; the model's "
                    "activations overflow, so check the imported weights or score in bf16 or fp32"
                )

    def for_aggregation(self, aggregation: Aggregation) -> WidthScores:
        """The scores of one aggregation.

        Raises:
            PruneError: The pass did not save it.
        """
        if aggregation not in self.width:
            have = ", ".join(a.value for a in self.width)
            raise PruneError(
                f"prune.aggregation={aggregation.value} is not among the saved scores ({have}); "
                f"add it to score.aggregations and score again"
            )
        return self.width[aggregation]

    def channels(self, aggregation: Aggregation, norms: Sequence[HiddenNorm]) -> Floats:
        """``[H]``: the scores of the residual stream's channels, summed over norms.

        Args:
            aggregation: Which of the saved aggregations.
            norms: Which norms: those of all layers by their names, and the final one.

        Raises:
            PruneError: The pass did not save the aggregation, or the model has no such norm.
        """
        width = self.for_aggregation(aggregation)
        names = [site.module for site in score_sites_of(self.model) if site.axis is Axis.hidden]
        lacking = [norm.name for norm in norms if norm not in (*names, HiddenNorm.final)]
        if lacking:
            have = ", ".join(norm.name for norm in HiddenNorm if norm in (*names, HiddenNorm.final))
            raise PruneError(
                f"prune.hidden_norms names {', '.join(lacking)}, which this model's layers lack; choose from {have}"
            )
        chosen = [name in norms for name in names] * self.model.num_layers
        total: Floats = width.hidden[np.array(chosen)].sum(axis=0)
        return total + width.final if HiddenNorm.final in norms else total

    def blocks(self, metric: DepthMetric, size: int) -> Floats:
        """``[L - size + 1]``: the scores of all blocks of contiguous layers of a size.

        Raises:
            PruneError: They were not measured.
        """
        if metric is DepthMetric.block_importance and size == 1:
            return self.layer
        return self.depth.block(metric, size)

    def save(self, folder: Path) -> None:
        """Write ``scores.safetensors`` (arrays) and ``scores.json`` (the rest) into a folder."""
        self.validate()
        folder.mkdir(parents=True, exist_ok=True)
        about = {
            "model": self.model.to_dict(),
            "source_id": self.source_id,
            "num_samples": self.num_samples,
            "seq_length": self.seq_length,
            "head_norm": self.head_norm.value,
            "ffn_activation": self.ffn_activation.value,
            "depth": self.depth.about(),
            "aggregations": [a.value for a in self.width],
        }
        save_file(
            {name: np.ascontiguousarray(array) for name, array in self._arrays().items()},
            folder / ARRAYS_FILE,
        )
        (folder / ABOUT_FILE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Inverse of `save`.

        Raises:
            ArtefactError: The folder holds no scores, or they cannot be read.
            PruneError: The arrays do not fit the architecture beside them.
        """
        try:
            about: dict[str, Any] = json.loads((folder / ABOUT_FILE).read_text(encoding="utf-8"))
            arrays: dict[str, Floats] = load_file(folder / ARRAYS_FILE)
            scores = cls(
                model=ModelConfig.from_dict(about["model"]),
                source_id=about["source_id"],
                num_samples=about["num_samples"],
                seq_length=about["seq_length"],
                head_norm=HeadNorm(about["head_norm"]),
                ffn_activation=FfnActivation(about["ffn_activation"]),
                depth=DepthScores.of(about["depth"], arrays),
                width={
                    Aggregation(name): WidthScores(**{axis: arrays[f"{name}.{axis}"] for axis in WIDTH_AXES})
                    for name in about["aggregations"]
                },
                layer=arrays["layer"],
                expert=arrays.get("expert"),
            )
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise ArtefactError(
                f"{folder} holds no readable scores ({type(error).__name__}: {error}); run the score stage again"
            ) from error
        scores.validate()
        return scores

    def _arrays(self) -> dict[str, Floats]:
        """Every array under its name in the file."""
        arrays = {"layer": self.layer, **self.depth.arrays()}
        if self.expert is not None:
            arrays["expert"] = self.expert
        for aggregation, width in self.width.items():
            for axis in WIDTH_AXES:
                arrays[f"{aggregation.value}.{axis}"] = getattr(width, axis)
        return arrays


def scores_fingerprint(folder: Path) -> str:
    """SHA-256 of the scores in a folder.

    Raises:
        ArtefactError: There are none.
    """
    digest = hashlib.sha256()
    try:
        for name in (ABOUT_FILE, ARRAYS_FILE):
            digest.update((folder / name).read_bytes())
    except OSError as error:
        raise ArtefactError(
            f"prune.scores={folder} holds no scores ({error.strerror}: {error.filename}); give the score folder of "
            "another run, such as runs/other/score"
        ) from error
    return digest.hexdigest()


def random_scores(model: ModelConfig, aggregation: Aggregation, seed: int) -> Scores:
    """Scores drawn at random, for the ablation that prunes at random (paper 2, Figure 6)."""
    rng = np.random.default_rng(seed)
    drawn = {name: rng.random(shape) for name, shape in _shapes(model).items()}
    return Scores(
        model=model,
        source_id="random",
        num_samples=0,
        seq_length=0,
        head_norm=HeadNorm.token,
        width={aggregation: WidthScores(**{axis: drawn[axis] for axis in WIDTH_AXES})},
        layer=drawn["layer"],
        expert=drawn["expert"] if model.num_moe_experts else None,
    )


def _shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each kind of array."""
    norms = sum(site.axis is Axis.hidden for site in score_sites_of(model))
    return {
        "ffn": (model.num_layers, model.num_ffn_units),
        "expert": (model.num_layers, model.num_moe_experts or 0),
        "head": (model.num_layers, model.num_attention_heads),
        "hidden": (model.num_layers * norms, model.hidden_size),
        "layer": (model.num_layers,),
        "final": (model.hidden_size,),
    }
