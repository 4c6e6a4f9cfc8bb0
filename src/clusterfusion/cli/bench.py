"""`clusterfusion bench`: measurements on one GPU, each beside the GPU's read ceiling and other implementations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from clusterfusion.cli.output import (
    JsonOption,
    check_writable,
    command_line,
    progress_lines,
    report_console,
    write_json,
)

if TYPE_CHECKING:
    from clusterfusion.bench.report import LayerReport

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
    json_file: JsonOption = None,
) -> None:
    """Measure decoder layers alone: no embedding, no LM head; one token, one stream, random weights."""
    from clusterfusion.bench.options import layer_options

    check_writable(json_file)
    options = layer_options(random_weights, contexts=contexts, layers=layers, dtype=dtype, repeats=repeats, peers=peers)

    from clusterfusion.bench.layer import measure_layers

    progress = progress_lines()

    def write(report: LayerReport) -> None:
        from clusterfusion.bench.report import to_json

        write_json(json_file, to_json(report), progress, _so_far(report.contexts, options.contexts))

    _print(measure_layers(options, progress, command_line(), write))


def _so_far(done: Sequence[object], asked: Sequence[object]) -> str:
    return f", with {len(done)} of {len(asked)} contexts"


def _print(report: LayerReport) -> None:
    from clusterfusion.bench.report import SCOPE, failures, heading, table

    console = report_console()
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
