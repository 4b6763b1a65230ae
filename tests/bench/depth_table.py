"""Which depth metric leaves the best model right after pruning: ``python -m tests.bench.depth_table``.

SmolLM2-135M-Instruct from 30 to 24 and to 20 layers. Each metric and selection chooses the layers on calibration text
(the demo's training split), and the model without them is evaluated on held-out text of the same kind. Nothing is
retrained. The measurements are kept in the run folder, so that an interrupted call goes on where it was; ``--part``
makes one of them.
"""

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from minitron.checkpoint.folder import read_model_config
from minitron.cli.main import main as minitron
from minitron.config.compose import compose_run
from minitron.config.depth import DepthPlan
from minitron.config.model import ModelConfig
from minitron.config.prune import DepthSelection, PruneConfig
from minitron.config.run import Device
from minitron.config.score import Aggregation, DepthMetric, ScoreConfig
from minitron.data.batch import Batch
from minitron.data.loader import calibration_batches, heldout_batches
from minitron.models.gpt import Chunks
from minitron.models.load import load_gpt
from minitron.parallel.groups import Groups, model_parallel
from minitron.prune.calibration import score_model
from minitron.prune.depth import TextMeasure, measure_depth
from minitron.prune.depth_scores import DepthScores
from minitron.prune.ranking import kept_layers
from minitron.prune.removal import RemovalPass, Variant
from minitron.prune.scores import random_scores
from minitron.prune.spec import write_units
from minitron.runtime.artefact import RunFolder
from minitron.runtime.session import Session
from tests.helpers.bench import run_ranks

BI, LOSS, MSE = DepthMetric.block_importance, DepthMetric.loss, DepthMetric.logit_mse
FREE, BLOCK, GREEDY = DepthSelection.free, DepthSelection.contiguous, DepthSelection.iterative
COUNTS = (24, 20)
ROWS = [(BI, FREE), (BI, BLOCK), (LOSS, FREE), (LOSS, BLOCK), (LOSS, GREEDY), (MSE, FREE), (MSE, BLOCK), (MSE, GREEDY)]
PLANS = {
    "blocks": DepthPlan((BI, LOSS, MSE), (1, 6, 10)),
    "loss_greedy": DepthPlan(greedy=LOSS, num_greedy=10),
    "logit_mse_greedy": DepthPlan(greedy=MSE, num_greedy=10),
}
"""One measurement each; the part ``calibration`` is the pass that gives Block Importance of single layers."""


@contextmanager
def loaded(run: Path, overrides: list[str]) -> Iterator[tuple[Chunks, ModelConfig, Groups, Session]]:
    config = compose_run(overrides)
    with model_parallel(config.parallel, seed=1) as groups:
        session = Session(config=config, run=RunFolder(run), groups=groups, device=Device.cpu, console=Console())
        gpt, model = load_gpt(run / "import", session, local_spec=True)
        yield gpt.eval(), model, groups, session


def calibration(run: Path, session: Session, number: int) -> list[Batch]:
    batches = calibration_batches(
        run / "data",
        num_samples=number,
        seq_length=session.config.data.seq_length,
        micro_batch_size=session.config.score.micro_batch_size,
        dp_rank=0,
        dp_size=1,
        seed=session.config.seed,
    )
    return list(batches)


def measure(run: Path, overrides: list[str], part: str, samples: int) -> None:
    """Runs on the one rank: a measurement, written to a file."""
    with loaded(run, overrides) as (gpt, model, groups, session):
        text = calibration(run, session, samples)
        start = time.perf_counter()
        if part == "calibration":
            scores = score_model(gpt, text, model=model, config=ScoreConfig(), groups=groups, source_id="w")
            found: dict[str, Any] = {"layer": scores.layer.tolist()}
        else:
            with session.progress(part) as progress:
                depth = measure_depth(gpt, text, PLANS[part], model=model, groups=groups, on_progress=progress.update)
            arrays = {name: values.tolist() for name, values in depth.arrays().items()}
            found = {"about": depth.about(), "arrays": arrays}
        seconds = time.perf_counter() - start
    write(run, part, {"samples": samples, "seconds": seconds, **found})


