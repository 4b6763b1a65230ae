"""The distillation loss against ModelOpt's, torchtune's and Liger's: ``python -m tests.bench.kd_peers``.

Forward and backward of the forward KL at temperature 1, summed over the tokens.

Logits given: ModelOpt's loss for Megatron models (`LogitsKLLoss`) and torchtune's `ForwardKLLoss`, whole and in its
8 chunks. torchtune's loss lacks the teacher's entropy, a constant: its gradient is the same and is compared with ours,
as every peer's is. Ours puts the gradient into memory of its own and, in a second table, in place of the logits.

Output layers included: Liger's fused linear distillation loss (`LigerFusedLinearJSDLoss` at beta 0, the one of its
fused losses that is plain PyTorch and runs on a CPU), as it is and compiled, which is its default. Its cross-entropy
is a Triton kernel and does not run here. "Products alone" are the four matrix products that any such loss has to make
(both models' logits, the gradients of the student's hidden state and weight): the floor.

Memory is as in `tests.bench.kd_loss`, over the inputs, in units of one logits tensor.

On a GPU, at the widths of Llama-3.1-8B and the papers' 4B:
``python -m tests.bench.kd_peers --device cuda --dtypes bfloat16 --sizes 4096x128256 --hidden 3072
--teacher-hidden 4096``.

The peers are not in requirements.lock: `make .peers` installs them beside the project, without their dependencies on
torch.
"""

import argparse
import contextlib
import io
import logging
import statistics
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from minitron.config.logit_loss import LogitLossConfig
from minitron.losses import linear_distillation, logits_distillation, workspace
from tests.helpers.bench import Ratio, in_turn, peak_bytes

OURS, FLOOR = "ours", "products alone"


@dataclass(frozen=True)
class Peers:
    """Losses of the peers, as they are called."""

    modelopt: Callable[..., Any]
    torchtune: Callable[..., Tensor]
    torchtune_chunked: Callable[..., Tensor]
    liger: Callable[..., Any]


@dataclass(frozen=True)
class Side:
    """A loss.

    Attributes:
        loss: its call.
        leaves: the tensors that get a gradient.
        factor: what makes a sum over tokens of the loss.
        before: what each call needs first, not timed.
    """

    loss: Callable[[], Tensor]
    leaves: list[Tensor]
    factor: float = 1.0
    before: Callable[[], object] = lambda: None

    def run(self) -> list[Tensor]:
        """Forward and backward; the gradients."""
        self.loss().backward()
        wait(self.leaves[0].device)
        grads = []
        for leaf in self.leaves:
            assert leaf.grad is not None
            grads.append(leaf.grad)
            leaf.grad = None
        return grads


def wait(device: torch.device) -> None:
    """Until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_of(side: Side) -> int:
    """Most memory that a loss takes beyond what is there."""
    if side.leaves[0].device.type == "cpu":
        return peak_bytes(side.run)[0]
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    side.run()
    return torch.cuda.max_memory_allocated() - before


def load_peers(folder: Path) -> Peers | None:
    """Import the peers from a folder that pip or uv installed them into; None where one is missing."""
    sys.path.append(str(folder))  # at the end: the project's own packages come first
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
            from modelopt.torch.distill.plugins.megatron import LogitsKLLoss
            from torchtune.modules.loss import ForwardKLLoss, ForwardKLWithChunkedOutputLoss
        except ImportError as error:
            print(f"{error}; the peers are not installed in {folder}: `make .peers` does that")
            return None
    return Peers(
        LogitsKLLoss(SimpleNamespace(tensor_model_parallel_size=1)),
        ForwardKLLoss(),
        ForwardKLWithChunkedOutputLoss(),
        LigerFusedLinearJSDLoss,
    )


def logits_given(
    peers: Peers, num_tokens: int, vocab_size: int, dtype: torch.dtype, device: torch.device, *, overwrite: bool
) -> dict[str, Side]:
    generator = torch.Generator().manual_seed(0)
    student_TV, teacher_TV = (
        torch.randn(num_tokens, vocab_size, generator=generator).to(device, dtype) for _ in range(2)
    )
    student_TV.requires_grad_()
    labels_T = torch.zeros(num_tokens, dtype=torch.int64, device=device)
    chunks = [chunk.detach()[None].requires_grad_() for chunk in student_TV.chunk(8)]
    teacher_chunks = [chunk[None] for chunk in teacher_TV.chunk(8)]

    def modelopt() -> Tensor:
        loss_BS: Tensor = peers.modelopt(student_TV[:, None], teacher_TV[:, None])[0]
        return loss_BS.sum()

    mine_TV = student_TV.detach().clone().requires_grad_() if overwrite else student_TV

    def ours() -> Tensor:
        return logits_distillation(mine_TV, teacher_TV, loss=LogitLossConfig(), overwrite_student=overwrite)

    def restore() -> None:
        if overwrite:
            mine_TV.detach().copy_(student_TV)

    return {
        OURS: Side(ours, [mine_TV], before=restore),
        "ModelOpt": Side(modelopt, [student_TV]),
        "torchtune": Side(lambda: peers.torchtune(student_TV, teacher_TV, labels_T, normalize=False), [student_TV]),
        "torchtune, 8 chunks": Side(
            lambda: peers.torchtune_chunked(chunks, teacher_chunks, labels_T[None]), chunks, factor=num_tokens
        ),
    }


def with_output_layers(
    peers: Peers, num_tokens: int, vocab_size: int, dtype: torch.dtype, device: torch.device, widths: tuple[int, int]
) -> dict[str, Side]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator).mul_(std).to(device, dtype)

    student_TH, teacher_TH = (normal(num_tokens, width) for width in widths)
    student_VH, teacher_VH = (normal(vocab_size, width, std=width**-0.5) for width in widths)
    labels_T = torch.zeros(num_tokens, dtype=torch.int64, device=device)
    leaves = [student_TH.requires_grad_(), student_VH.requires_grad_()]
    kinds = {
        name: peers.liger(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=compiled)
        for name, compiled in (("Liger", False), ("Liger, compiled", True))
    }

    def liger(loss: Callable[..., Tensor]) -> Side:
        return Side(lambda: loss(student_TH, student_VH, teacher_TH, teacher_VH, labels_T), leaves, factor=num_tokens)

    def ours() -> Tensor:
        return linear_distillation(
            student_TH, student_VH, teacher_TH, teacher_VH, loss=LogitLossConfig(), vocab_size=vocab_size
        )

    return {OURS: Side(ours, leaves), **{name: liger(loss) for name, loss in kinds.items()}}


def products(side: Side, num_tokens: int, vocab_size: int, widths: tuple[int, int]) -> Callable[[], None]:
    """The matrix products alone, each whole, into memory that is there."""
    student_TH, student_VH = (leaf.detach() for leaf in side.leaves)
    teacher_TH, teacher_HV = (
        torch.randn(shape).to(student_TH) for shape in ((num_tokens, widths[1]), (widths[1], vocab_size))
    )
    logits_TV = student_TH.new_empty(num_tokens, vocab_size)
    grad_TH, grad_VH = torch.empty_like(student_TH), torch.empty_like(student_VH)

    def run() -> None:
        torch.mm(teacher_TH, teacher_HV, out=logits_TV)
        torch.mm(student_TH, student_VH.t(), out=logits_TV)
        torch.mm(logits_TV, student_VH, out=grad_TH)
        torch.mm(logits_TV.t(), student_TH, out=grad_VH)
        wait(student_TH.device)

    return run


def compare_gradients(sides: dict[str, Side]) -> dict[str, float]:
    """Relative difference between each peer's gradient and ours: all compute the same loss."""
    sides[OURS].before()
    ours = torch.cat([grad.flatten() for grad in sides[OURS].run()])
    norm = ours.float().norm()
    differences = {}
    for name, side in sides.items():
        if name != OURS:
            theirs = torch.cat([grad.flatten() for grad in side.run()]).mul_(side.factor)
            differences[name] = float(theirs.sub_(ours).float().norm() / norm)
            assert differences[name] < (1e-3 if ours.dtype == torch.float32 else 5e-2), (name, differences[name])
    return differences


