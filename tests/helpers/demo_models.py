"""SmolLM2-135M and the demo's student with random weights: the time of a step does not depend on the values."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from minitron.config.distill import DistillConfig
from minitron.config.parallel import ParallelConfig
from minitron.config.precision import Dtype, PrecisionConfig
from minitron.config.run import Device
from minitron.config.train import TrainConfig
from minitron.data.batch import Batch
from minitron.distill.objective import Distillation
from minitron.distill.teacher import OnlineTeacher, freeze
from minitron.models.gpt import Chunks, build_gpt
from minitron.parallel.groups import Groups, model_parallel
from minitron.train.objective import CrossEntropy
from minitron.train.optim import Trainable, make_trainable
from tests.helpers.batch import batch_of
from tests.helpers.smollm2 import SMOLLM2_135M

TEACHER = SMOLLM2_135M
STUDENT = replace(TEACHER, num_layers=26, hidden_size=504, ffn_hidden_size=1344)
BF16 = PrecisionConfig(dtype=Dtype.bf16)
SEQ_LENGTH = 256


@dataclass(frozen=True)
class Demo:
    """One rank's part of the demo's distillation.

    Attributes:
        student: ready to be trained.
        cross_entropy, distillation: the two objectives.
        teacher: the model that the second one learns from.
        groups: this rank's process groups.
    """

    student: Trainable
    cross_entropy: CrossEntropy
    distillation: Distillation
    teacher: Chunks
    groups: Groups


@contextlib.contextmanager
def demo(num_stages: int, settings: TrainConfig) -> Iterator[Demo]:
    """Build the demo's models at a number of pipeline stages; the CPU layer is in force."""
    parallel = ParallelConfig(pipeline_model_parallel_size=num_stages)
    with model_parallel(parallel, seed=1) as groups:
        torch.manual_seed(groups.pp_rank)
        student, teacher = (
            build_gpt(model, parallel, BF16, groups, device=Device.cpu, initialize=True) for model in (STUDENT, TEACHER)
        )
        yield Demo(
            make_trainable(student, settings, parallel, groups, seq_length=SEQ_LENGTH),
            CrossEntropy(STUDENT.vocab_size, groups, sequence_parallel=False),
            Distillation(OnlineTeacher(freeze(teacher)), STUDENT.vocab_size, groups, False, DistillConfig()),
            teacher,
            groups,
        )


def random_batches(number: int, vocab_size: int = TEACHER.vocab_size) -> Sequence[Batch]:
    """Micro-batches of one sequence of random tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (number, 1, SEQ_LENGTH + 1), generator=generator)
    return [batch_of(ids_BT) for ids_BT in ids]
