"""Text to Megatron ``.bin/.idx`` files: ``train``, ``heldout`` and ``data.json``."""

import hashlib
import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import DType

from minitron.config.data import DataConfig
from minitron.data.growing import SAVE_EVERY_BYTES, GrowingDataset, forget_progress
from minitron.data.packed import check_split
from minitron.data.sources import iter_documents, source_fingerprint
from minitron.data.summary import SUMMARY_NAME, DatasetSummary, Split, check_tokens, load_summary, save_summary
from minitron.data.tokenize import TokenizerSpec, encode_documents, load_tokenizer_spec
from minitron.errors import DataError, StoppedError
from minitron.runtime.digests import digest_of


def build_dataset(
    cfg: DataConfig,
    *,
    tokenizer_dir: Path,
    vocab_size: int,
    out_dir: Path,
    planned_text: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> DatasetSummary:
    """Tokenize the text that ``cfg`` names and write both splits into ``out_dir``.

    A document goes to train or held-out by the hash of its text. The same text, tokenizer and
    ``cfg`` give the same bytes, whatever ``num_workers`` is and however often it was interrupted.
    ``data.json`` is written last: a folder without it is unfinished, and the next build of the same
    text goes on from there. One that is finished is left as it is.

    Args:
        cfg: the text, the split and the number of processes.
        tokenizer_dir: local folder of a Hugging Face tokenizer.
        vocab_size: the model's vocabulary; every id must lie below it.
        out_dir: made if missing; files of an earlier build of other text are replaced.
        planned_text: `source_fingerprint` that the text had when the work was planned.
        on_progress: called with (documents, bytes of text) done so far, about every 0.5 MB.
        should_stop: asked as often; when it says so, what is done is saved.

    Raises:
        DataError: the text is missing or broken or no longer what was planned, or a split is shorter than one
            sequence.
        ModelError: the tokenizer cannot be used or does not fit the model.
        PlatformError: a tokenizing process died.
        StoppedError: ``should_stop`` said so.
    """
    spec = load_tokenizer_spec(tokenizer_dir, vocab_size=vocab_size, parse_special_tokens=cfg.parse_special_tokens)
    fingerprint = source_fingerprint(cfg)
    if planned_text not in (None, fingerprint):
        raise DataError("the text has changed since this job was submitted or started: run the same command again")
    dtype = DType.optimal_dtype(vocab_size)
    facts: dict[str, Any] = {
        "eos_id": spec.eos_id,
        "vocab_size": vocab_size,
        "dtype": np.dtype(dtype).name,
        "tokenizer_sha256": spec.sha256,
        "source_fingerprint": fingerprint,
        "heldout_fraction": cfg.heldout_fraction,
    }
    summary = _made_before(out_dir, facts) or _make(cfg, spec, facts, out_dir, on_progress, should_stop)
    for split in Split:
        check_tokens(str(out_dir), split, summary.split(split).num_tokens, num_sequences=1, seq_length=cfg.seq_length)
    return summary


def _made_before(out_dir: Path, facts: dict[str, Any]) -> DatasetSummary | None:
    """What a finished folder of the same text says, where its files are those that it describes."""
    try:
        summary = load_summary(out_dir)
        if not facts.items() <= asdict(summary).items():
            return None
        for split in Split:
            check_split(out_dir, split)
    except DataError:
        return None
    forget_progress(out_dir)  # a kill may have left it
    return summary


def _make(
    cfg: DataConfig,
    spec: TokenizerSpec,
    facts: dict[str, Any],
    out_dir: Path,
    on_progress: Callable[[int, int], None] | None,
    should_stop: Callable[[], bool],
) -> DatasetSummary:
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / SUMMARY_NAME).unlink(missing_ok=True)
    source = json.dumps(facts)
    with closing(GrowingDataset(out_dir, facts["dtype"], source=source, heldout_fraction=cfg.heldout_fraction)) as made:
        _tokenize(cfg, spec, made, on_progress, should_stop)
        made.write_indices()
        splits = made.progress.splits
        train_sha256 = _content_sha256(out_dir / Split.train, made, should_stop)
        summary = DatasetSummary(
            train=splits[Split.train], heldout=splits[Split.heldout], train_sha256=train_sha256, **facts
        )
        save_summary(out_dir, summary)
    forget_progress(out_dir)
    return summary


def _tokenize(
    cfg: DataConfig,
    spec: TokenizerSpec,
    made: GrowingDataset,
    on_progress: Callable[[int, int], None] | None,
    should_stop: Callable[[], bool],
) -> None:
    """Add the documents that are not there yet."""
    go_on = partial(_stop_if_asked, made, should_stop)
    documents = iter_documents(cfg, after=made.progress.position, on_skip=go_on)
    with closing(encode_documents(documents, spec, num_workers=cfg.num_workers)) as batches:
        for batch in batches:
            for document, ids in batch:
                made.add(document, ids)
            made.save(every_bytes=SAVE_EVERY_BYTES)
            if on_progress is not None:
                on_progress(made.progress.num_documents, made.progress.position.num_bytes)
            go_on()


def _stop_if_asked(made: GrowingDataset, should_stop: Callable[[], bool]) -> None:
    if should_stop():
        made.save()
        done = f"{made.progress.num_documents:,} documents"
        raise StoppedError(f"stopped after {done}, saved; the same command goes on from there")


def _content_sha256(prefix: Path, made: GrowingDataset, should_stop: Callable[[], bool]) -> str:
    """Hash of a split's ids and of its index, which has the documents' lengths."""
    digest = hashlib.sha256()
    for suffix in (".bin", ".idx"):
        with prefix.with_suffix(suffix).open("rb") as stream:
            digest.update(bytes.fromhex(digest_of(stream, partial(_stop_if_asked, made, should_stop))))
    return digest.hexdigest()
