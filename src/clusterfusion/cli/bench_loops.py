"""`clusterfusion bench full` and `bench decode`: whole generate loops, ours and transformers', in one run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clusterfusion.cli.output import (
    JsonOption,
    ModelArgument,
    Outputs,
    RandomWeights,
    check_apart,
    check_folder,
    check_writable,
    command_line,
    leave,
    show_report,
    so_far,
    write_json,
    write_whole,
)

if TYPE_CHECKING:
    from clusterfusion.bench.decode.options import DecodeOptions
    from clusterfusion.bench.decode.report import DecodeReport
    from clusterfusion.bench.full.report import FullReport
    from clusterfusion.engine import Engine

ContextsOption = Annotated[
    str | None,
    typer.Option(
        help="Prompts' lengths in tokens, with commas between; if left out 16,128,512,1024,1920, as far as the model has room, and "
        "without a GPU 16."
    ),
]
NewTokensOption = Annotated[
    int | None, typer.Option(help="Tokens to decode after each prompt; 128 if left out, 8 without a GPU.")
]
RunsOption = Annotated[int, typer.Option(help="Timed runs of each loop; at least 5. Slow peers get fewer.")]
ModesOption = Annotated[
    str | None,
    typer.Option(
        help="Modes with commas between; model,graph,fused,split if left out. One that cannot run here is left out, with "
        "the reason."
    ),
]
PeersOption = Annotated[
    bool,
    typer.Option(
        help="Measure transformers' loops on the same weights too. (The text of `bench full` is scored by both anyway.)"
    ),
]
PeerContextsOption = Annotated[
    str | None,
    typer.Option(
        help="Contexts to measure transformers at; all of them if left out. torch.compile takes half a minute for each."
    ),
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        help="float16 or bfloat16, in the reference mode also float32 or float64; as `generate` takes it if left out."
    ),
]
MarkdownOption = Annotated[
    Path | None, typer.Option("--markdown", help="Write the table to this file as Markdown.", metavar="FILE")
]


def full(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL", help="A hub id (owner/name), a checkpoint folder, or 'demo', which it is if left out."
        ),
    ] = None,
    random_weights: RandomWeights = None,
    contexts: ContextsOption = None,
    new_tokens: NewTokensOption = None,
    runs: RunsOption = 5,
    modes: ModesOption = None,
    peers: PeersOption = True,
    peer_contexts: PeerContextsOption = None,
    dtype: DtypeOption = None,
    text: Annotated[
        Path | None,
        typer.Option(
            help="A UTF-8 text whose perplexity is measured; for demo its held-out text, else wikitext-2 through the package "
            "datasets, if left out.",
            metavar="FILE",
        ),
    ] = None,
    perplexity: Annotated[bool, typer.Option(help="Score a text; random weights score none.")] = True,
    json_file: JsonOption = None,
    markdown: MarkdownOption = None,
    plots: Annotated[
        Path | None, typer.Option(help="Draw into this folder, as PNG and SVG; needs matplotlib.", metavar="DIR")
    ] = None,
) -> None:
    """Measure everything about a model's decoding: time to the first token and per token, tokens and bytes a second, memory,
    perplexity; ours in every mode and transformers', in turn. Without a GPU: the reference mode, few tokens, no floor. Exit
    status 3 if tokens of our modes differ or our perplexity is not finite."""
    check_writable(json_file)
    check_writable(markdown, "--markdown")
    check_apart({"--text": text, "--json": json_file, "--markdown": markdown, "--plots": plots})
    check_folder(plots, "--plots")
    from clusterfusion.bench import plots as drawing
    from clusterfusion.bench.full.options import text_options, text_options_for

    if plots is not None:
        drawing.require_matplotlib()
    asked_text = text_options(random_weights, text, perplexity)
    engine, options = _load(
        "bench full",
        model or (None if random_weights else "demo"),
        random_weights,
        dtype,
        contexts=contexts,
        new_tokens=new_tokens,
        runs=runs,
        modes=modes,
        peers=peers,
        peer_contexts=peer_contexts,
    )
    asked_text = text_options_for(engine, asked_text)

    from clusterfusion.bench.decode import tables
    from clusterfusion.bench.full import report as full_report
    from clusterfusion.bench.full.measure import measure_full
    from clusterfusion.cli.progress import ProgressBar

    def write(report: FullReport) -> None:
        note = so_far(report.decode.contexts, options.contexts)
        write_json(json_file, full_report.to_json(report), progress, note)
        if markdown is not None:
            write_whole(markdown, full_report.markdown(report))

    with ProgressBar() as progress:
        outputs = Outputs(write, progress)
        report = measure_full(engine, options, asked_text, progress, command_line(), outputs, progress.share)
        if report.interrupted:
            outputs(report)
    show_report(
        tables.heading(report.decode), full_report.report_tables(report), full_report.lines(report), tables.NOTE
    )
    if plots is not None:
        plots.mkdir(exist_ok=True)
        for name, content in drawing.draw(full_report.to_json(report)).items():
            write_whole(plots / name, content)
            progress(f"written to {plots / name}")
    outputs.check()
    leave(report.interrupted, report.passed)


def decode(
    model: ModelArgument = None,
    random_weights: RandomWeights = None,
    contexts: ContextsOption = None,
    new_tokens: NewTokensOption = None,
    runs: RunsOption = 5,
    modes: ModesOption = None,
    peers: PeersOption = True,
    peer_contexts: PeerContextsOption = None,
    dtype: DtypeOption = None,
    json_file: JsonOption = None,
    markdown: MarkdownOption = None,
) -> None:
    """Measure whole greedy generate loops: wall time per output token, ours in every mode, transformers', and the time that
    reading the bytes takes. Without a GPU: the reference mode, few tokens, no floor. Exit status 3 if tokens of our modes
    differ."""
    check_writable(json_file)
    check_writable(markdown, "--markdown")
    check_apart({"--json": json_file, "--markdown": markdown})
    engine, options = _load(
        "bench decode",
        model,
        random_weights,
        dtype,
        contexts=contexts,
        new_tokens=new_tokens,
        runs=runs,
        modes=modes,
        peers=peers,
        peer_contexts=peer_contexts,
    )

    from clusterfusion.bench.decode import tables
    from clusterfusion.bench.decode.measure import measure_decode
    from clusterfusion.bench.decode.report import to_json
    from clusterfusion.cli.progress import ProgressBar

    def write(report: DecodeReport) -> None:
        write_json(json_file, to_json(report), progress, so_far(report.contexts, options.contexts))
        if markdown is not None:
            write_whole(markdown, tables.markdown(report))

    with ProgressBar() as progress:
        outputs = Outputs(write, progress)
        report = measure_decode(engine, options, progress, command_line(), outputs, progress.share)
        if report.interrupted:
            outputs(report)
    show_report(tables.heading(report), [tables.table(report)], tables.lines(report), tables.NOTE)
    outputs.check()
    leave(report.interrupted, not report.differences)


def _load(
    what: str,
    model: str | None,
    random_weights: str | None,
    dtype: str | None,
    *,
    contexts: str | None,
    new_tokens: int | None,
    runs: int,
    modes: str | None,
    peers: bool,
    peer_contexts: str | None,
) -> tuple[Engine, DecodeOptions]:
    """The model and the options of the command `what`, which are checked as far as can be before the model is loaded."""
    from clusterfusion.bench.decode.options import check_source, decode_options, has_gpu, load_model

    on_gpu = has_gpu()

    def options_for(max_position: int | None) -> DecodeOptions:
        return decode_options(
            max_position,
            on_gpu=on_gpu,
            contexts=contexts,
            new_tokens=new_tokens,
            runs=runs,
            modes=modes,
            peers=peers,
            peer_contexts=peer_contexts,
        )

    options_for(check_source(model, random_weights, on_gpu, what))
    engine = load_model(model, random_weights, dtype)
    return engine, options_for(engine.config.max_position)
