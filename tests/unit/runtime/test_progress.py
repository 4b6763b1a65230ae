"""What the bar shows on a terminal, and the plain lines that a log file gets."""

import io
import re

import pytest
from rich.console import Console

from minitron.runtime.progress import StageProgress


def _shown(*, terminal: bool, width: int) -> str:
    """All that is written for two updates of a stage, without the terminal's control sequences."""
    buffer = io.StringIO()
    console = Console(file=buffer, force_terminal=terminal, width=width, soft_wrap=True)
    with StageProgress("eval_distilled", enabled=True, console=console) as progress:
        progress.update(1, 1200)
        progress.update(1137, 1200, loss=3.45678, tokens_per_s=123456.0)
        if not terminal:
            progress.update(1200, 1200, loss=3.25, tokens_per_s=1000.0)
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", buffer.getvalue())


@pytest.mark.parametrize("width", [80, 110, 200])
def test_bar_on_a_terminal(width: int) -> None:
    lines = re.split(r"[\r\n]+", _shown(terminal=True, width=width))
    last = next(line for line in reversed(lines) if line.strip())
    assert re.fullmatch(
        r". eval_distilled \S+ 1137/1200 loss 3\.4568  123,456 tokens/s left (-:--:--|\d:\d\d:\d\d)", last.strip()
    ), last
    assert max(map(len, lines)) <= width


def test_plain_lines_without_a_terminal() -> None:
    lines = _shown(terminal=False, width=80).splitlines()
    assert len(lines) == 1  # the rest came within 15 seconds
    assert lines[0].startswith("  eval_distilled: 1200/1200  loss 3.2500  1,000 tokens/s  ")
