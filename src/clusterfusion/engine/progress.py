"""A progress bar on stderr for loads long enough to wonder about."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

_SHOW_AFTER_S = 0.7


@contextlib.contextmanager
def progress_bar(description: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Yields a function to call with each number of bytes done. Shows nothing when the work is short or stderr is no
    terminal; leaves nothing behind."""
    if sys.stderr is None or not sys.stderr.isatty():  # None: a process without a stderr, such as a daemon
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with contextlib.ExitStack() as stack:
        start = time.perf_counter()
        done = 0
        progress: Progress | None = None

        def advance(count: int) -> None:
            nonlocal done, progress
            done += count
            if progress is None and time.perf_counter() - start > _SHOW_AFTER_S:
                progress = stack.enter_context(Progress(*columns, console=Console(stderr=True), transient=True))
                progress.add_task(description, total=total_bytes)
            if progress is not None:
                progress.update(progress.task_ids[0], completed=done)

        yield advance
