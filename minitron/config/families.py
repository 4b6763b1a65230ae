"""What pruning can do with which architecture, said before anything starts."""

from minitron.config.model import Architecture, ModelConfig
from minitron.config.prune import HeadResidual, PruneConfig
from minitron.config.score import ScoreConfig
from minitron.errors import PruneError

_QK_NORMED = (Architecture.qwen3, Architecture.qwen3_moe)

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
    if prune.head_residual is not HeadResidual.none and architecture in _QK_NORMED:
        raise PruneError(
            f"prune.head_residual={prune.head_residual} adds up queries, but {architecture} norms them afterwards, so "
            "that the sum is not what is attended with; set prune.head_residual=none"
        )
    if score.rounds > 1 and source.num_moe_experts is not None:
        raise PruneError(
            f"score.rounds={score.rounds} cuts dense models only, not {architecture} with experts; set score.rounds=1"
        )
