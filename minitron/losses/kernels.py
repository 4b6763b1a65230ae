# mypy: disable-error-code="no-untyped-def"
"""Forward KL as two Triton kernels: logits are read twice and the gradient is written once, in the logits' own dtype.

PyTorch's separate operations on fp32 copies move about 100 bytes for each logit, these 10 in bf16. Sums are fp32.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from minitron.losses.divergence import Block
from minitron.losses.vocab import ScaledSums

_COLUMNS = 4096
"""Columns that a program has in registers."""
_WARPS = 8


@triton.jit  # type: ignore[untyped-decorator]
def _statistics(
    student, teacher, out, student_stride, teacher_stride,
    num_tokens, num_columns, inverse_temperature, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A row a program: largest logit and sum of exponentials of both, and sum_v exp(t_v - max) (t_v - s_v)."""
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    max_s = tl.full((), float("-inf"), tl.float32)
    max_t = tl.full((), float("-inf"), tl.float32)
    sum_s = tl.full((), 0.0, tl.float32)
    sum_t = tl.full((), 0.0, tl.float32)
    dot = tl.full((), 0.0, tl.float32)
    for start in range(0, num_columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < num_columns
        s = tl.load(student + column, mask=inside, other=float("-inf")).to(tl.float32) * inverse_temperature
        t = tl.load(teacher + column, mask=inside, other=float("-inf")).to(tl.float32) * inverse_temperature
        new_s = tl.maximum(max_s, tl.max(s, 0))
        new_t = tl.maximum(max_t, tl.max(t, 0))
        e_t = tl.exp(t - new_t)
        shrink = tl.exp(max_t - new_t)
        sum_s = sum_s * tl.exp(max_s - new_s) + tl.sum(tl.exp(s - new_s), 0)
        sum_t = sum_t * shrink + tl.sum(e_t, 0)
        dot = dot * shrink + tl.sum(tl.where(inside, e_t * (t - s), 0.0), 0)
        max_s, max_t = new_s, new_t
    tl.store(out + row, max_s)
    tl.store(out + num_tokens + row, sum_s)
    tl.store(out + 2 * num_tokens + row, max_t)
    tl.store(out + 3 * num_tokens + row, sum_t)
    tl.store(out + 4 * num_tokens + row, dot)


@triton.jit  # type: ignore[untyped-decorator]
def _gradient(
    student, teacher, gradient, student_stride, teacher_stride, gradient_stride,
    max_student, sum_student, max_teacher, sum_teacher, weight, num_columns, inverse_temperature, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Weight (q - p) of a row's block of columns; it may take the place of either's logits."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < num_columns
    s = tl.load(student + row * student_stride + column, mask=inside, other=0.0).to(tl.float32) * inverse_temperature
    t = tl.load(teacher + row * teacher_stride + column, mask=inside, other=0.0).to(tl.float32) * inverse_temperature
    q = tl.exp(s - tl.load(max_student + row)) / tl.load(sum_student + row)
    p = tl.exp(t - tl.load(max_teacher + row)) / tl.load(sum_teacher + row)
    value = (q - p) * tl.load(weight + row)
    tl.store(gradient + row * gradient_stride + column, value.to(gradient.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class FusedForwardKL:
    """KL(teacher || student) at a temperature, times its square: what `dense.forward_kl` computes.

    A `Divergence` that takes logits of any dtype and a whole chunk of tokens: its block's logits are not fp32 copies.

    Attributes:
        temperature: T.
    """

    temperature: float

    def __call__(self, block: Block[Tensor]) -> Tensor:
        """Compute one block, see `Divergence`."""
        student_Cv, teacher_Cv, grad_Cv, weight_C, vocab, _ = block
        num_tokens, num_columns = student_Cv.shape
        rows_5C = weight_C.new_empty(5, num_tokens)
        inverse = 1 / self.temperature
        _statistics[(num_tokens,)](
            student_Cv, teacher_Cv, rows_5C, student_Cv.stride(0), teacher_Cv.stride(0),
            num_tokens, num_columns, inverse,
            COLUMNS=_COLUMNS, num_warps=_WARPS,
        )  # fmt: skip
        max_s_C, sum_s_C, max_t_C, sum_t_C, dot_C = rows_5C.unbind()
        teacher, student = vocab.merge(ScaledSums(max_t_C, (sum_t_C, dot_C)), ScaledSums(max_s_C, (sum_s_C,)))
        (sum_s_C,), (sum_t_C, dot_C) = student.sums, teacher.sums
        if grad_Cv is not None and num_columns:
            _gradient[(num_tokens, triton.cdiv(num_columns, _COLUMNS))](
                student_Cv, teacher_Cv, grad_Cv, student_Cv.stride(0), teacher_Cv.stride(0), grad_Cv.stride(0),
                student.max_C, sum_s_C, teacher.max_C, sum_t_C, weight_C * self.temperature, num_columns, inverse,
                COLUMNS=_COLUMNS, num_warps=_WARPS,
            )  # fmt: skip
        ratio_C = (student.max_C - teacher.max_C) + (sum_s_C.log() - sum_t_C.log())
        loss_C: Tensor = (dot_C / sum_t_C + ratio_C) * self.temperature**2
        return loss_C