def heldout(run: Path, overrides: list[str], removed: list[list[int]], tokens: int) -> list[float]:
    """Runs on the one rank: held-out loss of the whole model, and without each set of layers."""
    with loaded(run, overrides) as (gpt, model, groups, session):
        batches = heldout_batches(
            run / "data",
            seq_length=session.config.data.seq_length,
            micro_batch_size=session.config.eval.micro_batch_size,
            dp_rank=0,
            dp_size=1,
            max_tokens=tokens,
        )
        variants = [Variant(frozenset(), 0, -1, -1)]
        variants += [Variant(frozenset(layers), 0, min(layers), max(layers)) for layers in removed]
        measured = TextMeasure(gpt, len(variants), [LOSS], model, groups)
        one = RemovalPass(gpt, groups, variants, measured)
        with session.progress("heldout") as progress, torch.no_grad():
            for done in range(len(batches)):
                one.run(batches[done])
                progress.update(done + 1, len(batches))
        return [float(value) for value in measured.values()[LOSS]]


def write(run: Path, part: str, values: dict[str, Any]) -> None:
    folder = run / "depth_table"
    folder.mkdir(exist_ok=True)
    (folder / f"{part}.json").write_text(json.dumps(values, indent=1) + "\n")


def read(run: Path, part: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((run / "depth_table" / f"{part}.json").read_text())
    return values


def part_of(metric: DepthMetric, selection: DepthSelection) -> str:
    if selection is GREEDY:
        return f"{metric}_greedy"
    return "calibration" if (metric, selection) == (BI, FREE) else "blocks"


def chosen(run: Path, model: ModelConfig, metric: DepthMetric, selection: DepthSelection, count: int) -> list[int]:
    """The layers that go."""
    found = read(run, part_of(metric, selection))
    depth, layer = DepthScores(), np.zeros(model.num_layers)
    if "layer" in found:
        layer = np.array(found["layer"])
    else:
        depth = DepthScores.of(found["about"], {name: np.array(values) for name, values in found["arrays"].items()})
    scores = replace(random_scores(model, Aggregation.l2_mean, 0), layer=layer, depth=depth)  # the width is not read
    kept = kept_layers(scores, count, PruneConfig(depth_metric=metric, depth_selection=selection))
    return [number for number in range(model.num_layers) if number not in kept]


def table(run: Path, overrides: list[str], tokens: int, threads: int) -> None:
    model = read_model_config(run / "import")
    made = [row for row in ROWS if (run / "depth_table" / f"{part_of(*row)}.json").exists()]
    gone = {(row, count): chosen(run, model, *row, count) for row in made for count in COUNTS}
    sets = sorted(set(map(tuple, gone.values())))
    (losses,) = run_ranks(heldout, 1, threads, run, overrides, [list(layers) for layers in sets], tokens)
    loss_of = dict(zip(sets, losses[1:], strict=True))
    write(run, "losses", {"tokens": tokens, "whole": losses[0], "without": {write_units(s): loss_of[s] for s in sets}})
    out = Table(
        "metric", "selection", *(f"{n} layers: {what}" for n in COUNTS for what in ("loss", "dropped")), "tokens"
    )
    for row in made:
        cells = [cell for n in COUNTS for cell in (f"{loss_of[tuple(gone[row, n])]:.3f}", write_units(gone[row, n]))]
        out.add_row(*map(str, row), *cells, f"{256 * read(run, part_of(*row))['samples']:,}")
    console = Console(width=160)
    console.print(f"whole model: {losses[0]:.3f} nats/token on {tokens} held-out tokens")
    console.print(out)
    for part in ("calibration", *PLANS):
        if (run / "depth_table" / f"{part}.json").exists():
            console.print(f"{part}: {read(run, part)['seconds']:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    parser.add_argument("--samples", type=int, default=16, help="calibration sequences of 256 tokens, one-shot")
    parser.add_argument("--greedy-samples", type=int, default=8, help="the same, iterative")
    parser.add_argument("--heldout-tokens", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--part", choices=["prepare", "calibration", *PLANS, "table"])
    args = parser.parse_args()
    alone = "parallel.pipeline_model_parallel_size=1"
    overrides = ["experiment=demo", f"runs_dir={args.runs_dir}", "name=depth_table", "device=cpu", alone]
    run = args.runs_dir / "depth_table"
    for verb in ("import", "data"):
        if code := minitron([verb, *overrides]):
            raise SystemExit(code)
    for part in ("calibration", *PLANS):
        if args.part in (None, part) and not (run / "depth_table" / f"{part}.json").exists():
            samples = args.greedy_samples if "greedy" in part else args.samples
            run_ranks(measure, 1, args.threads, run, overrides, part, samples)
    if args.part in (None, "table"):
        table(run, overrides, args.heldout_tokens, args.threads)


if __name__ == "__main__":
    main()
