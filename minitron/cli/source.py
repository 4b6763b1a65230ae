"""The model that a run compresses, before anything is imported."""

import functools
from pathlib import Path

from minitron.config.model import ModelConfig
from minitron.config.run import RunConfig, SourceKind
from minitron.distill.vocabulary import Vocabulary, vocabulary_at
from minitron.models.hf_import import inspect_source
from minitron.models.random_source import random_model, random_token_ids


def source_model(config: RunConfig) -> ModelConfig:
    """Architecture of the model to compress, every cheap check made."""
    if config.source.kind is SourceKind.path:
        assert config.source.path is not None  # checked when composed
        model = _inspected(Path(config.source.path).resolve())
        if config.source.model is not None:
            model.check_sizes(config.source.model, f"source.path={config.source.path}")
        return model
    return random_model(config.source.random)


def source_vocabulary(config: RunConfig, source: ModelConfig) -> Vocabulary:
    """The vocabulary that the imported source will have.

    Args:
        config: The run.
        source: Its `source_model`.
    """
    if config.source.kind is SourceKind.path:
        assert config.source.path is not None
        return vocabulary_at(Path(config.source.path).resolve(), source.vocab_size)
    return Vocabulary("source.random", source.vocab_size, random_token_ids, {})


@functools.cache
def _inspected(path: Path) -> ModelConfig:
    """Looked at once a process: a search asks for every round."""
    return inspect_source(path).model
