"""Held-out loss right after pruning: ``python -m tests.bench.prune_table [--minutes 8] [key=value ...]``.

SmolLM2-135M, cut to two shapes: units kept at random, by each of paper 1's nine aggregations, and by the default with
the kept weights fitted (`minitron.prune.reconstruct`). Scores and fits are made on the demo's training text, losses on
its held-out text. Overrides of the demo's configuration are passed on: ``runs_dir=...``,
``prune.reconstruct.damping=...``. Rows are kept in ``<runs_dir>/<name>/table.json`` by what decides them: with
``--minutes`` the command stops in time, and goes on when it is given again.

The first shape, hidden 448 with 9 heads, is one that transformers refuses in a LlamaConfig, though nothing in the model
needs that. It is measured without export: the source is relabelled as a Mistral without a window, the same model.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from minitron.checkpoint.folder import SIDE_DIR, WEIGHTS_DIR, read_model_config, side_dir, write_model_config
from minitron.cli.main import main as minitron
from minitron.compat.cpu import CPU_LAYER
from minitron.config.compose import compose_run, flat_values
from minitron.config.model import Architecture
from minitron.config.prune import PruneConfig, Ranking
from minitron.config.reconstruct import ReconstructConfig
from minitron.config.run import Device, RunConfig
from minitron.config.score import Aggregation
from minitron.eval.run import evaluate
from minitron.parallel.groups import Groups, model_parallel
from minitron.prune.run import prune
from minitron.prune.scores import Scores
from minitron.runtime.artefact import RunFolder
from minitron.runtime.session import Session

SHAPES = {
    "24 layers, hidden 448, ffn 1152": {"num_layers": 24, "hidden_size": 448, "ffn_hidden_size": 1152},
    "30 layers, hidden 576, ffn 768": {"ffn_hidden_size": 768},
}
BASE = [
    "experiment=demo",
    "name=prune-table",
    "parallel.pipeline_model_parallel_size=1",
    "score=all_aggregations",
    "score.num_samples=512",
    "eval.num_tokens=8192",
    "report.sample_tokens=0",
]
SLICED = ReconstructConfig(enabled=False)
NUM_SAMPLES = (16, 32, 64, 512)
"""Sequences to fit on."""


def rows(config: RunConfig) -> Iterator[tuple[str, str, PruneConfig]]:
    """Shape, name and settings of every row, those that matter most first."""
    fit = replace(config.prune.reconstruct, enabled=True)
    sliced = {shape: PruneConfig(**sizes, reconstruct=SLICED) for shape, sizes in SHAPES.items()}  # type: ignore[arg-type]
    default = PruneConfig().aggregation
    for num_samples in NUM_SAMPLES:
        for shape, settings in sliced.items():
            yield shape, default.value, settings
            name = f"{default.value}, fitted on {num_samples * config.data.seq_length:,} tokens"
            yield shape, name, replace(settings, reconstruct=replace(fit, num_samples=num_samples))
    for shape, settings in sliced.items():
        yield shape, "random", replace(settings, ranking=Ranking.random)
    for aggregation in Aggregation:
        for shape, settings in sliced.items():
            yield shape, aggregation.value, replace(settings, aggregation=aggregation)


def relabelled(source: Path, out: Path) -> Path:
    """The source as a Mistral; its weights are linked."""
    out.mkdir(parents=True)
    (out / WEIGHTS_DIR).symlink_to((source / WEIGHTS_DIR).resolve())
    shutil.copytree(side_dir(source), out / SIDE_DIR)
    write_model_config(out, replace(read_model_config(source), architecture=Architecture.mistral))
    return out


def identity(shape: str, name: str, settings: PruneConfig | None, config: RunConfig) -> str:
    """What decides a row."""
    values = flat_values(settings, "") if settings else {}
    if settings and not settings.reconstruct.enabled:
        values = {key: value for key, value in values.items() if not key.startswith(".reconstruct.")}
    return json.dumps([shape, name, values, config.score.num_samples, config.eval.num_tokens])


def measure(config: RunConfig, run: RunFolder, groups: Groups, table: Path, deadline: float) -> dict[str, Any]:
    """Fill in the rows that are not there, until the deadline."""
    done = read(table)
    with tempfile.TemporaryDirectory(dir=run.path) as folder:
        source = relabelled(run.stage("import"), Path(folder) / "source")
        scores = replace(Scores.load(run.stage("score")), model=read_model_config(source))
        scores.save(Path(folder) / "scores")
        for shape, name, settings in [("", "not pruned", None), *rows(config)]:
            key = identity(shape, name, settings, config)
            if key in done or time.monotonic() > deadline:
                continue
            start = time.monotonic()
            out = Path(folder) / "out"
            shutil.rmtree(out, ignore_errors=True)
            session = Session(
                config=config if settings is None else replace(config, prune=settings),
                run=run,
                groups=groups,
                device=Device.cpu,
                console=Console(quiet=True),
            )
            if settings is not None:
                prune(
                    session,
                    model=source,
                    source_id=scores.source_id,
                    scores=Path(folder) / "scores",
                    data=run.stage("data"),
                    out=out,
                )
            seconds = time.monotonic() - start
            (Path(folder) / "eval").mkdir(exist_ok=True)
            result = evaluate(
                session,
                name=name,
                model=out if settings else source,
                data=run.stage("data"),
                out=Path(folder) / "eval",
            )
            row = {"shape": shape, "row": name, "loss": result["loss"], "seconds": seconds}
            done = read(table) | {key: row}  # another process may fill in rows as well
            sys.stdout.write(f"{shape:<34} {name:<24} {result['loss']:.4f} ({seconds:.0f} s to prune)\n")
            sys.stdout.flush()
            table.write_text(json.dumps(done, indent=1))
    return done


def read(table: Path) -> dict[str, Any]:
    """The rows that are done."""
    rows: dict[str, Any] = json.loads(table.read_text()) if table.exists() else {}
    return rows


def show(done: dict[str, Any]) -> None:
    table = Table("", *SHAPES)
    names = dict.fromkeys(row["row"] for row in done.values())
    for name in names:
        losses = {row["shape"]: f"{row['loss']:.3f}" for row in done.values() if row["row"] == name}
        table.add_row(name, *(losses.get(shape, losses.get("", "")) for shape in SHAPES))
    Console(soft_wrap=True).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=600.0, help="stop after so many, rows done are kept")
    arguments, overrides = parser.parse_known_args()
    deadline = time.monotonic() + 60 * arguments.minutes
    config = compose_run([*BASE, *overrides])
    run = RunFolder(Path(config.runs_dir) / config.name)
    for stage in ("import", "data", "score"):
        if code := minitron([stage, *BASE, *overrides]):
            sys.exit(code)
    with tempfile.TemporaryDirectory() as store:
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}/store", rank=0, world_size=1)
        CPU_LAYER.apply()
        with model_parallel(config.parallel, seed=config.seed) as groups:
            show(measure(config, run, groups, run.path / "table.json", deadline))
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
