"""`minitron search`: the candidates side by side, loss against cost, and how steady their order is."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich import box
from rich.console import Console
from rich.table import Table

from minitron.errors import ArtefactError
from minitron.report import figure as look
from minitron.report import format as fmt
from minitron.runtime.artefact import storage_error, write_json

JSON_FILE, TABLE_FILE, PLOT_FILE, WINNER_FILE = "search.json", "search.md", "pareto.png", "winner.yaml"

PLOTTED = {"parameters": "parameters", "memory_gb": "memory (GB)", "latency_ms": "latency (ms)"}
"""Costs that the plot has an axis for."""


@dataclass(frozen=True, kw_only=True)
class SearchRow:
    """One candidate.

    Attributes:
        name: Its sizes in short, the name of its folder.
        num_layers, hidden_size, ffn_hidden_size, num_attention_heads, num_query_groups: Its sizes.
        parameters, non_embedding, active_parameters, memory_gb, latency_ms: What it costs.
        pruned_loss: Held-out loss right after pruning, nats per token.
        loss: Held-out loss after its last distillation; None where it was not distilled.
        num_tokens: Tokens of that.
        finished: It was distilled to the end: only these are compared with each other.
        front: Costs by which no finished candidate is as good and cheaper.
    """

    name: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    parameters: int
    non_embedding: int
    active_parameters: int
    memory_gb: float
    latency_ms: float
    pruned_loss: float
    loss: float | None = None
    num_tokens: int = 0
    finished: bool = False
    front: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """The comparison.

    Attributes:
        rows: The best first; those that stopped early come after the finished ones, then those not distilled.
        winner: Name of the first.
        eval_tokens: Held-out tokens that candidates are compared on.
        teacher_loss: Held-out loss of the teacher.
        teacher_tokens: Held-out tokens that it is of.
        latency_source: How latencies were found.
        space: What became of the grid, in words.
        stability: Rank correlation of the finished candidates' last two validations; None for fewer than three.
        stability_tokens: Tokens at those two.
        pruned_stability: Rank correlation of the order right after pruning and the last one.
        overrides: The winner's shape, as overrides.
    """

    rows: list[SearchRow]
    winner: str
    eval_tokens: int
    teacher_loss: float
    teacher_tokens: int
    latency_source: str
    space: str
    stability: float | None
    stability_tokens: list[int]
    pruned_stability: float | None
    overrides: list[str]


def write_search(result: SearchResult, winner: dict[str, Any], out: Path) -> None:
    """Write the comparison: JSON, a table in Markdown, a plot, and the winner's ``prune`` section.

    Args:
        result: The comparison.
        winner: The winner's ``prune`` section.
        out: Where to write.

    Raises:
        ArtefactError: ``out`` cannot be written.
    """
    head = f"# {result.winner}: the winner of `minitron search`. Copy it to conf/prune/ to choose it by name.\n"
    section = yaml.safe_dump({"defaults": ["schema", "_self_"], **winner}, sort_keys=False)
    try:
        (out / PLOT_FILE).write_bytes(look.png_bytes(plot_search(result)))
        (out / TABLE_FILE).write_text(markdown(result), encoding="utf-8")
        (out / WINNER_FILE).write_text(head + section, encoding="utf-8")
        write_json(out / JSON_FILE, asdict(result))
    except OSError as error:
        raise storage_error(error, out) from error


def read_search(folder: Path) -> SearchResult:
    """What `write_search` wrote.

    Raises:
        ArtefactError: It cannot be read.
    """
    path = folder / JSON_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return SearchResult(**{**values, "rows": [SearchRow(**row) for row in values["rows"]]})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ArtefactError(
            f"{path} cannot be read ({error}); delete {folder} and run minitron search again"
        ) from error


_SIZES = ("layers", "hidden", "ffn", "heads", "groups")
_MEASURES = ("params", "memory", "latency", "pruned", "distilled", "tokens")


def size_cells(row: SearchRow) -> tuple[str, ...]:
    """A candidate's sizes, in the order of `_SIZES`."""
    sizes = (row.num_layers, row.hidden_size, row.ffn_hidden_size, row.num_attention_heads, row.num_query_groups)
    return tuple(map(str, sizes))


def measure_cells(row: SearchRow) -> tuple[str, ...]:
    """What a candidate costs and is worth, in the order of `_MEASURES`."""
    return (
        fmt.count(row.parameters),
        fmt.size(1e9 * row.memory_gb),
        milliseconds(row.latency_ms),
        fmt.nats(row.pruned_loss),
        "-" if row.loss is None else fmt.nats(row.loss),
        fmt.count(row.num_tokens),
    )


