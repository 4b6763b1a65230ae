"""The pipeline's bubble against the formula of 1F1B, (p - 1) / (m + p - 1): ``python -m tests.bench.bubble``.

Two stages of one thread each run forward and backward of m micro-batches, without the optimizer. The model is made of
the demo's student's layers with a small vocabulary, so that both stages have the same work, as the formula assumes.

Measured in two ways, which need not agree:

* by the step's time: 1 - m * t / T(m), where t is what one more micro-batch costs in the steady state, the slope of T
  between the two largest m. It counts what the first and last micro-batches wait, and anything that a step pays once.
* by the idle share: 1 - (processor time / elapsed time) of a rank, the mean of both. It also counts the waiting that a
  step without a bubble would have (one rank slower than the other), but sees none where a rank polls.

Both ranks need a core of their own: on a busy machine the figures mean nothing.
"""

import argparse
import statistics
import time
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.table import Table

from minitron.config.parallel import ParallelConfig
from minitron.config.run import Device
from minitron.config.train import TrainConfig
from minitron.models.gpt import build_gpt
from minitron.parallel.groups import model_parallel
from minitron.train.objective import CrossEntropy
from minitron.train.optim import make_trainable
from minitron.train.step import accumulate_gradients
from tests.helpers.bench import run_ranks
from tests.helpers.demo_models import BF16, SEQ_LENGTH, STUDENT, random_batches

NUM_STAGES = 2
VOCAB_SIZE = 512


@dataclass(frozen=True)
class Run:
    """One schedule on one rank: elapsed and processor time, in seconds."""

    elapsed: float
    busy: float


def schedules(num_layers: int, sizes: list[int], repeats: int) -> dict[int, list[Run]]:
    """Runs on every rank: every size in turn, ``repeats`` times."""
    parallel = ParallelConfig(pipeline_model_parallel_size=NUM_STAGES)
    model = replace(STUDENT, num_layers=num_layers, vocab_size=VOCAB_SIZE, share_embeddings_and_output_weights=False)
    runs: dict[int, list[Run]] = {size: [] for size in sizes}
    with model_parallel(parallel, seed=1) as groups:
        gpt = build_gpt(model, parallel, BF16, groups, device=Device.cpu, initialize=True)
        trainable = make_trainable(gpt, TrainConfig(), parallel, groups, seq_length=SEQ_LENGTH)
        objective = CrossEntropy(VOCAB_SIZE, groups, sequence_parallel=False)
        for number in range(repeats + 1):
            for size in sizes:
                batches = random_batches(size, VOCAB_SIZE)
                trainable.zero_grad()
                torch.distributed.barrier()
                elapsed, busy = time.perf_counter(), time.process_time()
                accumulate_gradients(trainable, objective, batches, group_size=0)
                busy = time.process_time() - busy
                torch.distributed.barrier()
                if number:  # the first round warms up
                    runs[size].append(Run(time.perf_counter() - elapsed, busy))
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--microbatches", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    sizes = sorted(args.microbatches)
    ranks = run_ranks(schedules, NUM_STAGES, 1, args.layers, sizes, args.repeats)
    elapsed = {size: statistics.median(run.elapsed for run in ranks[0][size]) for size in sizes}
    one_more = (elapsed[sizes[-1]] - elapsed[sizes[-2]]) / (sizes[-1] - sizes[-2])
    table = Table(title=f"bubble at PP{NUM_STAGES}, {args.layers} layers, median of {args.repeats}")
    for heading in ("micro-batches", "step", "formula", "by the step's time", "by the idle share", "idle by rank"):
        table.add_column(heading, justify="right")
    for size in sizes:
        idle = [statistics.median(1 - run.busy / run.elapsed for run in rank[size]) for rank in ranks]
        table.add_row(
            str(size),
            f"{elapsed[size]:.3f} s",
            f"{(NUM_STAGES - 1) / (size + NUM_STAGES - 1):.3f}",
            f"{1 - size * one_more / elapsed[size]:.3f}",
            f"{statistics.mean(idle):.3f}",
            ", ".join(f"{share:.3f}" for share in idle),
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
