"""What decides the results of the score and prune stages, and what they show. Light: read when a job is planned."""

import hashlib
from pathlib import Path
from typing import Any

from minitron.config.compose import flat_values
from minitron.config.depth import depth_values
from minitron.config.run import RunConfig
from minitron.config.score import DepthMetric
from minitron.errors import ConfigError
from minitron.prune.given import given_identity
from minitron.prune.scores import scores_fingerprint

Values = dict[str, Any]


def sequences(config: RunConfig) -> Values:
    """How the text is cut, for whatever reads sequences of it."""
    return {"data.seq_length": config.data.seq_length}


def score_values(config: RunConfig) -> Values:
    """What is scored; and of ``prune`` what decides that."""
    asked = depth_values(config.score, config.prune)
    unread = ["micro_batch_size", "questions"]
    if not (asked or config.score.depth.metrics or config.score.depth.blocks):
        unread.append("depth.num_samples")
    values = {k: v for k, v in flat_values(config.score, "score").items() if not k.endswith(tuple(unread))}
    if config.score.rounds > 1:
        asked = prune_values(config)
    if values["score.seq_length"] is None:
        values |= sequences(config)
    return values | asked | {"precision.dtype": config.precision.dtype.value} | {"seed": config.seed}


def prune_values(config: RunConfig) -> Values:
    """What is kept; of ``prune.scores`` and ``prune.spec`` the content counts, see `prune_outside`."""
    values = flat_values(config.prune, "prune")
    del values["prune.scores"], values["prune.spec"]
    if not config.prune.reconstruct.enabled:
        enabled = "prune.reconstruct.enabled"  # the others are not read
        return {
            key: value for key, value in values.items() if key == enabled or not key.startswith("prune.reconstruct.")
        }
    del values["prune.reconstruct.micro_batch_size"]
    return values | sequences(config) | {"precision.dtype": config.precision.dtype.value} | {"seed": config.seed}


def prune_needs(config: RunConfig) -> tuple[str, ...]:
    """Scores of this run rank, and text is what the kept weights are fitted on."""
    scored = config.prune.needs_scores and not config.prune.scores
    fitted = config.prune.reconstruct.enabled
    return ("source", *(["score"] if scored else []), *(["data"] if fitted else []))


def questions_outside(config: RunConfig) -> dict[str, str]:
    """Content of ``score.depth.questions``, where they are asked."""
    questions = config.score.depth.questions
    metrics = [*config.score.depth.metrics, config.prune.depth_metric]
    if questions is None or DepthMetric.accuracy not in metrics:
        return {}
    try:
        return {"questions": hashlib.sha256(Path(questions).read_bytes()).hexdigest()}
    except OSError as error:
        raise ConfigError(f"score.depth.questions={questions} cannot be read: {error.strerror}") from error


def prune_outside(config: RunConfig) -> dict[str, str]:
    """Content of ``prune.scores``, or of ``prune.spec``."""
    given = config.prune.scores
    return {"scores": scores_fingerprint(Path(given))} if given else given_identity(config.prune)


def verify_values(config: RunConfig) -> Values:
    """What the pruned model is run with."""
    return sequences(config) | {"precision.dtype": config.precision.dtype.value, "seed": config.seed}
