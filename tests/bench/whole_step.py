"""What distillation costs beyond its parts: ``python -m tests.bench.whole_step``.

Time of a distillation step over (the teacher's forward alone + a step of the student with cross-entropy alone), on
SmolLM2-135M and the demo's student (random weights of these shapes), bf16, micro-batches of one sequence of 256 tokens,
optimizer step included: at one pipeline stage with two threads, and at two stages with one thread each.

A forward ends with logits: the teacher's are the plain product of its final hidden state and its output layer, kept for
one micro-batch. The stricter ratio compares with a forward that stops at the hidden state, which is all that a
distillation step asks of the teacher before its loss.

All are timed in turn, in the same processes; ranks start and end each together.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from minitron.config.train import TrainConfig
from minitron.data.batch import Batch
from minitron.models.gpt import FinalState
from minitron.train.heldout import forward_only
from minitron.train.step import train_step
from tests.helpers.bench import Ratio, in_turn, run_ranks
from tests.helpers.demo_models import SEQ_LENGTH, demo, random_batches

TEACHER, HIDDEN = "teacher, to logits", "teacher, to hidden state"
STUDENT, STEP = "student, cross-entropy", "distillation"


def logits(state: FinalState, _batch: Batch) -> None:
    """The output layer of a forward pass."""
    torch.mm(state.hidden_SBH.flatten(0, 1), state.weight_vH.t())


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
            TEACHER: together(lambda: forward_only(models.teacher, batches, logits)),
            HIDDEN: together(lambda: models.distillation.signals(batches)),
            STUDENT: together(lambda: train_step(models.student, models.cross_entropy, batches)),
            STEP: together(lambda: train_step(models.student, models.distillation, batches)),
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
    for heading in (TEACHER, HIDDEN, STUDENT, STEP, "ratio, to logits", "ratio, to hidden"):
        table.add_column(heading, justify="right")
    for num_stages in args.stages:
        threads = max(1, 2 // num_stages)
        seconds = run_ranks(seconds_of_parts, num_stages, threads, num_stages, args.microbatches, args.repeats)[0]
        ratios = []
        for teacher in (TEACHER, HIDDEN):
            parts = [sum(pair) for pair in zip(seconds[teacher], seconds[STUDENT], strict=True)]
            ratios.append(str(Ratio.of(seconds[STEP], parts)))
        table.add_row(
            f"PP{num_stages}, {threads} thread(s) a rank",
            *(f"{statistics.median(times):.2f} s" for times in seconds.values()),
            *ratios,
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
