"""The table of results on the terminal."""

from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from minitron.report import format as fmt
from minitron.report.data import PruneResult, ReportData, Role

_AXES = {
    "num_layers": "layers",
    "hidden_size": "hidden",
    "ffn_hidden_size": "ffn",
    "num_attention_heads": "heads",
    "num_query_groups": "groups",
}


def print_table(data: ReportData, console: Console) -> None:
    """Print the results, what to know about them, and where report and model are. Fits 80 columns."""
    console.print()
    console.print(_table(data))
    tokens = data.row(Role.distilled).num_tokens
    console.print(f"loss: held-out cross-entropy, nats/token, mean of {tokens:,} tokens", style="dim")
    console.print("gap recovered: (pruned - model) / (pruned - teacher)", style="dim")
    if data.same_training:
        console.print("random init: the same shape, tokens and schedule, without teacher", style="dim")
    console.print(_pruned(data.prune), style="dim", markup=False, highlight=False)
    for note in data.notes:
        console.print(f"note: {note}", style="yellow", markup=False, highlight=False)
    # Paths stay whole, for copying, however long they are.
    for name, path in (("report", data.html_path), ("model", data.export_path)):
        console.print(f"{name + ':':<8}{_short(path)}", soft_wrap=True, markup=False, highlight=False)


def _table(data: ReportData) -> Table:
    title = f"{escape(data.model_name)}, distilled on {fmt.count(data.cost.tokens)} tokens"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("model", no_wrap=True)
    for heading in ("parameters", "non-\nembedding", "loss", "perplexity", "gap\nrecovered"):
        table.add_column(heading, justify="right", no_wrap=True, vertical="bottom")
    for model in data.models:
        table.add_row(
            model.role.label,
            fmt.count(model.num_parameters),
            fmt.count(model.num_non_embedding),
            fmt.nats(model.loss),
            fmt.perplexity(model.perplexity),
            fmt.share(model.gap_recovered),
            style="bold" if model.role is Role.distilled else None,
        )
    return table


def _pruned(prune: PruneResult) -> str:
    """What was dropped, what share of the scores that left, and whether it was verified."""
    parts = []
    for size, name in _AXES.items():
        before, after = getattr(prune.source, size), getattr(prune.target, size)
        share = prune.score_kept.get(size)
        scores = "" if share is None else f" ({fmt.share(share)} of the scores)"
        if before != after:
            parts.append(f"{name} {before} -> {after}{scores}")
    if prune.dropped_layers:
        parts.append(f"without layers {', '.join(map(str, prune.dropped_layers))}")
    return f"pruned: {', '.join(parts) or 'nothing'}; verified"


def _short(path: Path) -> str:
    """The path from where the user stands, if it lies below."""
    full = path.resolve()
    return str(full.relative_to(Path.cwd())) if full.is_relative_to(Path.cwd()) else str(full)
