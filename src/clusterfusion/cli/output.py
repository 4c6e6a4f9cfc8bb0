"""What commands that measure have in common: arguments, files tried before and written whole, progress, the report."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, TypeVar

import typer

from clusterfusion.errors import ArgumentError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Report = TypeVar("Report")
EXIT_DIFFERENT = 3  # measured, and found different where it must not be: neither an error (1) nor a usage error (2)
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
_WIDTH = 150  # the table whole, whatever the terminal

ModelArgument = Annotated[
    str | None, typer.Argument(metavar="MODEL", help="A hub id (owner/name), a checkpoint folder, or 'demo'.")
]
RandomWeights = Annotated[
    str | None,
    typer.Option("--random-weights", help="A named shape instead of MODEL, with random weights.", metavar="SHAPE"),
]
JsonOption = Annotated[
    Path | None, typer.Option("--json", help="Write everything to this file as JSON.", metavar="FILE")
]


def check_writable(file: Path | None, option: str = "--json") -> None:
    """Try the file before anything is measured. Raises ArgumentError naming `option`."""
    if file is None:
        return
    try:
        if _is_special(file):
            return  # a pipe's reader would take a try for the end
        file = file.resolve()
        if file.exists():
            file.open("r+b").close()
        part = _part_of(file)
        part.open("xb").close()
        part.unlink()
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise ArgumentError(
            f"{option} is {str(file)!r}, which cannot be written ({why}); it must name a file in a folder that exists"
        ) from error


def check_apart(files: Mapping[str, Path | None]) -> None:
    """That no two options name one file, be it written or read. Raises ArgumentError naming the later one."""
    named = [(option, file) for option, file in files.items() if file is not None and not _is_special(file)]
    for (first, file), (option, other) in itertools.combinations(named, 2):
        if file.resolve() == other.resolve():
            raise ArgumentError(f"{option} is {str(other)!r}, which {first} is too; each needs a file of its own")


def check_folder(folder: Path | None, option: str) -> None:
    """As `check_writable`, for a folder that may be new."""
    if folder is None:
        return
    try:
        if folder.exists():
            tempfile.TemporaryFile(dir=folder).close()
        else:
            folder.mkdir()
            folder.rmdir()
    except OSError as error:
        raise ArgumentError(
            f"{option} is {str(folder)!r}, where nothing can be written ({error.strerror}); it must name a folder, which may be "
            "new in one that exists"
        ) from error


def progress_lines() -> Callable[[str], None]:
    """Lines on stderr, each with the seconds since now."""
    began = time.monotonic()
    return lambda message: typer.echo(f"{time.monotonic() - began:6.1f} s  {message}", err=True)


OUTPUTS = ("--json", "--markdown", "--out", "--plots")


def command_line() -> str:
    """The command as a shell would take it, for reports: without the options that only say where they go."""
    words = iter(sys.argv[1:])
    kept = []
    for word in words:
        if word in OUTPUTS:
            next(words, None)
        elif not word.startswith(tuple(f"{option}=" for option in OUTPUTS)):
            kept.append(word)
    return shlex.join(["clusterfusion", *kept])


def leave(interrupted: bool, passed: bool = True) -> None:
    """With the exit status of what was measured; of what is whole and passed, by returning."""
    if interrupted:
        raise typer.Exit(EXIT_INTERRUPTED)
    if not passed:
        raise typer.Exit(EXIT_DIFFERENT)


class Outputs(Generic[Report]):
    """Call it with a report so far to `write` it while a measurement goes on. A file that cannot be written ends nothing:
    `check` raises its error when the report is on the screen, unless a later try has succeeded."""

    def __init__(self, write: Callable[[Report], None], progress: Callable[[str], None]) -> None:
        self._write, self._progress = write, progress
        self._error: ArgumentError | None = None

    def __call__(self, report: Report) -> None:
        try:
            self._write(report)
            self._error = None
        except ArgumentError as error:
            self._error = error
            self._progress(str(error))

    def check(self) -> None:
        """Raise ArgumentError for what is not written."""
        if self._error is not None:
            raise self._error


def write_json(file: Path | None, report: dict[str, Any], progress: Callable[[str], None], note: str = "") -> None:
    """Write `report` to `file`, if there is one, and say so."""
    if file is not None:
        write_whole(file, json.dumps(report, indent=2, allow_nan=False) + "\n")
        progress(f"written to {file}{note}")


def write_whole(file: Path, content: str | bytes) -> None:
    """Write under another name and rename: whoever interrupts this leaves the file as it was, or the new one. A device or a pipe,
    which must not be replaced, is written to. ArgumentError for what cannot be written, and for a pipe that nobody reads."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    try:
        if _is_special(file):
            _write_to_special(file, data)
            return
        file = file.resolve()
        part = _part_of(file)
        try:
            part.write_bytes(data)
            part.replace(file)
        finally:
            part.unlink(missing_ok=True)
    except BrokenPipeError:  # the reader of a pipe went away, as of stdout
        raise
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise ArgumentError(f"{str(file)!r} cannot be written ({why}); what was measured is not in it") from error


def _write_to_special(file: Path, data: bytes) -> None:
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_NONBLOCK)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        raise ArgumentError(f"{str(file)!r} is a pipe that nobody reads; what was measured is not written") from error
    os.set_blocking(descriptor, True)
    with os.fdopen(descriptor, "wb") as special:
        special.write(data)


def _is_special(file: Path) -> bool:
    """Whether it is there and neither a file nor a folder."""
    return file.exists() and not file.is_file() and not file.is_dir()


def _part_of(file: Path) -> Path:
    """What becomes of `file` when it is written whole."""
    return file.with_name(f".{file.name}.{os.getpid()}")


def so_far(done: Sequence[object], asked: Sequence[object]) -> str:
    """What `write_json` says beside a file of contexts."""
    return f", with {len(done)} of {len(asked)} contexts"


def report_console() -> Console:
    """Stdout, wide enough for any table."""
    from rich.console import Console

    return Console(width=max(Console().width, _WIDTH), highlight=False, markup=False)


def show_report(heading: Sequence[str], tables: Sequence[Table], lines: Sequence[str], note: str) -> None:
    """A report on stdout: what was measured, tables, what they say, and what to know of them."""
    console = report_console()
    for line in heading:
        console.print(line, soft_wrap=True)
    for index, table in enumerate(tables):
        if index:
            console.print()
        console.print(table)
    for line in lines:
        console.print(line, soft_wrap=True)
    if note:
        console.print(note, style="dim")
