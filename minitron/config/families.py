"""What pruning can do with which architecture, said before anything starts."""

from minitron.config.model import Architecture, ModelConfig
from minitron.config.prune import PruneConfig
from minitron.config.score import ScoreConfig
from minitron.errors import PruneError

LLAMA_LIKE = (Architecture.llama, Architecture.mistral)
"""Layers of RMSNorm and a gated ffn, without biases: those that are fitted, and that the masked teacher is made of."""


def check_family(source: ModelConfig, target: ModelConfig, prune: PruneConfig, score: ScoreConfig) -> None:
    """Refuse what does not work with the source's layers.

    Args:
        source: The model that is pruned.
        target: The pruned model.
        prune: The run's settings of pruning.
        score: Its settings of scoring.

    Raises:
        PruneError: A setting cannot be used; the message says which and what to set.
    """
    architecture = source.architecture
    if prune.reconstruct.enabled and source != target and architecture not in LLAMA_LIKE:
        raise PruneError(
            f"prune.reconstruct.enabled=true fits {', '.join(LLAMA_LIKE)} so far, not {architecture}; set "
            "prune.reconstruct.enabled=false"
        )
    if score.rounds > 1 and source.num_moe_experts is not None:
        raise PruneError(
            f"score.rounds={score.rounds} cuts dense models only, not {architecture} with experts; set score.rounds=1"
        )
