"""What the ranks of the tensor-parallel tests run."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from minitron.config.logit_loss import LogitLossConfig, TopKRest
from minitron.losses import (
    SparseTarget,
    linear_cross_entropy,
    linear_distillation,
    linear_sparse_kl,
    logits_distillation,
)
from tests.unit.losses.reference import Case, loss_and_grads, name_of

Shard = tuple[Tensor, ...]


def losses(case: Case, configs: list[LogitLossConfig], target: SparseTarget) -> dict[str, Shard]:
    """Every loss on this rank's rows: its value, the hidden state's summed gradient, the rows' gradient."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD if ranks > 1 else None
    student_vH, teacher_vH = (w.chunk(ranks)[rank] for w in (case.student_weight_VH, case.teacher_weight_VH))
    student_Tv, teacher_Tv = (x.chunk(ranks, 1)[rank] for x in (case.student_logits_TV, case.teacher_logits_TV))
    common = {"vocab_size": case.vocab_size, "tp_group": group, "token_weights_T": case.token_weights_T}
    functions: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "cross_entropy": lambda h, w: linear_cross_entropy(h, w, case.labels_T, chunk_tokens=5, **common)
    }
    for loss in configs:
        functions[name_of(loss)] = lambda h, w, loss=loss: linear_distillation(
            h, w, case.teacher_hidden_TH, teacher_vH, loss=loss, chunk_tokens=5, **common
        )
    for rest in (*TopKRest, None):
        functions[f"sparse-{rest}"] = lambda h, w, rest=rest: linear_sparse_kl(
            h, w, target, rest=rest, chunk_tokens=5, **common
        )
    results = {
        name: loss_and_grads(function, case.student_hidden_TH, student_vH) for name, function in functions.items()
    }
    for _, grad_TH, _ in results.values():
        dist.all_reduce(grad_TH)
    for loss in configs:
        value, grad_Tv = loss_and_grads(
            lambda s, loss=loss: logits_distillation(s, teacher_Tv, loss=loss, **common), student_Tv
        )
        results[f"{name_of(loss)}, from logits"] = (value, torch.empty(0), grad_Tv.T.contiguous())
    return results


def through_megatrons_mapping(case: Case, configs: list[LogitLossConfig]) -> list[Shard]:
    """Losses as a model calls them: Megatron's mapping completes the hidden state's gradient."""
    from megatron.core import parallel_state, tensor_parallel

    rank, ranks = dist.get_rank(), dist.get_world_size()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=ranks)
    group = parallel_state.get_tensor_model_parallel_group()
    student_vH, teacher_vH = (w.chunk(ranks)[rank] for w in (case.student_weight_VH, case.teacher_weight_VH))
    return [
        loss_and_grads(
            lambda h, w, loss=loss: linear_distillation(
                tensor_parallel.copy_to_tensor_model_parallel_region(h),
                w,
                case.teacher_hidden_TH,
                teacher_vH,
                loss=loss,
                vocab_size=case.vocab_size,
                tp_group=group,
            ),
            case.student_hidden_TH,
            student_vH,
        )
        for loss in configs
    ]


def collectives_of_one_chunk(case: Case, loss: LogitLossConfig) -> list[str]:
    """Names of the collectives that forward and backward of one chunk start."""
    from torch.profiler import profile

    ranks, rank = dist.get_world_size(), dist.get_rank()
    student_vH, teacher_vH = (w.chunk(ranks)[rank] for w in (case.student_weight_VH, case.teacher_weight_VH))
    with profile() as trace:
        loss_and_grads(
            lambda h, w: linear_distillation(
                h,
                w,
                case.teacher_hidden_TH,
                teacher_vH,
                loss=loss,
                vocab_size=case.vocab_size,
                tp_group=dist.group.WORLD,
            ),
            case.student_hidden_TH,
            student_vH,
        )
    return [event.name for event in trace.events() if event.name.startswith("c10d::")]