def milliseconds(value: float) -> str:
    """A latency with three significant digits: ``4.27 ms``."""
    return f"{value:.3g} ms" if value < 1000 else f"{value / 1000:.3g} s"


def summary(result: SearchResult) -> list[str]:
    """What the table does not say."""
    finished = [row for row in result.rows if row.finished]
    teachers = f"{fmt.nats(result.teacher_loss)}, of {result.teacher_tokens:,}"
    lines = [
        f"{result.space}; {len(finished)} distilled to the end. Latency: {result.latency_source}.",
        f"Losses are of {result.eval_tokens:,} held-out tokens, nats/token; the teacher's is {teachers}.",
    ]
    if result.stability is None:
        lines.append("Too few finished candidates for a rank correlation, or no two validations of all.")
    else:
        before, after = (fmt.count(tokens) for tokens in result.stability_tokens)
        lines.append(
            f"Rank correlation of the last two validations ({before} and {after} tokens): {result.stability:.2f}"
            + (
                ""
                if result.pruned_stability is None
                else f"; of the order right after pruning and the last: {result.pruned_stability:.2f}"
            )
            + "."
        )
    for cost, label in PLOTTED.items():
        names = [row.name for row in finished if cost in row.front]
        lines.append(f"On the Pareto front of loss and {label}: {', '.join(names)}.")
    return lines


def markdown(result: SearchResult) -> str:
    """The table and what belongs to it, for a page."""
    headings = (*_SIZES, *_MEASURES)
    head = f"| {' | '.join(headings)} |\n|{'---|' * len(headings)}\n"
    body = "".join(f"| {' | '.join((*size_cells(row), *measure_cells(row)))} |\n" for row in result.rows)
    return head + body + "\n" + "\n".join(f"- {line}" for line in summary(result)) + "\n"


def print_search(result: SearchResult, folder: Path, console: Console) -> None:
    """Print the table, what belongs to it, and how to go on. The table fits 80 columns."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("candidate", no_wrap=True)
    for heading in _MEASURES:
        table.add_column(heading, justify="right", no_wrap=True)
    for number, row in enumerate(result.rows):
        table.add_row(row.name, *measure_cells(row), style="bold" if number == 0 else None)
    console.print(table)
    for line in summary(result):
        console.print(line, markup=False, highlight=False)
    console.print(f"plot: {folder / PLOT_FILE}", soft_wrap=True, markup=False, highlight=False)
    console.print(f"the winner's prune section: {folder / WINNER_FILE}", soft_wrap=True, markup=False, highlight=False)
    console.print(
        f"go on: minitron compress <the same settings> {' '.join(result.overrides)}",
        soft_wrap=True,
        markup=False,
        highlight=False,
    )


def plot_search(result: SearchResult) -> Figure:
    """Held-out loss against parameters, memory and latency; the Pareto front of the finished ones is a line."""
    figure = look.new_figure(4.6, "Candidates: held-out loss against cost")
    plots = figure.subplots(1, len(PLOTTED), sharey=True)
    for number, (axes, (cost, label)) in enumerate(zip(plots, PLOTTED.items(), strict=True)):
        for is_finished, colour, marker, text in (
            (True, look.BLUE, "o", "distilled to the end"),
            (False, look.GREY, "x", "stopped early"),
        ):
            rows = [row for row in result.rows if row.finished is is_finished and row.loss is not None]
            points = [(getattr(row, cost), row.loss) for row in rows]
            if points:
                axes.plot(*zip(*points, strict=True), marker, color=colour, label=text)
        front = sorted((getattr(row, cost), row.loss) for row in result.rows if cost in row.front)
        axes.plot(*zip(*front, strict=True), "-", color=look.ORANGE, label="Pareto front", zorder=1)
        best = result.rows[0]
        axes.plot([getattr(best, cost)], [best.loss], "*", color=look.RED, markersize=13, label=f"winner: {best.name}")
        look.tidy(axes, label, "held-out loss (nats/token)" if number == 0 else "", grid="both")
        axes.xaxis.set_major_locator(MaxNLocator(4))
        if cost == "parameters":
            look.token_axis(axes)  # counts, as 97.8M
    handles, labels = plots[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9, frameon=False)
    return figure
