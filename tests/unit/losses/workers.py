"""What the ranks of the tensor-parallel tests run."""

import torch
import torch.distributed as dist
from torch import Tensor

from minitron.losses import kl_from_logits, linear_cross_entropy, linear_kl
from tests.unit.losses.reference import Case, loss_and_grads

Shard = tuple[Tensor, ...]


def losses(case: Case) -> dict[str, Shard]:
    """Every loss on this rank's rows: its value, the hidden state's summed gradient, the rows' gradient."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD if ranks > 1 else None
    student_vH, teacher_vH = (w.chunk(ranks)[rank] for w in (case.student_weight_VH, case.teacher_weight_VH))
    student_Tv, teacher_Tv = (x.chunk(ranks, 1)[rank] for x in (case.student_logits_TV, case.teacher_logits_TV))
    common = {"vocab_size": case.vocab_size, "tp_group": group, "token_weights_T": case.token_weights_T}
    results = {
        "kl": loss_and_grads(
            lambda h, w: linear_kl(h, w, case.teacher_hidden_TH, teacher_vH, chunk_tokens=5, **common),
            case.student_hidden_TH,
            student_vH,
        ),
        "cross_entropy": loss_and_grads(
            lambda h, w: linear_cross_entropy(h, w, case.labels_T, chunk_tokens=5, **common),
            case.student_hidden_TH,
            student_vH,
        ),
    }
    for _, grad_TH, _ in results.values():
        dist.all_reduce(grad_TH)
    loss, grad_Tv = loss_and_grads(lambda s: kl_from_logits(s, teacher_Tv, **common), student_Tv)
    return results | {"kl_from_logits": (loss, torch.empty(0), grad_Tv.T.contiguous())}


def kl_through_megatrons_mapping(case: Case) -> Shard:
    """`linear_kl` as a model calls it: Megatron's mapping completes the hidden state's gradient."""
    from megatron.core import parallel_state, tensor_parallel

    rank, ranks = dist.get_rank(), dist.get_world_size()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=ranks)
    group = parallel_state.get_tensor_model_parallel_group()
    student_vH, teacher_vH = (w.chunk(ranks)[rank] for w in (case.student_weight_VH, case.teacher_weight_VH))
    return loss_and_grads(
        lambda h, w: linear_kl(
            tensor_parallel.copy_to_tensor_model_parallel_region(h),
            w,
            case.teacher_hidden_TH,
            teacher_vH,
            vocab_size=case.vocab_size,
            tp_group=group,
        ),
        case.student_hidden_TH,
        student_vH,
    )


def collectives_of_one_chunk(case: Case) -> list[str]:
    """Names of the collectives that forward and backward of one chunk start."""
    from torch.profiler import profile

    ranks, rank = dist.get_world_size(), dist.get_rank()
    student_vH, teacher_vH = (w.chunk(ranks)[rank] for w in (case.student_weight_VH, case.teacher_weight_VH))
    with profile() as trace:
        loss_and_grads(
            lambda h, w: linear_kl(
                h, w, case.teacher_hidden_TH, teacher_vH, vocab_size=case.vocab_size, tp_group=dist.group.WORLD
            ),
            case.student_hidden_TH,
            student_vH,
        )
    return [event.name for event in trace.events() if event.name.startswith("c10d::")]
