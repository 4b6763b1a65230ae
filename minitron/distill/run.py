"""The distill stage: teacher (or a cache of its distributions) and student in, a distilled checkpoint folder out."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from minitron.checkpoint.folder import read_model_config
from minitron.config.distill import TeacherSource
from minitron.config.model import ModelConfig
from minitron.config.parallel import padded_vocab_size
from minitron.config.teacher_layout import own_layout
from minitron.config.train import TrainConfig
from minitron.distill.cache_format import LogitCache
from minitron.distill.cache_plan import cache_identity, lacking
from minitron.distill.cached import CachedTeacher
from minitron.distill.intermediate import IntermediateLosses, intermediate_losses
from minitron.distill.objective import Distillation
from minitron.distill.relayout import relayout_teacher
from minitron.distill.teacher import OnlineTeacher, Teacher, freeze
from minitron.distill.vocabulary import common_vocab_size, vocabulary_of
from minitron.errors import ArtefactError
from minitron.models.axes import num_active_parameters
from minitron.models.gpt import Chunks
from minitron.models.load import load_gpt
from minitron.runtime.session import Session
from minitron.train.run import Leg, StartingPoint, train_to_folder


def distill(
    session: Session,
    *,
    stage: str,
    teacher: Path,
    teacher_id: str | None,
    start: StartingPoint,
    settings: TrainConfig,
    data: Path,
    out: Path,
    leg: Leg | None = None,
) -> dict[str, float]:
    """Distill the teacher into the student.

    Args:
        session: The running job; its layout is the student's, and the teacher's unless it has one of its own.
        stage: Name for the bar and the trackers.
        teacher: Checkpoint folder of the model to learn from, or with ``distill.teacher.source=cached`` a cache of
            its distributions.
        teacher_id: Identity of the teacher's weights, to compare with the cache's; None where it runs online.
        start: The student.
        settings: Batch, schedule, optimizer.
        data: The data folder.
        out: The stage's working folder.
        leg: The part of the run to do; None does all of it.

    Returns:
        What the training loop tells, and the parameters of the teacher that ran beside the student: 0 from a cache.

    Raises:
        ModelError: The two models' tokenizers differ.
        ArtefactError: The cache belongs to another teacher or dataset, is damaged, or lacks samples.
    """
    recipe, parallel = session.config.distill, session.config.parallel
    source: Teacher
    with ExitStack() as stack:
        if recipe.teacher.source is TeacherSource.cached:
            assert teacher_id is not None, "a cache is checked against the teacher it should be of"
            source, common = _open_cache(session, teacher, teacher_id=teacher_id, student=start.folder, data=data)
        else:
            common = common_vocab_size(vocabulary_of(teacher), vocabulary_of(start.folder))
            rows = read_model_config(start.folder).vocab_size
            source = stack.enter_context(online_teacher(session, teacher, student_vocab_size=rows))
        student_gpt, student_model = start.load(session, out)
        student = (student_gpt, student_model)
        source, losses = stack.enter_context(_intermediate(session, teacher, source, student))
        objective = Distillation(
            source, student_model.vocab_size, session.groups, parallel.sequence_parallel, recipe, common, losses
        )
        summary = train_to_folder(
            session,
            stage=stage,
            gpt=student_gpt,
            model=student_model,
            objective=objective,
            settings=settings,
            data=data,
            side_files_of=start.folder,
            out=out,
            group_size=recipe.teacher_microbatches,
            leg=leg,
        )
    online = recipe.teacher.source is TeacherSource.online
    return {**summary, "teacher_parameters": num_active_parameters(read_model_config(teacher)) if online else 0}


@contextmanager
def online_teacher(session: Session, folder: Path, *, student_vocab_size: int) -> Iterator[Teacher]:
    """A teacher that runs beside the student, in the student's layout or in its own; all ranks enter together.

    Args:
        session: The running job.
        folder: The teacher's checkpoint folder.
        student_vocab_size: Decides the vocabulary shards, which are the same for both models' logits.
    """
    config = session.config
    precision = config.distill.teacher.precision(config.precision)
    layout = own_layout(config.distill, config.parallel)
    if layout is not None:
        with relayout_teacher(folder, session, layout, precision, student_vocab_size=student_vocab_size) as teacher:
            yield teacher
        return
    rows = padded_vocab_size(student_vocab_size, config.parallel.tensor_model_parallel_size)
    beside = config.parallel.for_teacher(read_model_config(folder).num_layers)
    gpt, _ = load_gpt(folder, session, parallel=beside, precision=precision, vocab_rows=rows)
    yield OnlineTeacher(freeze(gpt))


@contextmanager
def _intermediate(
    session: Session, folder: Path, teacher: Teacher, student: tuple[Chunks, ModelConfig]
) -> Iterator[tuple[Teacher, IntermediateLosses | None]]:
    """The teacher with its intermediate states recorded, and the losses between them and the student's."""
    config = session.config
    if not config.distill.intermediate.enabled:
        yield teacher, None
        return
    assert isinstance(teacher, OnlineTeacher), "a teacher of another kind is refused when the run is composed"
    [teacher_gpt], [student_gpt] = teacher.gpt, student[0]
    with intermediate_losses(
        config.distill.intermediate,
        config.parallel,
        session.groups,
        teacher=(teacher_gpt, read_model_config(folder)),
        student=(student_gpt, student[1]),
        seed=config.seed,
        device=session.torch_device,
    ) as (states, losses):
        yield replace(teacher, states=states), losses


def _open_cache(session: Session, folder: Path, *, teacher_id: str, student: Path, data: Path) -> tuple[Teacher, int]:
    """A teacher from a cache and the vocabulary it covers; that no sample lacks or is damaged is seen here."""
    cache = LogitCache(folder)
    # Fewer ids than the student's are those it has in common with a teacher; with more, the cache is of other models.
    common = min(cache.identity.vocab_size, read_model_config(student).vocab_size)
    cache.check(cache_identity(session.config, data, teacher=teacher_id, vocab_size=common), to_extend=False)
    if session.config.distill.teacher.cache is not None:
        kept = ", ".join(f"{key}={value}" for key, value in cache.identity.parameters.items())
        session.say(f"  teacher_logits.* and the teacher's dtype are {folder}'s: {kept}, {cache.identity.dtype}")
    lack = lacking(session.config, data, cache)
    if lack:
        raise ArtefactError(
            f"{lack}; run `minitron teacher-logits` in the run that this folder belongs to, with the same "
            "distill.train and seed, which adds them"
        )
    groups = session.groups
    _check_records(cache, session)
    return CachedTeacher(
        cache, is_last_stage=groups.is_last_stage, cp_rank=groups.cp_rank, device=session.torch_device
    ), common


def _check_records(cache: LogitCache, session: Session) -> None:
    """Every rank reads its share of the shards, and all end with the error that one of them finds."""
    groups = session.groups
    session.say(f"  checking {cache.num_bytes / 1e9:.3g} GB in {cache.folder}")
    found = ""
    try:
        cache.check_records(rank=groups.world_rank, world_size=groups.world_size)
    except ArtefactError as error:
        found = str(error)
    told = [""] * groups.world_size
    dist.all_gather_object(told, found)
    if damaged := [message for message in told if message]:
        raise ArtefactError(damaged[0])
