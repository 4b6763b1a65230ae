"""The teacher_logits stage: run the teacher over training sequences and keep sparse distributions of them."""

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

from minitron.config.teacher_logits import CacheMethod, TeacherLogitsConfig
from minitron.data.batch import NO_SAMPLE, Batch
from minitron.data.loader import FixedBatches, training_sequences
from minitron.data.order import Indices
from minitron.distill.cache_format import (
    INFO_FILE,
    PARTIAL_SUFFIX,
    SHARD_SUFFIX,
    CacheIdentity,
    Codec,
    LogitCache,
    write_identity,
    write_shard,
)
from minitron.distill.cache_plan import cache_identity, needed_samples
from minitron.distill.sparsify import sparse_entries
from minitron.distill.teacher import freeze
from minitron.distill.vocabulary import common_vocab_size, vocabulary_of
from minitron.errors import ArtefactError, StoppedError
from minitron.losses.vocab import VocabShard
from minitron.models.gpt import Chunks, FinalState
from minitron.models.load import load_gpt
from minitron.parallel.groups import Groups
from minitron.runtime.session import Session
from minitron.runtime.signals import stop_agreement
from minitron.train.heldout import forward_only, groups_of

_SHARD_SECONDS = 60.0

Record = tuple[int, bytes]
"""Sample index and bytes."""


def write_teacher_logits(
    session: Session, *, teacher: Path, teacher_id: str, imported: Path, data: Path, out: Path
) -> dict[str, float]:
    """Add to a cache what the configured distillation will read and the cache does not have.

    Args:
        session: The running job; the teacher runs in its layout, context-parallel ranks as data-parallel ones.
        teacher: Checkpoint folder of the teacher.
        teacher_id: Identity of its weights.
        imported: Checkpoint folder whose tokenizer made the data.
        data: The data folder.
        out: The cache's folder; holds what was written before.

    Returns:
        Samples and bytes of the whole cache, and its bytes per token.

    Raises:
        ModelError: The teacher's tokenizer is another than the data's.
        ArtefactError: What is in the folder belongs to something else or is damaged, or the disk is too small.
        StoppedError: The job was asked to stop; the next call goes on from the shards.
    """
    common = common_vocab_size(vocabulary_of(teacher), vocabulary_of(imported))
    identity = cache_identity(session.config, data, teacher=teacher_id, vocab_size=common)
    with session.context_as_data() as whole:  # distributions are kept by whole sequences
        missing = _write_missing(whole, teacher, identity, data, out)
    if not session.is_main:
        return {}
    cache = LogitCache(out)
    assert not len(cache.missing(missing))
    per_token = cache.num_bytes / max(1, len(cache.samples) * identity.seq_length)
    return {"samples": len(cache.samples), "bytes": cache.num_bytes, "bytes_per_token": per_token}


def _write_missing(session: Session, teacher: Path, identity: CacheIdentity, data: Path, out: Path) -> Indices:
    """Run the teacher over the samples that are not in the cache, and add them.

    Returns:
        These samples.

    Raises:
        StoppedError: The ranks agreed to stop; what was made is in the cache.
    """
    settings, groups = session.config.teacher_logits, session.groups
    missing, first_shard = _open(session, identity, data, out)
    torch.distributed.barrier()  # from here on the folder changes
    if len(missing):
        precision = session.config.distill.teacher.precision(session.config.precision)
        gpt, _model = load_gpt(teacher, session, precision=precision)
        writer = _ShardWriter(out, first_shard, groups, max_bytes=settings.shard_mb * 10**6)
        batches = FixedBatches(
            training_sequences(data, identity.seq_length),
            indices=missing,
            seq_length=identity.seq_length,
            micro_batch_size=settings.micro_batch_size,
            dp_rank=groups.dp_rank,
            dp_size=groups.dp.size(),
        )
        num_done = 0
        with stop_agreement() as stop_agreed:
            for records, sequences in _run_teacher(session, freeze(gpt), batches, identity, stop_agreed):
                writer.add(records)
                num_done = sequences
        writer.close()
        torch.distributed.barrier()
        if num_done < len(missing):
            raise StoppedError(
                f"stopped after {num_done:,} of {len(missing):,} sequences, saved; the same command goes on from there"
            )
    return missing


def _open(session: Session, identity: CacheIdentity, data: Path, out: Path) -> tuple[Indices, int]:
    """What is missing, and the number of the first shard to write; the size is said, or refused."""
    if session.is_main and not (out / INFO_FILE).exists():
        write_identity(out, identity)
    torch.distributed.barrier()
    cache = LogitCache(out)
    cache.check(identity, to_extend=True)
    missing = cache.missing(needed_samples(session.config, data))
    numbers = [int(shard.name.split("-")[0]) for shard in out.glob(f"*{SHARD_SUFFIX}")]
    session.say(f"  {planned_size(out, identity, len(missing))}; {len(cache.samples):,} are there")
    torch.distributed.barrier()
    if session.is_main:
        for left_over in out.glob(f"*{PARTIAL_SUFFIX}"):
            left_over.unlink()
    return missing, max(numbers, default=-1) + 1


