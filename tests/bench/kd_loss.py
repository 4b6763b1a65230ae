"""Time and memory of the distillation loss, against `F.kl_div` on full logits: ``python -m tests.bench.kd_loss``.

Forward and backward of the sum over the tokens of KL(teacher || student), without the output layers
(the logits are given) and with both of them (the hidden states are given). The plain side is what
one writes first: ``F.kl_div(log_softmax(student), log_softmax(teacher), log_target=True)``, in fp32
whatever the logits' dtype, as in a mixed-precision training loop.

Memory is the peak of all that is allocated during forward and backward, gradients included, over
the inputs, in units of one logits tensor in the inputs' dtype. It is the running sum of the
profiler's allocation events, which come from PyTorch's CPU allocator itself: temporaries inside
kernels count. Only what the matrix libraries keep for themselves does not.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from minitron.config.logit_loss import LogitLossConfig
from minitron.losses import linear_distillation, logits_distillation


@dataclass(frozen=True)
class Size:
    num_tokens: int
    vocab_size: int
    hidden_size: int


@dataclass(frozen=True)
class Figures:
    """Of one forward and backward.

    Attributes:
        seconds: median time.
        peak_bytes: peak allocated over the inputs.
        loss: the value, for comparing the two sides.
    """

    seconds: float
    peak_bytes: int
    loss: float


Case = Callable[[], float]


def plain_kl(student_TV: Tensor, teacher_TV: Tensor) -> Tensor:
    student_TV, teacher_TV = (F.log_softmax(x, -1, dtype=torch.float32) for x in (student_TV, teacher_TV))
    return F.kl_div(student_TV, teacher_TV, log_target=True, reduction="sum")


def cases(size: Size, dtype: torch.dtype) -> dict[str, tuple[Case, Case]]:
    """(plain, ours) by name."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator).mul_(std).to(dtype)

    student_TV = normal(size.num_tokens, size.vocab_size).requires_grad_()
    teacher_TV = normal(size.num_tokens, size.vocab_size)
    std = size.hidden_size**-0.5
    student_TH, teacher_TH = normal(size.num_tokens, size.hidden_size), normal(size.num_tokens, size.hidden_size)
    student_VH = normal(size.vocab_size, size.hidden_size, std=std).requires_grad_()
    teacher_VH = normal(size.vocab_size, size.hidden_size, std=std)
    student_TH.requires_grad_()

    def plain_linear() -> Tensor:
        with torch.no_grad():
            teacher_TV = teacher_TH @ teacher_VH.T
        return plain_kl(student_TH @ student_VH.T, teacher_TV)

    def ours_linear() -> Tensor:
        return linear_distillation(
            student_TH, student_VH, teacher_TH, teacher_VH, loss=LogitLossConfig(), vocab_size=size.vocab_size
        )

    logits, layers = [student_TV], [student_TH, student_VH]
    return {
        "logits given": (
            lambda: backward(plain_kl(student_TV, teacher_TV), logits),
            lambda: backward(logits_distillation(student_TV, teacher_TV, loss=LogitLossConfig()), logits),
        ),
        "with output layers": (lambda: backward(plain_linear(), layers), lambda: backward(ours_linear(), layers)),
    }


def backward(loss: Tensor, leaves: list[Tensor]) -> float:
    loss.backward()
    for leaf in leaves:
        leaf.grad = None
    return loss.item()


def peak_bytes_and_loss(case: Case) -> tuple[int, float]:
    """Peak of what PyTorch's CPU allocator gave out during the call, less what it held before; a warm-up too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        loss = case()
    assert trace.profiler is not None
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak, loss


def measure(pair: tuple[Case, Case], repeats: int) -> list[Figures]:
    """Both sides in turn, so that a busy machine slows both."""
    peaks_and_losses = [peak_bytes_and_loss(case) for case in pair]
    seconds: list[list[float]] = [[], []]
    for _ in range(repeats):
        for case, times in zip(pair, seconds, strict=True):
            start = time.perf_counter()
            case()
            times.append(time.perf_counter() - start)
    return [Figures(statistics.median(s), *rest) for s, rest in zip(seconds, peaks_and_losses, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    size = Size(args.tokens, args.vocab, args.hidden)
    table = Table(
        title=f"KL forward + backward: {size.num_tokens} tokens, vocabulary {size.vocab_size}, hidden "
        f"{size.hidden_size}; CPU, {args.threads} threads, torch {torch.__version__}, median of {args.repeats}"
    )
    for heading in ("dtype", "case", "loss"):
        table.add_column(heading)
    for heading in ("tokens/s", "ratio to plain", "peak memory, logits tensors"):
        table.add_column(heading, justify="right")
    for dtype in (torch.float32, torch.bfloat16):
        logits_bytes = size.num_tokens * size.vocab_size * dtype.itemsize
        for name, pair in cases(size, dtype).items():
            plain, ours = measure(pair, args.repeats)
            torch.testing.assert_close(ours.loss, plain.loss, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=0)
            for label, figures in (("plain", plain), ("ours", ours)):
                table.add_row(
                    str(dtype).removeprefix("torch."),
                    name,
                    label,
                    f"{size.num_tokens / figures.seconds:.0f}",
                    f"{plain.seconds / figures.seconds:.2f}",
                    f"{figures.peak_bytes / logits_bytes:.2f}",
                )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
