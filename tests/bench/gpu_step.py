"""A distillation step of Llama-3.1-8B's widths on one GPU, in bf16 and FP8: ``python -m tests.bench.gpu_step``.

Teacher: Llama-3.1-8B with fewer layers (hidden 4096, ffn 14336, vocabulary 128256). Student: the papers' 4B of it,
pruned in width (hidden 3072, ffn 9216), with as many layers. Forward KL, optimizer step included, random weights and
tokens. The default of 8 layers takes about 45 GB.

MFU counts the matrix products that a step cannot do without: 6 FLOPs for each weight of the student's products and 2
for each of the teacher's per token, embeddings left out and output layers in, and the causal half of the attention's.
It is a share of the GPU's dense bf16 peak, for the FP8 rows too: over 100 % is possible there.

A second table compares the fused loss, output layers included, with `F.kl_div` on full logits.
"""

import argparse
import gc
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from minitron.compat.te import import_error
from minitron.config.gpus import GPUS
from minitron.config.logit_loss import LogitLossConfig
from minitron.config.parallel import ParallelConfig
from minitron.config.precision import Fp8Recipe, PrecisionConfig
from minitron.config.run import Device
from minitron.config.train import TrainConfig
from minitron.distill.objective import Distillation
from minitron.losses import linear_distillation
from minitron.models.gpt import build_gpt
from minitron.parallel.groups import Groups, model_parallel
from minitron.plan.flops import forward_flops
from minitron.runtime.device import process_group
from minitron.runtime.env import DistEnv
from minitron.train.optim import make_trainable
from minitron.train.step import train_step
from tests.gpu.models import BF16, LLAMA_4B_WIDTH, ONE_RANK, batches, distillation, fp8, lack_of
from tests.helpers.llama31 import LLAMA_8B


@dataclass(frozen=True)
class Step:
    """Figures of a step.

    Attributes:
        seconds: Median time.
        peak_bytes: Most memory allocated beyond what was there before.
    """

    seconds: float
    peak_bytes: int


def seconds_and_peak(case: Callable[[], object], repeats: int, *, held: int = 0) -> Step:
    """Time by CUDA events, the first two calls left out; ``held`` bytes were there before."""
    for _ in range(2):
        case()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        case()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return Step(statistics.median(times), torch.cuda.max_memory_allocated() - held)


def held_bytes() -> int:
    """What is allocated when all that can be let go is: Megatron's models are in cycles."""
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def one_step(args: argparse.Namespace, student: PrecisionConfig, teacher: PrecisionConfig, groups: Groups) -> Step:
    """Build both models and time a step."""
    held = held_bytes()
    models = [replace(model, num_layers=args.layers) for model in (LLAMA_8B, LLAMA_4B_WIDTH)]
    taught, gpt = (
        build_gpt(model, ONE_RANK, precision, groups, device=Device.cuda, initialize=True)
        for model, precision in zip(models, (teacher, student), strict=True)
    )
    settings = TrainConfig(
        num_tokens=1000 * args.microbatches * args.length, global_batch_size=args.microbatches, lr=1e-5, min_lr=1e-6
    )
    trained = make_trainable(gpt, settings, ParallelConfig(), groups, seq_length=args.length)
    objective: Distillation = distillation(taught, LLAMA_8B.vocab_size, groups)
    work = batches(LLAMA_8B, args.microbatches, size=1, length=args.length)
    return seconds_and_peak(lambda: train_step(trained, objective, work), args.repeats, held=held)


def precisions() -> dict[str, tuple[PrecisionConfig, PrecisionConfig]]:
    """(student, teacher) by the name of the row."""
    found = {"bf16": (BF16, BF16)}
    for recipe in Fp8Recipe:
        if lack_of(recipe) is None:
            found[f"student fp8 {recipe}"] = (fp8(recipe), BF16)
    if lack_of(Fp8Recipe.tensorwise) is None:
        both = fp8(Fp8Recipe.tensorwise)
        found["both fp8 tensorwise"] = (both, both.for_teacher(None, Fp8Recipe.tensorwise))
    return found


