"""The record that passes from the readers to the tokenizer."""

import hashlib
from dataclasses import dataclass

from minitron.errors import DataError


@dataclass(frozen=True, slots=True)
class Document:
    """One document of text.

    Attributes:
        id: where it comes from (``path``, ``path:line`` or ``path:row``), for messages.
        text: the text as it will be tokenized.
        num_bytes: length of the text in UTF-8.
        sha256: digest of the text in UTF-8; decides the split and finds duplicates.
    """

    id: str
    text: str
    num_bytes: int
    sha256: bytes


def make_document(doc_id: str, text: str) -> Document:
    """Measure and hash a text.

    Raises:
        DataError: the text holds half of a surrogate pair, which is not Unicode text.
    """
    try:
        raw = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{doc_id}: the text holds a lone surrogate at character {error.start}, which has no "
            "UTF-8 form: remove or mend this document"
        ) from error
    return Document(doc_id, text, len(raw), hashlib.sha256(raw).digest())


def is_heldout(document: Document, heldout_fraction: float) -> bool:
    """Say which split a document belongs to, from its text alone.

    The first 8 bytes of the digest are read as a number in [0, 1). Neither the order nor the
    other documents matter, equal texts land in one split, and a larger fraction keeps every
    document that a smaller one held out.
    """
    return int.from_bytes(document.sha256[:8], "big") < heldout_fraction * 2.0**64
