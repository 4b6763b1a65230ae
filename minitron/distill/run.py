"""The distill stage: teacher (or a cache of its distributions) and student in, a distilled checkpoint folder out."""

from functools import partial
from pathlib import Path

from minitron.checkpoint.folder import copy_side_files
from minitron.config.distill import TeacherSource
from minitron.config.precision import PrecisionConfig
from minitron.distill.cache_format import LogitCache
from minitron.distill.cache_plan import cache_identity, lacking
from minitron.distill.cached import CachedTeacher
from minitron.distill.objective import Distillation
from minitron.distill.teacher import OnlineTeacher, Teacher, freeze
from minitron.errors import ArtefactError, ConfigError
from minitron.models.load import load_gpt
from minitron.runtime.session import Session
from minitron.train.run import train_to_folder


def distill(
    session: Session, *, teacher: Path, teacher_id: str, student: Path, data: Path, out: Path
) -> dict[str, float]:
    """Distill the teacher into the student.

    Args:
        session: The running job; teacher and student share its layout.
        teacher: Checkpoint folder of the unpruned model, or with ``distill.teacher.source=cached`` a cache of its
            distributions.
        teacher_id: Identity of the teacher's weights.
        student: Checkpoint folder of the pruned model.
        data: The data folder.
        out: The stage's working folder.

    Raises:
        ConfigError: The two models have different vocabularies.
        ArtefactError: The cache belongs to another teacher or dataset, is damaged, or lacks samples.
    """
    settings = session.config.distill
    cached = settings.teacher.source is TeacherSource.cached
    load = partial(_open_cache, teacher_id=teacher_id, data=data) if cached else _load_teacher
    source, vocab_size = load(session, teacher)
    student_gpt, student_model = load_gpt(student, session)
    if vocab_size != student_model.vocab_size:
        raise ConfigError(
            f"teacher vocab_size={vocab_size} and student vocab_size={student_model.vocab_size} differ; "
            "their distributions cannot be compared"
        )
    objective = Distillation(
        source,
        student_model.vocab_size,
        session.groups,
        session.config.parallel.sequence_parallel,
        settings.cross_entropy,
        settings.logit_loss,
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


def _load_teacher(session: Session, folder: Path) -> tuple[Teacher, int]:
    """The teacher, and the size of its vocabulary."""
    precision = PrecisionConfig(dtype=session.config.distill.teacher.dtype or session.config.precision.dtype)
    gpt, model = load_gpt(folder, session, precision=precision)
    return OnlineTeacher(freeze(gpt)), model.vocab_size


def _open_cache(session: Session, folder: Path, *, teacher_id: str, data: Path) -> tuple[Teacher, int]:
    """The same from a cache; make sure, before the first step, that every sample is in it."""
    cache = LogitCache(folder)
    cache.check(cache_identity(session.config, data, teacher=teacher_id), to_extend=False)
    lack = lacking(session.config, data, cache)
    if lack:
        raise ArtefactError(
            f"{lack}; run `minitron teacher-logits` in the run that this folder belongs to, with the same "
            "distill.train and seed, which adds them"
        )
    teacher = CachedTeacher(cache, is_last_stage=session.groups.is_last_stage, device=session.torch_device)
    return teacher, cache.identity.vocab_size
