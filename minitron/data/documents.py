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
        file: number of the file it comes from; 0 where the text is known by its documents, not by its files.
    """

    id: str
    text: str
    num_bytes: int
    sha256: bytes
    file: int = 0


@dataclass(frozen=True, slots=True)
class Position:
    """How far a text has been read.

    Attributes:
        file: number of the file that the last document came from (`Document.file`).
        num_documents: documents of this file so far.
        num_bytes: length in UTF-8 of all documents so far, of all files.
    """

    file: int = 0
    num_documents: int = 0
    num_bytes: int = 0

    def after(self, document: Document) -> "Position":
        """The position once the next document has been read."""
        before = self.num_documents if document.file == self.file else 0
        return Position(document.file, before + 1, self.num_bytes + document.num_bytes)


START = Position()
"""Before the first document."""


def make_document(doc_id: str, text: str, *, file: int = 0) -> Document:
    """Measure and hash a text.

    Args:
        doc_id: where it comes from, for messages.
        text: the text.
        file: number of its file.

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
    return Document(doc_id, text, len(raw), hashlib.sha256(raw).digest(), file)


def is_heldout(document: Document, heldout_fraction: float) -> bool:
    """Say which split a document belongs to, from its text alone.

    The first 8 bytes of the digest are read as a number in [0, 1). Neither the order nor the
    other documents matter, equal texts land in one split, and a larger fraction keeps every
    document that a smaller one held out.
    """
    return int.from_bytes(document.sha256[:8], "big") < heldout_fraction * 2.0**64
