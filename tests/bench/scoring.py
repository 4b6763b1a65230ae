"""What scoring adds to a plain forward pass: ``python -m tests.bench.scoring``.

SmolLM2-135M's shape with random weights, micro-batches of 4 x 256 tokens, one process. The plain pass runs the same
micro-batches through the same schedule without hooks, up to the final hidden state: no logits in either. The two are
timed in turn, and the ratio is of neighbours in time. The target is 1.15 for the default aggregation.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from rich.console import Console
from rich.table import Table

from minitron.config.parallel import ParallelConfig
from minitron.config.precision import Dtype, PrecisionConfig
from minitron.config.run import Device
from minitron.config.score import Aggregation, ScoreConfig
from minitron.data.batch import Batch
from minitron.models.gpt import Chunks, build_gpt
from minitron.parallel.groups import Groups, model_parallel
from minitron.prune.calibration import score_model
from minitron.train.heldout import forward_only
from tests.helpers.batch import batch_of
from tests.helpers.bench import Ratio, in_turn, run_ranks
from tests.helpers.smollm2 import SMOLLM2_135M

CASES = {
    "default: (l2, mean)": [Aggregation.l2_mean],
    "all nine": list(Aggregation),
}


@contextmanager
def built(dtype: Dtype) -> Iterator[tuple[Chunks, Groups]]:
    with model_parallel(ParallelConfig(), seed=1) as groups:
        torch.manual_seed(0)
        gpt = build_gpt(
            SMOLLM2_135M,
            ParallelConfig(),
            PrecisionConfig(dtype=dtype),
            groups,
            device=Device.cpu,
            initialize=True,
            local_spec=True,
        )
        yield gpt.eval(), groups


def batches(number: int, size: int, length: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(SMOLLM2_135M.vocab_size, (number, size, length + 1), generator=generator)
    return [batch_of(ids_BT) for ids_BT in ids]


def measure(dtype: Dtype, size: int, length: int, repeats: int) -> dict[str, tuple[float, Ratio]]:
    """Tokens per second of the plain pass, and the ratio, by case."""
    found = {}
    with built(dtype) as (gpt, groups):
        text = batches(1, size, length)

        def plain() -> None:
            forward_only(gpt, text, lambda _state, _batch: None)

        for name, aggregations in CASES.items():
            config = ScoreConfig(aggregations=aggregations)

            def scored(config: ScoreConfig = config) -> None:
                score_model(gpt, text, model=SMOLLM2_135M, config=config, groups=groups, source_id="bench")

            plain()
            scored()
            seconds = in_turn({"plain": plain, "scored": scored}, repeats)
            speed = size * length / min(seconds["plain"])
            found[name] = speed, Ratio.of(seconds["scored"], seconds["plain"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    table = Table("dtype", "aggregations", "plain, tokens/s", "scored / plain: median (quartiles)")
    for dtype in (Dtype.fp32, Dtype.bf16):
        (found,) = run_ranks(measure, 1, args.threads, dtype, args.micro_batch_size, args.seq_length, args.repeats)
        for name, (speed, ratio) in found.items():
            table.add_row(str(dtype), name, f"{speed:,.0f}", str(ratio))
    Console().print(table)


if __name__ == "__main__":
    main()