def report(title: str, sides: dict[str, Side], num_tokens: int, vocab_size: int, args: Any) -> Table:
    """Measure one group of losses."""
    dtype = sides[OURS].leaves[0].dtype
    table = Table(title=f"{title}, {num_tokens} tokens, vocabulary {vocab_size}, {str(dtype).removeprefix('torch.')}")
    table.add_column("loss")
    for heading in ("tokens/s", "time / ours", "memory", "gradient's difference"):
        table.add_column(heading, justify="right")
    differences = compare_gradients(sides)
    workspace.release()  # the chunks of the comparison count again
    peaks = {name: peak_of(side) for name, side in sides.items()}
    cases: dict[str, Callable[[], Any]] = {name: side.run for name, side in sides.items()}
    if len(sides[OURS].leaves) == 2:
        cases[FLOOR] = products(sides[OURS], num_tokens, vocab_size, (args.hidden, args.teacher_hidden))
        cases[FLOOR]()
    seconds = in_turn(cases, args.repeats, {name: side.before for name, side in sides.items()})
    for name, times in seconds.items():
        table.add_row(
            name,
            f"{num_tokens / statistics.median(times):.0f}",
            str(Ratio.of(times, seconds[OURS])),
            f"{peaks[name] / (num_tokens * vocab_size * dtype.itemsize):.2f}" if name in peaks else "",
            f"{differences[name]:.0e}" if name in differences else "",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, default=Path(".peers"), help="folder the peers are installed in")
    parser.add_argument("--sizes", nargs="+", default=["1024x49152", "256x131072"], help="tokens x vocabulary")
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--teacher-hidden", type=int, default=960)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    peers = load_peers(args.peers)
    if peers is None:
        return
    widths = (args.hidden, args.teacher_hidden)
    console = Console(width=120)
    on = f"CPU, {args.threads} threads" if args.device.type == "cpu" else torch.cuda.get_device_name()
    console.print(
        f"forward KL, forward + backward; hidden {widths[0]}, teacher's {widths[1]}; {on}, "
        f"torch {torch.__version__}; medians (quartiles) of {args.repeats} pairs"
    )
    for size in args.sizes:
        num_tokens, vocab_size = (int(part) for part in size.split("x"))
        for dtype in (getattr(torch, name) for name in args.dtypes):
            for overwrite in (False, True):
                sides = logits_given(peers, num_tokens, vocab_size, dtype, args.device, overwrite=overwrite)
                title = "logits given" + (", our gradient in their place" if overwrite else "")
                console.print(report(title, sides, num_tokens, vocab_size, args))
                del sides  # before the next ones are made
            sides = with_output_layers(peers, num_tokens, vocab_size, dtype, args.device, widths)
            console.print(report("output layers too", sides, num_tokens, vocab_size, args))
            del sides


if __name__ == "__main__":
    main()
