"""Content outside the run's folder that decides what a stage makes, as hashes for its identity."""

import functools
import hashlib
from pathlib import Path

from minitron.checkpoint.folder import fingerprint, is_checkpoint_folder
from minitron.config.logit_loss import LogitLossConfig
from minitron.config.run import RunConfig, SourceKind
from minitron.config.teacher_logits import CacheMethod
from minitron.data.sources import source_fingerprint as text_fingerprint
from minitron.distill.cache_format import read_identity
from minitron.errors import ConfigError
from minitron.models.hf_import import source_fingerprint as model_fingerprint
from minitron.runtime.artefact import META_FILE, RunFolder


def model_outside(config: RunConfig) -> dict[str, str]:
    """Content of ``source.path``."""
    if config.source.kind is SourceKind.random or config.source.path is None:
        return {}
    return {"model": model_fingerprint(Path(config.source.path))}


def checkpoint_outside(config: RunConfig) -> dict[str, str]:
    """Content of ``eval.checkpoint``: a Hugging Face folder, or a checkpoint folder of ours."""
    return _folder_outside("checkpoint", config.eval.checkpoint)


def teacher_outside(config: RunConfig) -> dict[str, str]:
    """Content of ``distill.teacher.path``, a checkpoint folder of ours."""
    return _folder_outside("teacher", config.distill.teacher.path)


def _folder_outside(name: str, given: str | None) -> dict[str, str]:
    if not given:
        return {}
    return {name: _model_identity(Path(given).resolve())}


@functools.cache
def _model_identity(folder: Path) -> str:
    """Identity of a model outside the run, found once a process: several stages ask, and a large one takes minutes.

    A finished stage of a run has the identity that the run's own plan has for it.
    """
    if not is_checkpoint_folder(folder):
        return model_fingerprint(folder)
    meta = RunFolder(folder.parent).meta(folder.name) if (folder / META_FILE).exists() else None
    return fingerprint(folder) if meta is None else str(meta["digest"])


def cache_outside(config: RunConfig) -> dict[str, str]:
    """What the cache of another run, ``distill.teacher.cache``, belongs to, and the teacher it should be of.

    Raises:
        ConfigError: ``distill.teacher.dtype`` or ``fp8_recipe`` is not that of the cache, or it is of random draws, for
            which ``distill.logit_loss.top_k_rest`` has no meaning.
    """
    taught = config.distill.teacher
    assert taught.cache is not None
    identity = read_identity(Path(taught.cache))
    asked = taught.precision(config.precision).label
    if (taught.dtype is not None or taught.fp8_recipe is not None) and asked != identity.dtype:
        raise ConfigError(
            f"distill.teacher.dtype and fp8_recipe say {asked}, but the teacher ran in {identity.dtype} when "
            f"distill.teacher.cache={taught.cache} was written; set them to null, or make a cache with "
            "`minitron teacher-logits`"
        )
    rest = config.distill.logit_loss.top_k_rest
    if rest is not LogitLossConfig().top_k_rest and identity.settings.method is CacheMethod.sampled:
        raise ConfigError(
            f"distill.logit_loss.top_k_rest={rest} has no meaning for the random draws in distill.teacher.cache="
            f"{taught.cache}; leave it out, or give a cache of teacher_logits.method=top_k"
        )
    cache = {"teacher_logits": hashlib.sha256(repr(identity).encode()).hexdigest()}
    return cache | teacher_outside(config)


def text_outside(config: RunConfig) -> dict[str, str]:
    """Content of the text."""
    return {"text": text_fingerprint(config.data)}
