"""`clusterfusion bench`: measurements on one GPU, each beside the GPU's read ceiling and other implementations."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clusterfusion.cli.bench_loops import DtypeOption, MarkdownOption, PeerContextsOption, PeersOption, decode, full
from clusterfusion.cli.output import (
    JsonOption,
    ModelArgument,
    Outputs,
    RandomWeights,
    check_apart,
    check_writable,
    command_line,
    leave,
    progress_lines,
    show_report,
    so_far,
    write_json,
    write_whole,
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


bench.command()(full)
bench.command()(decode)


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
    peers: PeersOption = True,
    peer_contexts: PeerContextsOption = None,
    json_file: JsonOption = None,
) -> None:
    """Measure decoder layers alone: no embedding, no LM head; one token, one stream, random weights."""
    from clusterfusion.bench.options import layer_options

    check_writable(json_file)
    options = layer_options(
        random_weights,
        contexts=contexts,
        layers=layers,
        dtype=dtype,
        repeats=repeats,
        peers=peers,
        peer_contexts=peer_contexts,
    )

    from clusterfusion.bench.layer import measure_layers
    from clusterfusion.cli.progress import ProgressBar

    def write(report: LayerReport) -> None:
        from clusterfusion.bench.report import to_json

        write_json(json_file, to_json(report), progress, so_far(report.contexts, options.contexts))
        progress.share(len(report.contexts) / len(options.contexts))

    with ProgressBar() as progress:
        outputs = Outputs(write, progress)
        report = measure_layers(options, progress, command_line(), outputs)
        if report.interrupted:
            outputs(report)
    _print(report)
    outputs.check()
    leave(report.interrupted)


@bench.command()
def prefill(
    model: ModelArgument = None,
    random_weights: RandomWeights = None,
    prompts: Annotated[
        str | None,
        typer.Option(help="Prompts' lengths in tokens, with commas between; 16,128,512,1024,2048 if left out."),
    ] = None,
    runs: Annotated[int, typer.Option(help="Timed runs of each loop at each length; at least 5.")] = 20,
    peers: PeersOption = True,
    dtype: DtypeOption = None,
    json_file: JsonOption = None,
    markdown: MarkdownOption = None,
) -> None:
    """Measure the time to the first token after prompts: ours in the fastest mode, the reference's, transformers'. Without a
    GPU: the reference mode on a short prompt."""
    check_writable(json_file)
    check_writable(markdown, "--markdown")
    check_apart({"--json": json_file, "--markdown": markdown})
    from clusterfusion.bench import prefill as made
    from clusterfusion.bench.decode.options import check_source, has_gpu, load_model

    progress, command, on_gpu = progress_lines(), command_line(), has_gpu()

    def options_for(max_position: int | None) -> made.PrefillOptions:
        return made.prefill_options(max_position, on_gpu=on_gpu, prompts=prompts, runs=runs, peers=peers)

    options_for(check_source(model, random_weights, on_gpu, "bench prefill"))
    engine = load_model(model, random_weights, dtype)
    options = options_for(engine.config.max_position)

    def write(report: made.PrefillReport) -> None:
        write_json(
            json_file,
            made.to_json(report),
            progress,
            f", with {len(report.prompts)} of {len(options.prompts)} prompts",
        )
        if markdown is not None:
            write_whole(markdown, made.markdown(report))

    outputs = Outputs(write, progress)
    report = made.measure_prefill(engine, options, progress, command, outputs)
    if report.interrupted:
        outputs(report)
    show_report([made.heading(report)], [made.table(report)], made.lines(report), f"{made.SCOPE}. Medians over runs.")
    outputs.check()
    leave(report.interrupted)


@bench.command()
def roofline(
    gigabytes: Annotated[
        float, typer.Option("--bytes", help="Gigabytes (10^9 bytes) to read, and some fractions of it.", metavar="GB")
    ] = 4.0,
    repeats: Annotated[int, typer.Option(help="Samples of each variant at each size; at least 100.")] = 100,
    json_file: JsonOption = None,
) -> None:
    """Measure what this GPU reads from its memory: bytes a second through the kernels' ring of bulk copies, and by plain
    loads."""
    check_writable(json_file)
    from clusterfusion.bench import roofline as made

    options = made.roofline_options(gigabytes, repeats)
    progress = progress_lines()
    report = made.measure_roofline(options, progress, command_line())
    show_report([made.heading(report)], [made.table(report)], [], f"{made.SCOPE}.")
    write_json(json_file, made.to_json(report), progress)


@bench.command()
def trace(
    model: ModelArgument = None,
    random_weights: RandomWeights = None,
    context: Annotated[int | None, typer.Option(help="Tokens of the prompt; 512, or what fits, if left out.")] = None,
    steps: Annotated[
        int | None, typer.Option(help="Steps in a row after it, of which the last is recorded; 31 if left out.")
    ] = None,
    ctas: Annotated[int, typer.Option(help="CTAs in the file, evenly spread; the figures are over all.")] = 16,
    out: Annotated[
        Path | None,
        typer.Option(help="Write the timeline for ui.perfetto.dev to this file; .gz compresses it.", metavar="FILE"),
    ] = None,
) -> None:
    """Record one decode step of mode model on the GPU: when each CTA entered and left each phase of each layer, and what it
    waited for."""
    check_writable(out, "--out")
    from clusterfusion.bench.decode.options import check_source, load_model
    from clusterfusion.bench.environment import require_gpu
    from clusterfusion.bench.trace.options import require_shape, trace_options

    what = "bench trace"
    max_position = check_source(model, random_weights, on_gpu=True, what=what)
    trace_options(max_position, context=context, steps=steps, ctas=ctas)  # what can be checked before a model is loaded
    device = require_gpu(what)
    if random_weights is not None:
        require_shape(random_weights, device)
    engine = load_model(model, random_weights, None)
    options = trace_options(engine.config.max_position, context=context, steps=steps, ctas=ctas)

    from clusterfusion.bench.trace import tables
    from clusterfusion.bench.trace.chrome import file_content
    from clusterfusion.bench.trace.measure import measure_trace

    progress = progress_lines()
    report = measure_trace(engine, options, progress, command_line())
    show_report(tables.heading(report), tables.tables(report.summary), [], tables.note(report))
    if out is not None:
        write_whole(out, file_content(report.to_chrome(), out.name))
        progress(f"written to {out}")


def _print(report: LayerReport) -> None:
    from clusterfusion.bench.report import SCOPE, failures, heading, table

    note = (
        f"{SCOPE}. Medians of CUDA-event times; fused and split are launched by the host, the graphs are CUDA graphs. "
        "Where the host is slower than the GPU, as with eager peers, the time is the host's."
    )
    show_report(heading(report), [table(report)], failures(report), note)
