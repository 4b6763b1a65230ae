"""The Triton kernels: their values in Triton's interpreter, against the dense formula in fp64; that they compile."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from minitron.config.logit_loss import LogitLossConfig, LogitLossKind
from minitron.losses.select import kernel_of

REPOSITORY = Path(__file__).resolve().parents[3]
SIZES = {"less than a block": 37, "a block": 4096, "more than two": 9001}
"""Columns; a program works on 4096 at a time."""
KINDS = [(torch.float32, 1.0, False), (torch.float32, 2.0, True), (torch.bfloat16, 0.5, True)]


def _case(columns: int, dtype: torch.dtype, temperature: float, *, in_place: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(columns)
    student, teacher = (torch.randn(3, columns, generator=generator).mul_(4).to(dtype) for _ in range(2))
    teacher[2] = student[2]
    weight = torch.rand(3, generator=generator)
    return {
        "student": student, "teacher": teacher, "weight": weight, "temperature": temperature, "in_place": in_place
    }  # fmt: skip


CASES = {
    f"{name}, {str(dtype)[6:]}, T={temperature}{', in place' * in_place}": _case(
        columns, dtype, temperature, in_place=in_place
    )
    for name, columns in SIZES.items()
    for dtype, temperature, in_place in KINDS
}


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Loss per token and gradient by case."""
    folder = tmp_path_factory.mktemp("kernels")
    torch.save(list(CASES.values()), folder / "in.pt")
    command = [
        sys.executable,
        "-m",
        "tests.unit.losses.interpreted_kernels",
        str(folder / "in.pt"),
        str(folder / "out.pt"),
    ]
    subprocess.run(command, cwd=REPOSITORY, check=True, timeout=120, env=os.environ | {"TRITON_INTERPRET": "1"})
    return dict(zip(CASES, torch.load(folder / "out.pt"), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient(interpreted: dict[str, Any], name: str) -> None:
    case, (loss_T, grad_TV) = CASES[name], interpreted[name]
    temperature = case["temperature"]
    student_TV = case["student"].double().requires_grad_()
    log_q, log_p = ((logits.double() / temperature).log_softmax(-1) for logits in (student_TV, case["teacher"]))
    wanted_T = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1) * temperature**2
    (wanted_T * case["weight"]).sum().backward()
    torch.testing.assert_close(loss_T.double(), wanted_T.detach(), rtol=1e-6, atol=1e-6)
    assert student_TV.grad is not None
    error = (grad_TV.double() - student_TV.grad).norm() / student_TV.grad.norm()
    assert float(error) < (1e-6 if grad_TV.dtype == torch.float32 else 2**-7)  # the interpreter cuts bf16 off
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
