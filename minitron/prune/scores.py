"""Importance scores of one model: what the calibration pass leaves and pruning reads."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from minitron.config.model import ModelConfig
from minitron.config.score import Aggregation, HeadNorm
from minitron.errors import ArtefactError, NumericsError, PruneError
from minitron.models.axes import Axis, score_sites_of

Floats = NDArray[np.float64]

ARRAYS_FILE = "scores.safetensors"
ABOUT_FILE = "scores.json"


@dataclass(kw_only=True)
class WidthScores:
    """Scores of the three width axes under one aggregation; higher is more important.

    Attributes:
        ffn: ``[L, F]``, per layer and neuron; with experts ``[L, E * F]``, the layer's experts one after the other.
        head: ``[L, N]``, per layer and query head.
        hidden: ``[M, H]``, per norm and channel, the norms in network order (Llama: two per layer,
            so row ``2 * layer`` is the input norm). Kept per norm, for how to sum them is a
            decision of the ranking.
    """

    ffn: Floats
    head: Floats
    hidden: Floats


@dataclass(kw_only=True)
class Scores:
    """All scores of one calibration pass.

    Attributes:
        model: Architecture of the scored model.
        source_id: Identity of the scored weights, as the caller names it (a content hash).
        num_samples: Calibration sequences seen.
        seq_length: Tokens in each.
        head_norm: Where the norm over a head's channels was taken.
        width: Scores by aggregation.
        expert: ``[L, E]``, the mean over the tokens that are routed to an expert of the norm of what it adds to the
            layer's output, its routing weight included (arXiv 2510.13999); None for a model without experts.
        layer: ``[L]``, block importance ``1 - E[cos(layer input, layer output)]`` over all tokens
            (paper 1, section 2.2); higher is more important.
    """

    model: ModelConfig
    source_id: str
    num_samples: int
    seq_length: int
    head_norm: HeadNorm
    width: dict[Aggregation, WidthScores]
    layer: Floats
    expert: Floats | None = None

    def validate(self) -> None:
        """Check shapes and values.

        Raises:
            PruneError: An array has not the model's shape.
            NumericsError: A score is not finite.
        """
        shapes = _shapes(self.model)
        if self.model.num_moe_experts and self.expert is None:
            raise PruneError("scores: those of the experts are missing; score this model again")
        for name, array in self._arrays().items():
            want = shapes[name.split(".")[-1]]
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
                width={
                    Aggregation(name): WidthScores(
                        **{axis: arrays[f"{name}.{axis}"] for axis in ("ffn", "head", "hidden")}
                    )
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
        arrays = {"layer": self.layer}
        if self.expert is not None:
            arrays["expert"] = self.expert
        for aggregation, width in self.width.items():
            for axis in ("ffn", "head", "hidden"):
                arrays[f"{aggregation.value}.{axis}"] = getattr(width, axis)
        return arrays


def random_scores(model: ModelConfig, aggregation: Aggregation, seed: int) -> Scores:
    """Scores drawn at random, for the ablation that prunes at random (paper 2, Figure 6)."""
    rng = np.random.default_rng(seed)
    shapes = _shapes(model)
    width = WidthScores(**{axis: rng.random(shapes[axis]) for axis in ("ffn", "head", "hidden")})
    return Scores(
        model=model,
        source_id="random",
        num_samples=0,
        seq_length=0,
        head_norm=HeadNorm.token,
        width={aggregation: width},
        layer=rng.random(shapes["layer"]),
        expert=rng.random(shapes["expert"]) if model.num_moe_experts else None,
    )


def _shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each kind of array."""
    norms = sum(site.axis is Axis.hidden for site in score_sites_of(model))
    return {
        "layer": (model.num_layers,),
        "ffn": (model.num_layers, model.num_ffn_units),
        "expert": (model.num_layers, model.num_moe_experts or 0),
        "head": (model.num_layers, model.num_attention_heads),
        "hidden": (model.num_layers * norms, model.hidden_size),
    }
