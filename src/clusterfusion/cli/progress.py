"""How a long measurement goes on, on stderr: lines, and on a terminal a bar below them."""

from __future__ import annotations

import time
from types import TracebackType

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn


class ProgressBar:
    """Call it with a line, which is printed with the seconds since the start; `share` moves the bar. Without a terminal
    there are only the lines.

    Nothing is drawn but in these calls: a thread that draws would take the interpreter from the loops being timed.
    """

    def __init__(self) -> None:
        self._began = time.monotonic()
        console = Console(stderr=True, highlight=False, markup=False)
        self._bar = Progress(
            TextColumn("        "),
            BarColumn(bar_width=40),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=console,
            auto_refresh=False,
            transient=True,
            disable=not console.is_interactive,
        )
        self._task = self._bar.add_task("", total=1.0)

    def __enter__(self) -> ProgressBar:
        if not self._bar.disable:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._bar.disable:
            self._bar.stop()

    def __call__(self, message: str) -> None:
        line = f"{time.monotonic() - self._began:6.1f} s  {message}"
        if self._bar.disable:
            typer.echo(line, err=True)
        else:
            self._bar.console.print(line, soft_wrap=True)
            self._bar.refresh()

    def share(self, done: float) -> None:
        """`done` of the work is done, from 0 to 1."""
        self._bar.update(self._task, completed=done, refresh=True)
