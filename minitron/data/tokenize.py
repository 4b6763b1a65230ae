"""Token ids for documents, in this process or in several.

Worker processes are spawned, never forked: the caller may hold gloo threads or a CUDA context. They
get the tokenizer as the JSON of its Rust half, so that a worker imports neither torch nor
transformers and is ready in a fraction of a second. Documents are encoded one by one, which keeps
to one thread per process: parallelism is ``num_workers`` and nothing else.
"""

import hashlib
import multiprocessing
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from minitron.data.documents import Document
from minitron.errors import ModelError, PlatformError

BATCH_BYTES = 512 * 1024
_BATCHES_IN_FLIGHT_PER_WORKER = 4

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True)
class TokenizerSpec:
    """What is needed of a tokenizer to turn text into ids, in a form that other processes can read.

    Attributes:
        json: the Rust tokenizer, serialized.
        eos_id: the id appended after each document.
        largest_id: the largest id in the vocabulary, added tokens included.
        parse_special_tokens: whether special tokens written out in the text are recognized.
    """

    json: str
    eos_id: int
    largest_id: int
    parse_special_tokens: bool

    @property
    def sha256(self) -> str:
        """Hash of everything that decides which ids a text gets."""
        key = f"{self.parse_special_tokens} {self.eos_id} {self.json}"
        return hashlib.sha256(key.encode()).hexdigest()


def load_tokenizer_spec(tokenizer_dir: Path, *, vocab_size: int, parse_special_tokens: bool) -> TokenizerSpec:
    """Read a Hugging Face tokenizer from a local folder and check that it fits the model.

    Raises:
        ModelError: the folder is missing or unreadable, the tokenizer has no fast version or no
            end-of-sequence token, or it has ids outside the model's vocabulary.
    """
    from transformers import AutoTokenizer  # takes seconds to import: not in the workers

    if not tokenizer_dir.is_dir():
        raise ModelError(f"{tokenizer_dir}: no such folder: name the folder of the tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_dir), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"{tokenizer_dir}: no tokenizer that transformers can load ({reason}): put its "
            "tokenizer.json and tokenizer_config.json there"
        ) from error
    if not tokenizer.is_fast:
        raise ModelError(
            f"{tokenizer_dir}: {type(tokenizer).__name__} has no fast version: convert it to a tokenizer.json"
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"{tokenizer_dir}: the tokenizer has no end-of-sequence token to put between documents"
            ": set eos_token in its tokenizer_config.json"
        )
    largest_id = max(tokenizer.get_vocab().values())
    if largest_id >= vocab_size:
        raise ModelError(
            f"{tokenizer_dir}: the tokenizer's largest id {largest_id} needs a vocabulary of "
            f"{largest_id + 1} but the model's vocab_size is {vocab_size}: use the model's own "
            "tokenizer"
        )
    return TokenizerSpec(
        json=tokenizer.backend_tokenizer.to_str(),
        eos_id=int(tokenizer.eos_token_id),
        largest_id=largest_id,
        parse_special_tokens=parse_special_tokens,
    )


class Encoder:
    """Text to ids, EOS last. Adds no other special token and truncates nothing."""

    def __init__(self, spec: TokenizerSpec) -> None:
        self._eos_id = spec.eos_id
        self._tokenizer = Tokenizer.from_str(spec.json)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = not spec.parse_special_tokens

    def __call__(self, texts: Sequence[str]) -> list[Ids]:
        """Return one array of ids per text."""
        encode = self._tokenizer.encode
        return [np.array([*encode(text, add_special_tokens=False).ids, self._eos_id], dtype=np.int32) for text in texts]


def encode_documents(
    documents: Iterable[Document], spec: TokenizerSpec, *, num_workers: int
) -> Generator[list[tuple[Document, Ids]]]:
    """Yield the documents with their ids, batch by batch, in order; lazily, with bounded memory.

    The result does not depend on ``num_workers``. A script that asks for two or more needs the
    usual ``if __name__ == "__main__"`` guard.

    Raises:
        PlatformError: a worker process died.
    """
    batches = _batches(documents)
    if num_workers == 1:
        encoder = Encoder(spec)
        for batch in batches:
            yield list(zip(batch, encoder([d.text for d in batch]), strict=True))
        return
    context = multiprocessing.get_context("spawn")
    pending: deque[tuple[list[Document], Future[list[Ids]]]] = deque()
    with ProcessPoolExecutor(num_workers, context, _start_worker, (spec,)) as pool:
        try:
            for batch in batches:
                pending.append((batch, pool.submit(_encode_in_worker, [d.text for d in batch])))
                if len(pending) >= num_workers * _BATCHES_IN_FLIGHT_PER_WORKER:
                    yield _finish(*pending.popleft())
            while pending:
                yield _finish(*pending.popleft())
        except BrokenProcessPool as error:
            raise PlatformError(
                f"one of the {num_workers} tokenizing processes died (out of memory?): lower data.num_workers"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)  # on an error too: do not encode the rest


def _finish(batch: list[Document], future: Future[list[Ids]]) -> list[tuple[Document, Ids]]:
    return list(zip(batch, future.result(), strict=True))


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    num_bytes = 0
    for document in documents:
        batch.append(document)
        num_bytes += document.num_bytes
        if num_bytes >= BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


_worker_encoder: Encoder | None = None


def _start_worker(spec: TokenizerSpec) -> None:
    global _worker_encoder
    _worker_encoder = Encoder(spec)


def _encode_in_worker(texts: list[str]) -> list[Ids]:
    assert _worker_encoder is not None
    return _worker_encoder(texts)
