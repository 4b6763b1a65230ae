"""A distillation step on one GPU over NCCL: its value by another way, its waits, its memory."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from minitron.eval.logits import model_logits
from minitron.parallel.groups import Groups
from minitron.train.step import train_step
from tests.gpu.models import (
    BF16,
    LLAMA_4B_WIDTH,
    ONE_RANK,
    SMALL,
    SMALLER,
    batches,
    build,
    distillation,
    trainable,
)
from tests.helpers.llama31 import LLAMA_8B


def test_nccl_at_one_gpu(groups: Groups) -> None:
    assert dist.get_backend(groups.tp) in ("nccl", "cpu:gloo,cuda:nccl", "undefined")
    ones = torch.ones(3, device="cuda")
    dist.all_reduce(ones, group=groups.dp_cp)
    dist.broadcast(ones, src=groups.last_stage_source, group=groups.pp)
    gathered = torch.empty(3, device="cuda")
    dist.all_gather_into_tensor(gathered, ones, group=groups.tp)
    objects: list[object] = [None]
    dist.all_gather_object(objects, {"rank": 0}, group=groups.pp)
    dist.barrier()
    assert gathered.tolist() == [1.0, 1.0, 1.0]
    assert objects == [{"rank": 0}]


def test_loss_of_a_step_is_that_of_full_logits(groups: Groups) -> None:
    teacher, student = build(SMALL, BF16, groups), build(SMALLER, BF16, groups, seed=2)
    work = batches(SMALL, 2)
    wanted = []
    for batch in work:
        log_p, log_q = (
            model_logits(gpt.eval(), batch.tokens_BS, groups, vocab_size=SMALL.vocab_size).double().log_softmax(-1)
            for gpt in (teacher, student)
        )
        wanted.append(F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).mean())
    objective = distillation(teacher, SMALL.vocab_size, groups)
    output = train_step(trainable(student, groups, num_steps=4, num_microbatches=2), objective, work)
    assert float(output.terms["loss"]) == pytest.approx(float(torch.stack(wanted).mean()), rel=5e-3)
    assert float(output.grad_norm) > 0


def test_the_host_waits_for_nothing_in_a_step(groups: Groups) -> None:
    objective = distillation(build(SMALL, BF16, groups), SMALL.vocab_size, groups)
    student = trainable(build(SMALLER, BF16, groups, seed=2), groups, num_steps=4, num_microbatches=2)
    work = batches(SMALL, 2)
    train_step(student, objective, work)  # what is made once may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_step(student, objective, work)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_peak_memory_is_what_plan_says(groups: Groups) -> None:
    """Within a tenth, for a teacher and a student of the papers' widths with two layers each."""
    from dataclasses import replace

    from minitron.plan import memory as plan

    teacher_model, student_model = (replace(model, num_layers=2) for model in (LLAMA_8B, LLAMA_4B_WIDTH))
    length, number = 2048, 2
    work = batches(teacher_model, number, size=2, length=length)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    objective = distillation(build(teacher_model, BF16, groups), teacher_model.vocab_size, groups)
    student = trainable(
        build(student_model, BF16, groups, seed=2), groups, num_steps=4, num_microbatches=number, length=length
    )
    for _ in range(2):
        train_step(student, objective, work)
    peak = torch.cuda.max_memory_allocated() - before
    beside = plan.BesideTeacher(
        model=teacher_model,
        parallel=ONE_RANK,
        precision=BF16,
        is_own_layout=False,
        state_bytes=2.0 * teacher_model.hidden_size,
        inner_bytes=(0.0,),
    )
    tokens = plan.Batches(tokens=2 * length, group=number)
    [planned] = plan.training_memory(student_model, ONE_RANK, BF16, tokens, beside)
    assert peak == pytest.approx(planned.total, rel=0.10), planned
