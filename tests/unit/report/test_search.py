"""The search's table and plot, from rows made by hand."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from minitron.errors import ArtefactError
from minitron.report.search import (
    SearchResult,
    SearchRow,
    markdown,
    plot_search,
    print_search,
    read_search,
    summary,
    write_search,
)


def _row(name: str, loss: float | None, **values: object) -> SearchRow:
    row = SearchRow(
        name=name,
        num_layers=26,
        hidden_size=504,
        ffn_hidden_size=1344,
        num_attention_heads=9,
        num_query_groups=3,
        parameters=97_800_000,
        non_embedding=73_000_000,
        active_parameters=97_800_000,
        memory_gb=0.2312,
        latency_ms=4.268,
        pruned_loss=3.46,
        loss=loss,
        num_tokens=61_440,
        finished=True,
    )
    return replace(row, **values)  # type: ignore[arg-type]


RESULT = SearchResult(
    rows=[
        _row("a", 2.3421, front=["parameters", "memory_gb", "latency_ms"]),
        _row("b", 2.4, parameters=95_000_000, front=["parameters"]),
        _row("c", 2.9, finished=False, num_tokens=30_720),
        _row("d", None, finished=False, num_tokens=0, pruned_loss=9.0),
    ],
    winner="a",
    eval_tokens=4096,
    teacher_loss=1.892,
    teacher_tokens=16_384,
    latency_source="roofline of h100",
    space="12 shapes, 4 candidates (8 by search.budget.parameters.max)",
    stability=0.8,
    stability_tokens=[46_080, 61_440],
    pruned_stability=None,
    overrides=["prune.num_layers=26"],
)


def test_table() -> None:
    rows = [line.split(" | ") for line in markdown(RESULT).splitlines() if line.startswith("| ")]
    assert rows[0][0] == "| layers"
    assert rows[1] == ["| 26", "504", "1344", "9", "3", "97.8M", "231 MB", "4.27 ms", "3.460", "2.342", "61.4k |"]
    assert [row[9:] for row in rows[2:]] == [["2.400", "61.4k |"], ["2.900", "30.7k |"], ["-", "0 |"]]


def test_what_the_table_does_not_say() -> None:
    lines = summary(RESULT)
    assert lines[0] == f"{RESULT.space}; 2 distilled to the end. Latency: roofline of h100."
    assert lines[1] == "Losses are of 4,096 held-out tokens, nats/token; the teacher's is 1.892, of 16,384."
    assert lines[2] == "Rank correlation of the last two validations (46.1k and 61.4k tokens): 0.80."
    assert lines[3:5] == [
        "On the Pareto front of loss and parameters: a, b.",
        "On the Pareto front of loss and memory (GB): a.",
    ]
    assert summary(replace(RESULT, stability=None))[2].startswith("Too few finished candidates")
    assert summary(replace(RESULT, pruned_stability=-0.5))[2].endswith("right after pruning and the last: -0.50.")


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    write_search(RESULT, {"num_layers": 26, "aggregation": "l2_mean"}, tmp_path)
    assert read_search(tmp_path) == RESULT
    assert (tmp_path / "search.md").read_text() == markdown(RESULT)
    (tmp_path / "search.json").write_text('{"rows": [{}]}')
    with pytest.raises(ArtefactError, match="cannot be read"):
        read_search(tmp_path)


def test_terminal(tmp_path: Path) -> None:
    longest = replace(
        RESULT.rows[0], name="L32-h4608-f16128-a48-g8", parameters=8_271_699_968, memory_gb=16.54, latency_ms=1234.5
    )
    console = Console(file=io.StringIO(), width=80, soft_wrap=True)
    print_search(replace(RESULT, rows=[longest, *RESULT.rows[1:]]), tmp_path, console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "go on: minitron compress <the same settings> prune.num_layers=26" in text
    table = text[: text.index("12 shapes")].splitlines()
    assert max(map(len, table)) <= 80
    assert next(line.split() for line in table if "L32" in line) == [
        *("L32-h4608-f16128-a48-g8", "8.27B", "16.5", "GB", "1.23", "s", "3.460", "2.342", "61.4k")
    ]
    assert text.index("2.342") < text.index("2.400") < text.index("2.900")


def test_plot_has_every_distilled_candidate_on_every_axis() -> None:
    plots = plot_search(RESULT).axes
    assert [axes.get_xlabel() for axes in plots] == ["parameters", "memory (GB)", "latency (ms)"]
    for axes in plots:
        lines = {line.get_label(): line for line in axes.get_lines()}
        assert sorted(lines["distilled to the end"].get_ydata()) == [2.3421, 2.4]
        assert list(lines["stopped early"].get_ydata()) == [2.9]
        assert list(lines["winner: a"].get_ydata()) == [2.3421]
    fronts = {
        axes.get_xlabel(): [line for line in axes.get_lines() if line.get_label() == "Pareto front"] for axes in plots
    }
    assert list(fronts["parameters"][0].get_xdata()) == [95_000_000, 97_800_000]
    assert list(fronts["memory (GB)"][0].get_xdata()) == [0.2312]
