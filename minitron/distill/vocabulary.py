"""What teacher and student have in common of their vocabularies, and whether an id means the same token to both."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from minitron.checkpoint.folder import TOKENIZER_FILES, read_model_config, side_dir
from minitron.errors import ModelError


@dataclass(frozen=True)
class Vocabulary:
    """What is compared of a model.

    Attributes:
        where: Where its tokenizer is, for messages.
        size: Rows of its embedding.
        token_ids: Gives the id of every token that its tokenizer knows; may take seconds.
        files: The tokenizer's files by name, where it has any: two of the same need not be loaded.
    """

    where: str
    size: int
    token_ids: Callable[[], dict[str, int]]
    files: Mapping[str, bytes]


def vocabulary_at(tokenizer: Path, size: int) -> Vocabulary:
    """The vocabulary of a model with so many rows, whose tokenizer is in a Hugging Face folder or a GGUF file."""

    def read() -> dict[str, int]:
        from minitron.models.hf_source import token_ids  # imports transformers, which takes seconds

        return token_ids(tokenizer)

    files = [tokenizer / name for name in TOKENIZER_FILES if (tokenizer / name).is_file()]
    return Vocabulary(str(tokenizer), size, read, {file.name: file.read_bytes() for file in files})


def vocabulary_of(folder: Path) -> Vocabulary:
    """The vocabulary of a checkpoint folder."""
    return vocabulary_at(side_dir(folder), read_model_config(folder).vocab_size)


def common_vocab_size(teacher: Vocabulary, student: Vocabulary) -> int:
    """Size of the vocabulary that the distributions of teacher and student are compared on.

    The sizes may differ by rows that pad the vocabulary: published models of one family do. Ids that only one of the
    two tokenizers knows are such rows to the other one.

    Args:
        teacher: The teacher's.
        student: The student's, which its source has too; its tokenizer makes the data.

    Raises:
        ModelError: An id means different tokens to the two, or the teacher has no row for one of the student's tokens.
    """
    common = min(teacher.size, student.size)
    if teacher.files and teacher.files == student.files:
        return common
    theirs, ours = ({id_: token for token, id_ in of.token_ids().items()} for of in (teacher, student))
    different = sorted(id_ for id_ in theirs.keys() & ours.keys() if id_ < common and theirs[id_] != ours[id_])
    if different:
        first = different[0]
        raise ModelError(
            f"the tokenizers of teacher ({teacher.where}) and student ({student.where}) differ: {len(different)} of "
            f"{common} ids mean different tokens, such as {first}: {theirs[first]!r} to the teacher, {ours[first]!r} "
            "to the student; logits can only be distilled between models with one tokenizer"
        )
    largest = max(ours)
    if largest >= teacher.size:
        raise ModelError(
            f"the teacher's vocab_size={teacher.size} has no row for the student's token {ours[largest]!r} (id "
            f"{largest}); choose a teacher whose vocabulary holds the student's tokenizer ({student.where})"
        )
    return common
