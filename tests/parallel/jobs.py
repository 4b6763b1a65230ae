"""The distillations that the tests run as whole stages, from a data folder."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from minitron.config.data import DataConfig, DataSource
from minitron.config.distill import DistillConfig, TeacherConfig, TeacherSource
from minitron.config.logit_loss import LogitLossConfig
from minitron.config.run import RunConfig
from minitron.config.teacher_logits import TeacherLogitsConfig
from minitron.config.train import TrainConfig
from minitron.data.build import build_dataset
from tests.parallel.cached_workers import Job
from tests.parallel.reference import VOCAB_SIZE

S, GLOBAL_BATCH, STEPS = 16, 8, 3


def make_job(root: Path, teacher: Path, student: Path) -> Job:
    """Distill between two models that `tests.parallel.reference.make_model` made, from a cache; the data is made."""
    for number in range(12):
        (root / f"{number}.txt").write_text(" ".join(f"line {n} of {number}\n" for n in range(20)))
    data = DataConfig(source=DataSource.files, paths=[str(root)], seq_length=S, num_workers=1, heldout_fraction=0.3)
    build_dataset(data, tokenizer_dir=teacher / "hf", vocab_size=VOCAB_SIZE, out_dir=root / "data")
    train = TrainConfig(
        num_tokens=STEPS * GLOBAL_BATCH * S,
        micro_batch_size=2,
        global_batch_size=GLOBAL_BATCH,
        lr=1e-3,
        min_lr=1e-4,
        eval_tokens=64,
        eval_interval_steps=0,
    )
    config = RunConfig(
        data=data,
        distill=DistillConfig(train=train, teacher=TeacherConfig(source=TeacherSource.cached)),
        teacher_logits=TeacherLogitsConfig(micro_batch_size=3),  # 24 sequences do not fill the last micro-batches
    )
    return Job(config=config, teacher=teacher / "checkpoint", student=student / "checkpoint", data=root / "data")


def with_settings(job: Job, *, source: TeacherSource = TeacherSource.cached, **parts: Any) -> Job:
    """Other settings: ``logits``, ``loss``, ``train`` (each a dict of changes)."""
    config = job.config
    train = replace(config.distill.train, **parts.get("train", {}))
    loss = LogitLossConfig(**parts.get("loss", {}))
    distill = DistillConfig(train=train, teacher=TeacherConfig(source=source), logit_loss=loss)
    logits = replace(config.teacher_logits, **parts.get("logits", {}))
    return replace(job, config=replace(config, distill=distill, teacher_logits=logits))
