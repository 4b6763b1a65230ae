"""The distill stage: teacher and student from checkpoint folders, a distilled checkpoint folder out."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron.core.models.gpt.gpt_model import GPTModel

from minitron.checkpoint.folder import copy_side_files
from minitron.config.model import ModelConfig
from minitron.config.precision import PrecisionConfig
from minitron.distill.intermediate import IntermediateLosses, intermediate_losses
from minitron.distill.objective import Distillation
from minitron.distill.states import TeacherStates
from minitron.distill.teacher import OnlineTeacher, freeze
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
    settings = session.config.distill
    precision = PrecisionConfig(dtype=settings.teacher.dtype or session.config.precision.dtype)
    teacher_gpt, teacher_model = load_gpt(teacher, session, precision=precision)
    student_gpt, student_model = load_gpt(student, session)
    if teacher_model.vocab_size != student_model.vocab_size:
        raise ConfigError(
            f"teacher vocab_size={teacher_model.vocab_size} and student vocab_size={student_model.vocab_size} differ; "
            "their distributions cannot be compared"
        )
    with _intermediate(session, (teacher_gpt, teacher_model), (student_gpt, student_model)) as (states, losses):
        objective = Distillation(
            OnlineTeacher(freeze(teacher_gpt), states),
            student_model.vocab_size,
            session.groups,
            session.config.parallel.sequence_parallel,
            settings.cross_entropy,
            losses,
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


@contextmanager
def _intermediate(
    session: Session, teacher: tuple[GPTModel, ModelConfig], student: tuple[GPTModel, ModelConfig]
) -> Iterator[tuple[TeacherStates | None, IntermediateLosses | None]]:
    config = session.config
    if not config.distill.intermediate.enabled:
        yield None, None
        return
    with intermediate_losses(
        config.distill.intermediate,
        config.parallel,
        session.groups,
        teacher=teacher,
        student=student,
        seed=config.seed,
        device=session.torch_device,
    ) as made:
        yield made
