"""The command table, and the frame around every command: one-line errors, exit statuses, Ctrl-C.

Commands import what they need when they run, so that `--help` does not wait for PyTorch.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Annotated, NoReturn

import typer

from clusterfusion import __version__
from clusterfusion.cli.bench import bench
from clusterfusion.cli.evaluate import perplexity, quality, verify
from clusterfusion.cli.generate import generate
from clusterfusion.cli.info import info
from clusterfusion.cli.models import models
from clusterfusion.cli.output import EXIT_INTERRUPTED
from clusterfusion.errors import ClusterFusionError

EXIT_ERROR = 1
EXIT_USAGE = 2

app = typer.Typer(
    name="clusterfusion",
    help="Fast decoding of GPT-NeoX/Pythia and LLaMA models: one stream of tokens on one NVIDIA GPU.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(generate)
app.command()(info)
app.command()(models)
app.command()(verify)
app.command()(quality)
app.command()(perplexity)
app.add_typer(bench)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"clusterfusion {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the trace of an error. May stand anywhere.")] = False,
) -> None:
    pass


def main() -> NoReturn:
    """Run the command line on sys.argv and exit: 0 done, 1 an error, 2 a usage error, 130 interrupted; 3 if `verify` or
    `bench decode` found output that differs."""
    arguments, debug = _take_debug(sys.argv[1:])
    if isinstance(sys.stdout, io.TextIOWrapper):  # a model may write what the terminal's encoding lacks
        sys.stdout.reconfigure(errors="replace")
    try:
        status = app(args=arguments, prog_name="clusterfusion", standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        status = EXIT_INTERRUPTED
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            _fail(f"cannot go on: {error.strerror or error}")
        # The reader of our output went away, as `| head` does.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_ERROR)
    except Exception as error:
        show = getattr(error, "show", None)  # usage errors know how to print themselves, whoever their class belongs to
        if callable(show) and hasattr(error, "exit_code"):
            show()
            sys.exit(EXIT_USAGE)
        if debug:
            raise
        if isinstance(error, ClusterFusionError):
            _fail(str(error))
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported for this
            _fail(f"out of memory: {error}; take a smaller model, a shorter context, or fewer modes and peers")
        _fail(f"{type(error).__name__}: {error} (this is a bug; --debug shows the trace)")
    if status == EXIT_INTERRUPTED:  # some versions of typer return it instead of raising Abort
        typer.echo("clusterfusion: interrupted", err=True)
    sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str) -> NoReturn:
    typer.echo("clusterfusion: " + " ".join(message.split()), err=True)
    sys.exit(EXIT_ERROR)


def _take_debug(arguments: list[str]) -> tuple[list[str], bool]:
    """The arguments without `--debug`, which may stand anywhere before a `--`."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    head = [a for a in arguments[:end] if a != "--debug"]
    return head + arguments[end:], len(head) < end
