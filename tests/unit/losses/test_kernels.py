"""The Triton kernels: their values in Triton's interpreter, against the dense formula in fp64; that they compile."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from minitron.config.logit_loss import LogitLossConfig, LogitLossKind
from minitron.losses.select import kernel_of
from tests.helpers.pool import WorkerPool, pool_with
from tests.unit.losses import kernel_workers

SIZES = {"less than a block": 37, "a block": 4096, "more than two": 9001}
"""Columns; a program works on 4096 at a time. The odd ones leave padding on the last of two ranks."""
KINDS = [(torch.float32, 1.0, False), (torch.float32, 2.0, True), (torch.bfloat16, 0.5, True)]


def _case(columns: int, dtype: torch.dtype, temperature: float, in_place: bool) -> kernel_workers.Case:
    generator = torch.Generator().manual_seed(columns)
    student_TV, teacher_TV = (torch.randn(3, columns, generator=generator).mul_(4).to(dtype) for _ in range(2))
    teacher_TV[2] = student_TV[2]
    return kernel_workers.Case(student_TV, teacher_TV, torch.rand(3, generator=generator), temperature, in_place)


@pytest.fixture(scope="module")
def interpreting() -> Iterator[WorkerPool]:
    """Workers that interpret what they would compile: it is asked before Triton is imported."""
    with pool_with(2, TRITON_INTERPRET="1") as workers:
        yield workers


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("columns", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(("dtype", "temperature", "in_place"), KINDS, ids=["fp32", "fp32, T=2", "bf16, T=0.5"])
def test_value_and_gradient(
    interpreting: WorkerPool, dtype: torch.dtype, temperature: float, in_place: bool, columns: int, ranks: int
) -> None:
    case = _case(columns, dtype, temperature, in_place)
    results = interpreting.run(kernel_workers.fused_forward_kl, ranks, case)
    grad_TV = torch.cat([grad_Tv for _, grad_Tv in results], 1)
    student_TV = case.student_TV.double().requires_grad_()
    log_q, log_p = ((logits.double() / temperature).log_softmax(-1) for logits in (student_TV, case.teacher_TV))
    wanted_T = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1) * temperature**2
    (wanted_T * case.weight_T).sum().backward()
    for loss_T, _ in results:
        torch.testing.assert_close(loss_T.double(), wanted_T.detach(), rtol=1e-6, atol=1e-6)
    assert student_TV.grad is not None
    error = (grad_TV.double() - student_TV.grad).norm() / student_TV.grad.norm()
    assert float(error) < (1e-6 if dtype == torch.float32 else 2**-7)  # the interpreter cuts bf16 off
    assert torch.equal(grad_TV[2], torch.zeros_like(grad_TV[2])), "not zero where the student is the teacher"


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_kernels_compile(capability: int, dtype: str) -> None:
    """For A100, H100 and B200, without one."""
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from minitron.losses import kernels

    logits, sums, number = f"*{dtype}", "*fp32", "i32"
    arguments = {"num_tokens": number, "num_columns": number, "inverse_temperature": "fp32", "COLUMNS": "constexpr"}
    for name in ("student", "teacher", "gradient"):
        arguments |= {name: logits, f"{name}_stride": number}
    for name in ("out", "max_student", "sum_student", "max_teacher", "sum_teacher", "weight"):
        arguments[name] = sums
    for kernel in (kernels._statistics, kernels._gradient):
        source = ASTSource(kernel, {name: arguments[name] for name in kernel.arg_names}, {"COLUMNS": 4096})
        compiled = compile_kernel(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
        assert compiled.asm["cubin"]


def test_a_cpu_has_no_kernel() -> None:
    logits = torch.zeros(2, 8)
    assert all(kernel_of(LogitLossConfig(kind=kind), logits, logits) is None for kind in LogitLossKind)
