"""The distill stage: teacher and student from checkpoint folders, a distilled checkpoint folder out."""

from pathlib import Path

from minitron.checkpoint.folder import copy_side_files, read_model_config
from minitron.config.precision import PrecisionConfig
from minitron.config.train import TrainConfig
from minitron.distill.objective import Distillation
from minitron.distill.teacher import OnlineTeacher, freeze
from minitron.errors import ConfigError
from minitron.models.load import load_gpt
from minitron.runtime.session import Session
from minitron.train.run import StartingPoint, train_to_folder


def distill(
    session: Session, *, stage: str, teacher: Path, start: StartingPoint, settings: TrainConfig, data: Path, out: Path
) -> dict[str, float]:
    """Distill the teacher into the student.

    Args:
        session: The running job; teacher and student share its layout.
        stage: Name for the bar and the trackers.
        teacher: Checkpoint folder of the unpruned model.
        start: The student.
        settings: Batch, schedule, optimizer.
        data: The data folder.
        out: The stage's working folder.

    Raises:
        ConfigError: The two models have different vocabularies.
    """
    recipe = session.config.distill
    precision = PrecisionConfig(dtype=recipe.teacher.dtype or session.config.precision.dtype)
    layout = session.config.parallel.for_teacher(read_model_config(teacher).num_layers)
    teacher_gpt, teacher_model = load_gpt(teacher, session, parallel=layout, precision=precision)
    student_gpt, student_model = start.load(session)
    if teacher_model.vocab_size != student_model.vocab_size:
        raise ConfigError(
            f"teacher vocab_size={teacher_model.vocab_size} and student vocab_size={student_model.vocab_size} differ; "
            "their distributions cannot be compared"
        )
    objective = Distillation(
        OnlineTeacher(freeze(teacher_gpt)),
        student_model.vocab_size,
        session.groups,
        session.config.parallel.sequence_parallel,
        recipe,
    )
    summary = train_to_folder(
        session,
        stage=stage,
        gpt=student_gpt,
        model=student_model,
        objective=objective,
        settings=settings,
        data=data,
        out=out,
        group_size=recipe.teacher_microbatches,
    )
    if session.is_main:
        copy_side_files(start.folder, out)
    return summary
