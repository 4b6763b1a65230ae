"""What teacher and student have in common of their vocabularies, and whether an id means the same token to both."""

from pathlib import Path

from minitron.checkpoint.folder import read_model_config, side_dir
from minitron.errors import ModelError

_NO_TOKENIZER = ("config.json", "generation_config.json")
"""Files of a checkpoint folder's ``hf/`` that differ between models of one tokenizer."""


def common_vocab_size(teacher: Path, student: Path) -> int:
    """Size of the vocabulary that the distributions of teacher and student are compared on.

    The sizes may differ by rows that pad the vocabulary: published models of one family do. Ids that only one of the
    two tokenizers knows are such rows to the other one.

    Args:
        teacher: Checkpoint folder.
        student: Checkpoint folder; its tokenizer made the data.

    Raises:
        ModelError: An id means different tokens to the two, or the teacher has no row for one of the student's tokens.
    """
    teacher_size = read_model_config(teacher).vocab_size
    common = min(teacher_size, read_model_config(student).vocab_size)
    of_teacher, of_student = side_dir(teacher), side_dir(student)
    if _tokenizer_files(of_teacher) == _tokenizer_files(of_student):
        return common
    from minitron.models.hf_source import token_ids  # imports transformers, which takes seconds

    theirs, ours = ({id_: token for token, id_ in token_ids(f).items()} for f in (of_teacher, of_student))
    different = sorted(id_ for id_ in theirs.keys() & ours.keys() if id_ < common and theirs[id_] != ours[id_])
    if different:
        first = different[0]
        raise ModelError(
            f"the tokenizers of teacher ({of_teacher}) and student ({of_student}) differ: {len(different)} of {common} "
            f"ids mean different tokens, such as {first}: {theirs[first]!r} to the teacher, {ours[first]!r} to the "
            "student; logits can only be distilled between models with one tokenizer"
        )
    largest = max(ours)
    if largest >= teacher_size:
        raise ModelError(
            f"the teacher's vocab_size={teacher_size} has no row for the student's token {ours[largest]!r} (id "
            f"{largest}); choose a teacher whose vocabulary holds the student's tokenizer ({of_student})"
        )
    return common


def _tokenizer_files(folder: Path) -> dict[str, bytes]:
    files = [file for file in folder.iterdir() if file.is_file() and file.name not in _NO_TOKENIZER]
    return {file.name: file.read_bytes() for file in files}
