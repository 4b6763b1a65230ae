"""The model that a run compresses, before anything is imported."""

from pathlib import Path

from minitron.config.model import ModelConfig
from minitron.config.run import RunConfig, SourceKind
from minitron.models.hf_import import inspect_source
from minitron.models.random_source import random_model


def source_model(config: RunConfig) -> ModelConfig:
    """Architecture of the model to compress, every cheap check made."""
    if config.source.kind is SourceKind.path:
        assert config.source.path is not None  # checked when composed
        return inspect_source(Path(config.source.path)).model
    return random_model(config.source.random)
