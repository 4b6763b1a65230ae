"""What a distillation needs from a cache, and whether the cache has it. Light: planning asks this."""

from pathlib import Path

from minitron.config.run import RunConfig
from minitron.data.order import Indices, samples_of_run
from minitron.data.summary import load_summary, num_whole_sequences
from minitron.distill.cache_format import CacheIdentity, LogitCache


def needed_samples(config: RunConfig, data: Path) -> Indices:
    """The sample indices that the configured distillation reads, ascending.

    Args:
        config: The run's configuration.
        data: The data folder.

    Raises:
        DataError: The data folder is not finished.
    """
    train, seq_length = config.distill.train, config.data.seq_length
    return samples_of_run(
        num_whole_sequences(load_summary(data).train.num_tokens, seq_length),
        num_positions=train.num_steps(seq_length) * train.global_batch_size,
        seed=config.seed,
    )


def lacking(config: RunConfig, data: Path, cache: LogitCache) -> str | None:
    """How many of the needed samples a cache does not have, in words; None when it has all.

    Raises:
        DataError: The data folder is not finished.
    """
    needed = needed_samples(config, data)
    missing = cache.missing(needed)
    if not len(missing):
        return None
    return (
        f"{len(missing)} of the {len(needed)} sequences that distill.train.num_tokens="
        f"{config.distill.train.num_tokens} and seed={config.seed} read are not in {cache.folder}"
    )


def cache_identity(config: RunConfig, data: Path, *, teacher: str, vocab_size: int) -> CacheIdentity:
    """What this run's cache belongs to.

    Args:
        config: The run's configuration.
        data: The data folder.
        teacher: Identity of the teacher's weights.
        vocab_size: Ids that the teacher and the data's tokenizer both have.

    Raises:
        DataError: The data folder is not finished.
    """
    return CacheIdentity(
        dataset=load_summary(data).train_sha256,
        seq_length=config.data.seq_length,
        vocab_size=vocab_size,
        teacher=teacher,
        dtype=config.distill.teacher.precision(config.precision).label,
        parameters=config.teacher_logits.parameters(),
    )