def plain(student_TH: Tensor, student_VH: Tensor, teacher_TH: Tensor, teacher_VH: Tensor) -> Tensor:
    """What one writes first: full logits, in fp32 for the softmax."""
    with torch.no_grad():
        teacher_TV = F.log_softmax(teacher_TH @ teacher_VH.T, -1, dtype=torch.float32)
    student_TV = F.log_softmax(student_TH @ student_VH.T, -1, dtype=torch.float32)
    return F.kl_div(student_TV, teacher_TV, log_target=True, reduction="sum")


def losses(args: argparse.Namespace) -> dict[str, Step]:
    """Forward and backward of the loss with both output layers, at the vocabulary of Llama-3.1."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda").mul_(std).bfloat16()

    tokens, vocab = args.length, LLAMA_8B.vocab_size
    widths = LLAMA_4B_WIDTH.hidden_size, LLAMA_8B.hidden_size
    student_TH, teacher_TH = (normal(tokens, width) for width in widths)
    student_VH, teacher_VH = (normal(vocab, width, std=width**-0.5) for width in widths)
    for leaf in (student_TH, student_VH):
        leaf.requires_grad_()

    def run(loss_of: Callable[[], Tensor]) -> Callable[[], None]:
        def case() -> None:
            loss_of().backward()
            student_TH.grad = student_VH.grad = None

        return case

    inputs = (student_TH, student_VH, teacher_TH, teacher_VH)
    held = held_bytes()
    cases = {
        "plain": run(lambda: plain(*inputs)),
        "fused": run(lambda: linear_distillation(*inputs, loss=LogitLossConfig(), vocab_size=vocab)),
    }
    return {name: seconds_and_peak(case, args.repeats, held=held) for name, case in cases.items()}


def show(args: argparse.Namespace, steps: dict[str, Step], of_losses: dict[str, Step], console: Console) -> None:
    """Both tables."""
    name = torch.cuda.get_device_name()
    peak = args.peak_tflops or next((f.tflops["bf16"] for gpu, f in GPUS.items() if gpu.upper() in name), None)
    teacher, student = (
        forward_flops(replace(model, num_layers=args.layers), args.length).total for model in (LLAMA_8B, LLAMA_4B_WIDTH)
    )
    table = Table(title=f"{name}: {args.layers} layers, {args.microbatches} x {args.length} tokens a step")
    for heading in ("precision", "ms a step", "tokens/s", "TFLOP/s", "MFU, of bf16's peak", "peak GB"):
        table.add_column(heading, justify="left" if heading == "precision" else "right")
    for row, step in steps.items():
        speed = args.microbatches * args.length / step.seconds
        tflops = speed * (3 * student + teacher) / 1e12
        share = f"{tflops / peak:.1%}" if peak else "peak not known"
        figures = f"{step.seconds * 1000:.0f}", f"{speed:,.0f}", f"{tflops:.0f}", share, f"{step.peak_bytes / 1e9:.1f}"
        table.add_row(row, *figures)
    console.print(table)
    table = Table(title=f"KL with output layers, {args.length} tokens, vocabulary {LLAMA_8B.vocab_size}, bf16")
    for heading in ("loss", "ms", "tokens/s", "GB beyond the inputs"):
        table.add_column(heading, justify="left" if heading == "loss" else "right")
    for row, step in of_losses.items():
        speed = args.length / step.seconds
        table.add_row(row, f"{step.seconds * 1000:.1f}", f"{speed:,.0f}", f"{step.peak_bytes / 1e9:.2f}")
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--microbatches", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--peak-tflops", type=float, help="dense bf16 peak, for a GPU that is not in the list")
    args = parser.parse_args()
    console = Console(width=140)
    lack = "torch sees no CUDA device" if not torch.cuda.is_available() else import_error()
    if lack:
        console.print(f"not run: {lack}")
        return 0
    env = DistEnv(rank=0, world_size=1, local_rank=0)
    with process_group(env, Device.cuda), model_parallel(ONE_RANK, seed=1) as groups:
        steps = {}
        for name, (student, teacher) in precisions().items():
            steps[name] = one_step(args, student, teacher, groups)
        show(args, steps, losses(args), console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
