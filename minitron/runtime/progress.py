"""Progress on the terminal: a live bar where there is one, plain lines in a log file."""

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

_LINE_INTERVAL_S = 15.0
_BESIDE_THE_BAR = 69
"""Characters of a line without its bar; rich would cut the numbers short before the bar."""


class StageProgress:
    """One stage's bar: stage, step, loss, tokens/s and time left.

    Only rank 0 shows anything. Without a terminal, a plain line is printed every 15 seconds and at the end.

    Args:
        stage: Name of the stage.
        enabled: False on every rank but one.
        console: Where to write.
    """

    def __init__(self, stage: str, *, enabled: bool, console: Console | None = None) -> None:
        self._stage = stage
        self._enabled = enabled
        self._console = console or Console(file=sys.stdout, soft_wrap=True)
        self._live: Progress | None = None
        self._task: TaskID | None = None
        self._started = self._last_line = time.monotonic()
        self._first_done: int | None = None
        if enabled and self._console.is_terminal:
            self._live = Progress(
                SpinnerColumn(),
                TextColumn("[bold]{task.description:<14}"),
                BarColumn(bar_width=min(24, max(4, self._console.width - _BESIDE_THE_BAR))),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )

    def __enter__(self) -> Self:
        """Show the bar."""
        if self._live is not None:
            self._live.start()
            self._task = self._live.add_task(self._stage, total=None, note="")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take the bar away; the caller prints what stays."""
        if self._live is not None:
            self._live.stop()

    def update(
        self, done: int, total: int | None, *, loss: float | None = None, tokens_per_s: float | None = None
    ) -> None:
        """Report where the stage is.

        Args:
            done: Units finished.
            total: Units in all; None where nobody knows.
            loss: Latest loss, in nats per token.
            tokens_per_s: Speed over the latest interval.
        """
        if not self._enabled:
            return
        parts = []
        if loss is not None:
            parts.append(f"loss {loss:.4f}")
        if tokens_per_s is not None:
            parts.append(f"{tokens_per_s:,.0f} tokens/s")
        note = "  ".join(parts)
        if self._live is not None and self._task is not None:
            self._live.update(self._task, completed=done, total=total, note=note)
            return
        now = time.monotonic()
        if self._first_done is None:
            self._first_done = done
        if (total is None or done < total) and now - self._last_line < _LINE_INTERVAL_S:
            return
        self._last_line = now
        shown = f"{done}" if total is None else f"{done}/{total}"
        self._console.print(f"  {self._stage}: {shown}  {note}  {self._time_left(done, total, now)}", highlight=False)

    def _time_left(self, done: int, total: int | None, now: float) -> str:
        elapsed = now - self._started
        new = done - (self._first_done or 0)
        if total is None or done >= total or new <= 0:
            return f"{elapsed:.0f} s"
        return f"{elapsed:.0f} s, about {elapsed / new * (total - done):.0f} s left"
