"""The layout of a teacher that is not the student's: where it comes from, and the arithmetic it must satisfy."""

from dataclasses import dataclass

from minitron.config.distill import DistillConfig
from minitron.config.parallel import ParallelConfig
from minitron.config.train import num_microbatches
from minitron.errors import ConfigError, LayoutError


@dataclass(frozen=True)
class TeacherLayout:
    """How a teacher is laid out on the student's ranks.

    Attributes:
        parallel: Sizes of its axes; their product is the student's number of ranks.
        micro_batch_size: Sequences in one of its forward passes, per data-parallel rank.
    """

    parallel: ParallelConfig
    micro_batch_size: int


def own_layout(distill: DistillConfig, parallel: ParallelConfig) -> TeacherLayout | None:
    """The teacher's layout, or None where it is the student's.

    Args:
        distill: The distill section.
        parallel: The student's layout.

    Raises:
        ConfigError: A size is less than one.
        LayoutError: The ranks do not divide over it, or the sequences of a group of micro-batches do not.
    """
    teacher, train = distill.teacher, distill.train
    sizes = {
        "parallel.tensor_model_parallel_size": teacher.parallel.tensor_model_parallel_size,
        "parallel.pipeline_model_parallel_size": teacher.parallel.pipeline_model_parallel_size,
        "micro_batch_size": teacher.micro_batch_size,
    }
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ConfigError(f"distill.teacher.{name}={size} must be at least 1, or null for the student's")
    student = (parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size, train.micro_batch_size)
    tp, pp, micro_batch_size = (
        default if size is None else size for size, default in zip(sizes.values(), student, strict=True)
    )
    split = teacher.parallel.sequence_parallel
    if split and tp == 1:
        raise LayoutError(
            "distill.teacher.parallel.sequence_parallel=true needs a tensor-parallel size > 1, and the teacher's is 1; "
            "set it to null or raise distill.teacher.parallel.tensor_model_parallel_size"
        )
    if split is None:
        split = parallel.sequence_parallel and tp > 1
    if (tp, pp, micro_batch_size) == student and split == parallel.sequence_parallel:
        return None
    if parallel.context_parallel_size > 1:
        raise LayoutError(
            f"distill.teacher: a layout of its own (tensor {tp} x pipeline {pp}, micro_batch_size {micro_batch_size}) "
            f"is not offered with parallel.context_parallel_size={parallel.context_parallel_size}: its states are "
            "sent by whole sequences; set distill.teacher.parallel and distill.teacher.micro_batch_size to null, or "
            "context_parallel_size to 1"
        )
    ranks = parallel.num_ranks
    if ranks % (tp * pp):
        raise LayoutError(
            f"distill.teacher.parallel: tensor {tp} x pipeline {pp} = {tp * pp} does not divide the student's "
            f"{ranks} ranks ({parallel.arithmetic()}); both run on the same ranks"
        )
    own = ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        data_parallel_size=ranks // (tp * pp),
        sequence_parallel=split,
    )
    layout = TeacherLayout(own, micro_batch_size)
    _check_sequences(layout, distill, parallel)
    return layout


def _check_sequences(layout: TeacherLayout, distill: DistillConfig, parallel: ParallelConfig) -> None:
    """Refuse groups of the student's micro-batches that are no whole number of the teacher's."""
    size, ranks = distill.train.micro_batch_size, parallel.data_parallel_size
    step = num_microbatches(distill.train.global_batch_size, size, ranks)
    group = min(distill.teacher_microbatches or step, step)
    teacher_ranks = layout.parallel.data_parallel_size
    one = layout.micro_batch_size * teacher_ranks
    for number in (group, step % group):
        sequences = number * size * ranks
        if sequences % one:
            raise LayoutError(
                f"distill.teacher: {number} micro-batches (of {step} a step, in groups of {group}) x "
                f"micro_batch_size={size} x data_parallel_size={ranks} = {sequences} sequences are no multiple of the "
                f"teacher's micro_batch_size={layout.micro_batch_size} x data-parallel size {teacher_ranks} = {one}; "
                "change distill.teacher.micro_batch_size, distill.teacher.parallel or distill.teacher_microbatches"
            )
