"""The distill stage: teacher and student from checkpoint folders, a distilled checkpoint folder out."""

from pathlib import Path

from minitron.checkpoint.folder import copy_side_files, read_model_config
from minitron.config.precision import PrecisionConfig
from minitron.config.teacher_layout import own_layout
from minitron.distill.objective import Distillation
from minitron.distill.relayout import load_relayout_teacher
from minitron.distill.teacher import OnlineTeacher, Teacher, freeze
from minitron.distill.vocabulary import common_vocab_size
from minitron.models.load import load_gpt
from minitron.models.transformer_config import padded_vocab_size
from minitron.runtime.session import Session
from minitron.train.run import train_to_folder


def distill(session: Session, *, teacher: Path, student: Path, data: Path, out: Path) -> dict[str, float]:
    """Distill the teacher into the student.

    Args:
        session: The running job; its layout is the student's, and the teacher's unless it has one of its own.
        teacher: Checkpoint folder of the model to learn from.
        student: Checkpoint folder of the pruned model.
        data: The data folder.
        out: The stage's working folder.

    Raises:
        ModelError: The two models' tokenizers differ.
    """
    settings = session.config.distill
    common = common_vocab_size(teacher, student)
    source = load_teacher(session, teacher, student_vocab_size=read_model_config(student).vocab_size)
    student_gpt, student_model = load_gpt(student, session)
    objective = Distillation(
        source,
        student_model.vocab_size,
        session.groups,
        session.config.parallel.sequence_parallel,
        settings.cross_entropy,
        common,
    )
    summary = train_to_folder(
        session,
        stage="distill",
        gpt=student_gpt,
        model=student_model,
        objective=objective,
        settings=settings.train,
        data=data,
        out=out,
        group_size=settings.teacher_microbatches,
    )
    if session.is_main:
        copy_side_files(student, out)
    return summary


def load_teacher(session: Session, folder: Path, *, student_vocab_size: int) -> Teacher:
    """Load the online teacher, in the student's layout or in its own.

    Args:
        session: The running job.
        folder: The teacher's checkpoint folder.
        student_vocab_size: Decides the vocabulary shards, which are the same for both models' logits.
    """
    config = session.config
    precision = PrecisionConfig(dtype=config.distill.teacher.dtype or config.precision.dtype)
    layout = own_layout(config.distill, config.parallel)
    if layout is not None:
        return load_relayout_teacher(folder, session, layout, precision, student_vocab_size=student_vocab_size)
    rows = padded_vocab_size(student_vocab_size, config.parallel.tensor_model_parallel_size)
    gpt, _ = load_gpt(folder, session, precision=precision, vocab_rows=rows)
    return OnlineTeacher(freeze(gpt))
