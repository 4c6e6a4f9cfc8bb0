"""`clusterfusion bench`: measurements on one GPU, each beside the GPU's read ceiling and other implementations."""

from __future__ import annotations

import json
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clusterfusion.errors import ArgumentError

if TYPE_CHECKING:
    from clusterfusion.bench.report import LayerReport

_WIDTH = 120  # the table whole, whatever the terminal

bench = typer.Typer(
    name="bench",
    help="Measure on one GPU, beside its read ceiling and beside other implementations, in one run.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@bench.callback()
def _group() -> None:
    pass


@bench.command()
def layer(
    random_weights: Annotated[
        str,
        typer.Option("--random-weights", help="A named shape (`clusterfusion models` lists them).", metavar="SHAPE"),
    ],
    contexts: Annotated[str, typer.Option(help="Numbers of cached tokens, with commas between.")] = "16,512,1024,2047",
    layers: Annotated[int | None, typer.Option(help="Decoder layers; all of the model's if left out.")] = None,
    dtype: Annotated[str, typer.Option(help="Of weights and K/V cache: float16 or bfloat16.")] = "float16",
    repeats: Annotated[int, typer.Option(help="Samples of each form; at least 100. Slow peers get fewer.")] = 100,
    peers: Annotated[bool, typer.Option(help="Measure transformers on the same weights too.")] = True,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write everything to this file as JSON.", metavar="FILE")
    ] = None,
) -> None:
    """Measure decoder layers alone: no embedding, no LM head; one token, one stream, random weights."""
    from clusterfusion.bench.options import layer_options

    if json_file is not None:
        try:
            was_there = json_file.exists()
            json_file.open("a", encoding="utf-8").close()  # tried before anything is measured
            if not was_there:
                json_file.unlink()
        except OSError as error:
            raise ArgumentError(
                f"--json is {str(json_file)!r}, which cannot be written ({error.strerror}); it must name a file in a folder "
                "that exists"
            ) from error
    options = layer_options(random_weights, contexts=contexts, layers=layers, dtype=dtype, repeats=repeats, peers=peers)

    from clusterfusion.bench.layer import measure_layers

    began = time.monotonic()

    def progress(message: str) -> None:
        typer.echo(f"{time.monotonic() - began:6.1f} s  {message}", err=True)

    def write(report: LayerReport) -> None:
        from clusterfusion.bench.report import to_json

        if json_file is not None:
            json_file.write_text(json.dumps(to_json(report), indent=2) + "\n", encoding="utf-8")
            progress(f"written to {json_file}, with {len(report.contexts)} of {len(options.contexts)} contexts")

    _print(measure_layers(options, progress, shlex.join(["clusterfusion", *sys.argv[1:]]), write))


def _print(report: LayerReport) -> None:
    from rich.console import Console

    from clusterfusion.bench.report import SCOPE, failures, heading, table

    console = Console(width=max(Console().width, _WIDTH), highlight=False, markup=False)
    for line in heading(report):
        console.print(line, soft_wrap=True)
    console.print(table(report))
    for line in failures(report):
        console.print(line, soft_wrap=True)
    console.print(
        f"{SCOPE}. Medians of CUDA-event times; fused and split are launched by the host, the graphs are CUDA graphs. "
        "Where the host is slower than the GPU, as with eager peers, the time is the host's.",
        style="dim",
    )
