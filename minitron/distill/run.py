"""The distill stage: teacher and student from checkpoint folders, a distilled checkpoint folder out."""

from pathlib import Path

from minitron.checkpoint.folder import copy_side_files, read_model_config
from minitron.distill.objective import ForwardKL, OnlineTeacher, freeze
from minitron.errors import ConfigError
from minitron.models.load import load_gpt
from minitron.runtime.session import Session
from minitron.train.run import train_to_folder


def distill(session: Session, *, teacher: Path, student: Path, data: Path, out: Path) -> dict[str, float]:
    """Distill the teacher into the student.

    Args:
        session: The running job; teacher and student share its layout.
        teacher: Checkpoint folder of the unpruned model.
        student: Checkpoint folder of the pruned model.
        data: The data folder.
        out: The stage's working folder.

    Raises:
        ConfigError: The two models have different vocabularies.
    """
    parallel = session.config.parallel
    teacher_layout = parallel.for_teacher(read_model_config(teacher).num_layers)
    teacher_gpt, teacher_model = load_gpt(teacher, session, parallel=teacher_layout)
    student_gpt, student_model = load_gpt(student, session, parallel=parallel)
    if teacher_model.vocab_size != student_model.vocab_size:
        raise ConfigError(
            f"teacher vocab_size={teacher_model.vocab_size} and student vocab_size={student_model.vocab_size} differ; "
            "their distributions cannot be compared"
        )
    objective = ForwardKL(
        OnlineTeacher(freeze(teacher_gpt)),
        student_model.vocab_size,
        session.groups,
        session.config.parallel.sequence_parallel,
    )
    summary = train_to_folder(
        session,
        stage="distill",
        gpt=student_gpt,
        model=student_model,
        objective=objective,
        settings=session.config.distill.train,
        data=data,
        out=out,
        group_size=session.config.distill.teacher_microbatches,
    )
    if session.is_main:
        copy_side_files(student, out)
    return summary