def planned_size(folder: Path, identity: CacheIdentity, num_samples: int) -> str:
    """What so many samples will take, in words.

    Args:
        folder: Where they go.
        identity: What the cache belongs to.
        num_samples: Samples to write.

    Raises:
        ArtefactError: That is more than the disk has free. What is only known to be no more than so much is not
            refused: sharp distributions take a fraction of it, and what is made is kept when a disk fills.
    """
    settings = identity.settings
    per_token = settings.max_bytes_per_token(identity.vocab_size)
    total, free = per_token * num_samples * identity.seq_length, shutil.disk_usage(folder).free
    exact = settings.method is CacheMethod.top_k
    if exact and total > free:
        raise ArtefactError(
            f"{folder}: the cache would take {total / 1e9:.3g} GB but {free / 1e9:.3g} GB are free; lower "
            f"teacher_logits.top_k={settings.max_entries} or distill.train.num_tokens, or set runs_dir= to a larger "
            "disk"
        )
    most, fits = ("", "") if exact else ("at most ", ", which may not do" if total > free else "")
    return (
        f"{num_samples:,} sequences to write: {most}{per_token} bytes/token, {most}{total / 1e9:.3g} GB of "
        f"{free / 1e9:.3g} GB free{fits}"
    )


def _run_teacher(
    session: Session, gpt: Chunks, batches: FixedBatches, identity: CacheIdentity, stop_agreed: Callable[[], bool]
) -> Iterator[tuple[list[Record], int]]:
    """The records of each schedule, empty on all but one rank of each last stage, and all ranks' sequences so far.

    It ends early when the ranks agree to stop.
    """
    groups, device = session.groups, session.torch_device
    keeper = _Keeper(identity, groups, sequence_parallel=session.config.parallel.sequence_parallel)
    done, started = 0, time.monotonic()
    with session.progress("teacher_logits") as progress:
        for group in groups_of(batches, groups):
            results = forward_only(gpt, [batch.to(device) for batch in group], keeper)
            done += len(group)
            sequences = min(done * len(group[0].tokens_BS) * groups.dp.size(), batches.num_sequences)
            yield [record for records in results for record in records], sequences
            speed = sequences * identity.seq_length / (time.monotonic() - started)
            progress.update(sequences, batches.num_sequences, tokens_per_s=speed)
            if sequences < batches.num_sequences and stop_agreed():
                return


class _Keeper:
    """Turns the teacher's final state of a micro-batch into records, on the last stage."""

    def __init__(self, identity: CacheIdentity, groups: Groups, *, sequence_parallel: bool) -> None:
        self._identity = identity
        self._settings: TeacherLogitsConfig = identity.settings
        self._codec = Codec(self._settings, identity.vocab_size, identity.seq_length)
        self._groups = groups
        self._sequence_parallel = sequence_parallel

    def __call__(self, state: FinalState, batch: Batch) -> list[Record]:
        hidden_SBH = state.hidden_SBH
        if self._sequence_parallel:
            hidden_SBH = gather_from_sequence_parallel_region(hidden_SBH, group=self._groups.tp)
        vocab = VocabShard.build(self._identity.vocab_size, state.weight_vH.shape[0], self._groups.tp)
        records = []
        for row, sample in enumerate(batch.sample_index_B.tolist()):
            if sample == NO_SAMPLE:
                continue
            entries = sparse_entries(hidden_SBH[:, row], state.weight_vH, sample, self._settings, vocab)
            if self._groups.tp_rank == 0:
                records.append((sample, self._codec.encode(entries)))
        return records


class _ShardWriter:
    """Collects this rank's records and writes a shard when there are enough, or a minute has passed.

    A name has a number, which no earlier shard has, and the data-parallel rank.
    """

    def __init__(self, folder: Path, number: int, groups: Groups, *, max_bytes: int) -> None:
        self._folder, self._number, self._dp_rank, self._max_bytes = folder, number, groups.dp_rank, max_bytes
        self._records: list[Record] = []
        self._started = time.monotonic()

    def add(self, records: list[Record]) -> None:
        self._records += records
        num_bytes = sum(len(record) for _, record in self._records)
        if num_bytes >= self._max_bytes or time.monotonic() - self._started > _SHARD_SECONDS:
            self.close()

    def close(self) -> None:
        """Write what is left."""
        if self._records:
            write_shard(self._folder / f"{self._number:06d}-{self._dp_rank:05d}{SHARD_SUFFIX}", self._records)
            self._number += 1
        self._records, self._started = [], time.monotonic()
