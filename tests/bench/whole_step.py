"""What distillation costs beyond its parts: ``python -m tests.bench.whole_step``.

Time of a distillation step over (the teacher's forward alone + a step of the student with cross-entropy alone), on
SmolLM2-135M and the demo's student (random weights of these shapes), bf16, micro-batches of one sequence of 256 tokens,
optimizer step included: at one pipeline stage with two threads, and at two stages with one thread each.

The three are timed in turn, in the same processes; ranks start and end each together.
"""

import argparse
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from minitron.config.train import TrainConfig
from minitron.train.step import train_step
from tests.helpers.bench import Ratio, in_turn, run_ranks
from tests.helpers.demo_models import SEQ_LENGTH, demo, random_batches

TEACHER, STUDENT, STEP = "teacher's forward", "student's step, cross-entropy", "distillation step"


def seconds_of_parts(num_stages: int, num_microbatches: int, repeats: int) -> dict[str, list[float]]:
    """Runs on every rank."""
    settings = TrainConfig(num_tokens=1000 * num_microbatches * SEQ_LENGTH, global_batch_size=num_microbatches, lr=1e-5)
    batches = random_batches(num_microbatches)
    with demo(num_stages, settings) as models:

        def together(work: Callable[[], object]) -> Callable[[], None]:
            def run() -> None:
                torch.distributed.barrier()
                work()
                torch.distributed.barrier()

            return run

        cases = {
            TEACHER: together(lambda: models.forward_kl.signals(batches)),
            STUDENT: together(lambda: train_step(models.student, models.cross_entropy, batches)),
            STEP: together(lambda: train_step(models.student, models.forward_kl, batches)),
        }
        in_turn(cases, 1)
        return in_turn(cases, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    table = Table(title=f"{args.microbatches} micro-batches of {SEQ_LENGTH} tokens, bf16, {args.repeats} rounds")
    table.add_column("layout")
    for heading in (TEACHER, STUDENT, STEP, "step / (teacher + student)"):
        table.add_column(heading, justify="right")
    for num_stages in args.stages:
        threads = max(1, 2 // num_stages)
        seconds = run_ranks(seconds_of_parts, num_stages, threads, num_stages, args.microbatches, args.repeats)[0]
        parts = [teacher + student for teacher, student in zip(seconds[TEACHER], seconds[STUDENT], strict=True)]
        table.add_row(
            f"PP{num_stages}, {threads} thread(s) a rank",
            *(f"{sorted(times)[len(times) // 2]:.2f} s" for times in seconds.values()),
            str(Ratio.of(seconds[STEP], parts)),
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
