import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from minitron.report import format as fmt
from minitron.report.data import ReportData, load_report
from minitron.report.table import print_table
from tests.unit.report import synthetic as syn


def printed(data: ReportData) -> list[str]:
    console = Console(file=io.StringIO(), width=80, color_system=None)
    print_table(data, console)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def cells(lines: list[str]) -> list[list[str]]:
    return [line.replace(" %", "%").split() for line in lines]


def test_rows_and_paths(report_dir: Path) -> None:
    lines = printed(load_report(report_dir))
    rows = cells(lines)
    assert ["teacher", "134.5M", "106.2M", "3.000", "20.09", "100.0%"] in rows
    assert ["pruned", "71.6M", "49.6M", "8.000", "2,981", "0.0%"] in rows
    assert ["pruned", "+", "distilled", "71.6M", "49.6M", "4.000", "54.60", "80.0%"] in rows
    assert ["random", "init", "71.6M", "49.6M", "6.500", "665.14", "30.0%"] in rows
    assert lines[-2:] == [f"report: {report_dir / 'report.html'}", f"model:  {report_dir.parent / 'export' / 'hf'}"]
    assert all(len(line) <= 80 for line in lines[:-2])


def test_what_was_pruned(report_dir: Path) -> None:
    data = load_report(report_dir)
    text = " ".join(printed(data))
    assert "pruned: layers 30 -> 24 (97.3 % of the scores), hidden 576 -> 448, ffn 1536 ->" in text
    assert "without layers 21, 22, 23, 24, 25, 26; verified" in text
    whole = replace(data.prune, target=data.prune.source, kept_layers=list(range(30)))
    assert "pruned: nothing; verified" in printed(replace(data, prune=whole))


def test_paths_are_relative_below_the_working_folder(report_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(report_dir.parent.parent)
    assert printed(load_report(report_dir))[-2:] == ["report: demo/report/report.html", "model:  demo/export/hf"]


def test_numbers_stay_whole_at_their_longest(report_dir: Path) -> None:
    data = load_report(report_dir)
    models = [
        replace(row, loss=699.999, perplexity=1.23e304, gap_recovered=-123.456, num_parameters=999_900_000_000)
        for row in data.models
    ]
    rows = cells(printed(replace(data, models=models, model_name="[red]/some/long/name")))
    assert ["pruned", "+", "distilled", "999.9B", "49.6M", "699.999", "1.23e304", "-12,346%"] in rows
    assert any("[red]/some/long/name," in row for row in rows)


def test_without_gap_and_with_notes(report_dir: Path) -> None:
    data = load_report(report_dir)
    data = replace(data, models=[replace(row, gap_recovered=None) for row in data.models[:3]])
    lines = printed(replace(data, same_training=False, baseline=None, notes=["[bold]one thing[/]"]))
    assert ["teacher", "134.5M", "106.2M", "3.000", "20.09", "-"] in cells(lines)
    assert "note: [bold]one thing[/]" in lines
    assert not any("random init" in line for line in lines)


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (fmt.count(999), "999"),
        (fmt.count(2048), "2.05k"),
        (fmt.count(syn.SOURCE_PARAMETERS), "134.5M"),
        (fmt.count(8.03e9), "8.03B"),
        (fmt.nats(3.14159), "3.142"),
        (fmt.perplexity(23.104), "23.10"),
        (fmt.perplexity(12345.6), "12,346"),
        (fmt.perplexity(4.2e7), "4.20e7"),
        (fmt.share(0.8), "80.0 %"),
        (fmt.share(-12.3456), "-1,235 %"),
        (fmt.share(-1.5e6), "-1.50e8 %"),
        (fmt.share(None), "-"),
        (fmt.power(3.52e14), "3.52e14"),
        (fmt.duration(4.25), "4.2 s"),
        (fmt.duration(185), "3 min 05 s"),
        (fmt.duration(3599.6), "1 h 00 min"),
        (fmt.duration(3725), "1 h 02 min"),
        (fmt.size(512), "512 B"),
        (fmt.size(12_000_000), "12.0 MB"),
        (fmt.size(269_060_552), "269 MB"),
    ],
)
def test_number_formats(shown: str, text: str) -> None:
    assert shown == text
