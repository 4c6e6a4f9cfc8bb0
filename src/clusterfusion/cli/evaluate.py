"""`clusterfusion verify`, `quality` and `perplexity`: is the output right? Beside transformers, on any device."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clusterfusion.cli.output import (
    JsonOption,
    ModelArgument,
    RandomWeights,
    check_apart,
    check_writable,
    command_line,
    leave,
    progress_lines,
    show_report,
    write_json,
)

if TYPE_CHECKING:
    from rich.table import Table

    from clusterfusion.bench.evaluation import Facts

ModeOption = Annotated[str, typer.Option(help="auto, reference, split, fused, graph or model.")]
DtypeOption = Annotated[str | None, typer.Option(help="float16, bfloat16, float32 or float64.")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.")]


def verify(
    model: ModelArgument = None,
    random_weights: RandomWeights = None,
    modes: Annotated[
        str,
        typer.Option(help="Modes with commas between, which must agree to the bit; reference sums in another order."),
    ] = "auto",
    prompts: Annotated[int, typer.Option(help="How many: varied texts, and random tokens of several lengths.")] = 16,
    tokens: Annotated[int, typer.Option(help="New tokens after each prompt.")] = 32,
    runs: Annotated[int, typer.Option(help="Decodings of each prompt in each mode, each in a session of its own.")] = 2,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    json_file: JsonOption = None,
) -> None:
    """Is decoding lossless? Our greedy tokens against transformers', and the logits of every run and mode against each
    other's bits. Exit status: 0 if every difference from transformers is a tie within rounding or ours is right, and all
    runs are equal to the bit; 3 if not; 1 for an error, 2 for a usage error, 130 if interrupted."""
    check_writable(json_file)
    from clusterfusion.bench import verify_report
    from clusterfusion.bench.evaluation import load_sides
    from clusterfusion.bench.verify import check_counts, mode_names
    from clusterfusion.bench.verify import verify as run

    progress, command = progress_lines(), command_line()
    check_counts(prompts, runs)
    at_least("tokens", tokens, 1)
    first_mode = mode_names(modes)[0]
    sides = load_sides(model, random_weights=random_weights, mode=first_mode, dtype=dtype, device=device)
    report = run(sides, progress, modes=modes, prompts=prompts, tokens=tokens, runs=runs, command=command)
    table = verify_report.table(report) if report.divergences else None
    show(report.facts, table, verify_report.lines(report), f"Rule. {report.rule}" if report.divergences else "")
    write_json(json_file, verify_report.to_json(report), progress)
    leave(report.interrupted, report.passed)


def quality(
    model: ModelArgument = None,
    random_weights: RandomWeights = None,
    text: Annotated[Path | None, typer.Option(help="A UTF-8 text; a built-in one if left out.", metavar="FILE")] = None,
    tokens: Annotated[int | None, typer.Option(help="Most tokens of the text; 256, or the model's limit.")] = None,
    mode: ModeOption = "auto",
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    json_file: JsonOption = None,
) -> None:
    """How far are the logits from float64? Ours and transformers', at every token of a text: agreement, errors and KL
    divergence, with intervals. Exit status 3 if our numbers are not finite."""
    check_writable(json_file)
    check_apart({"--text": text, "--json": json_file})
    from clusterfusion.bench import quality_report
    from clusterfusion.bench.evaluation import load_sides
    from clusterfusion.bench.quality import quality as run
    from clusterfusion.bench.texts import read_text

    progress, command = progress_lines(), command_line()
    at_least("tokens", tokens, 1)
    if text is not None:
        read_text(text)  # before a model is loaded
    sides = load_sides(model, random_weights=random_weights, mode=mode, dtype=dtype, device=device)
    random_text = random_weights is not None
    report = run(sides, progress, text_file=text, tokens=tokens, random_text=random_text, command=command)
    show(report.facts, quality_report.table(report), quality_report.lines(report), quality_report.NOTE)
    write_json(json_file, quality_report.to_json(report), progress)
    leave(report.interrupted, report.passed)


def perplexity(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A hub id (owner/name), a checkpoint folder, or 'demo'.")
    ],
    text: Annotated[Path | None, typer.Option(help="A UTF-8 text to score.", metavar="FILE")] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="A data set instead, through the package datasets: REPOSITORY[:CONFIGURATION[:SPLIT]]. Without --text: "
            "wikitext-2-raw's test split, and for demo its held-out text."
        ),
    ] = None,
    window: Annotated[int | None, typer.Option(help="Tokens of context; 1024, or the model's limit.")] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens that a window advances; half of it if left out.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of the text.")] = 4096,
    mode: ModeOption = "auto",
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    json_file: JsonOption = None,
) -> None:
    """What does a text cost? Sliding-window perplexities through decoding, prefill and transformers.
    Exit status 3 if ours are not finite."""
    check_writable(json_file)
    check_apart({"--text": text, "--json": json_file})
    from clusterfusion.bench import perplexity_report
    from clusterfusion.bench.evaluation import load_sides
    from clusterfusion.bench.perplexity import check_source
    from clusterfusion.bench.perplexity import perplexity as run
    from clusterfusion.bench.texts import read_text

    progress, command = progress_lines(), command_line()
    for name, value, least in (("window", window, 2), ("stride", stride, 1), ("max_tokens", max_tokens, 2)):
        at_least(name, value, least)
    check_source(text, dataset)
    if text is not None:
        read_text(text)  # before a model is loaded
    sides = load_sides(model, mode=mode, dtype=dtype, device=device)
    report = run(
        sides,
        progress,
        text_file=text,
        dataset=dataset,
        window=window,
        stride=stride,
        max_tokens=max_tokens,
        command=command,
    )
    show(report.facts, perplexity_report.table(report), perplexity_report.lines(report), "")
    write_json(json_file, perplexity_report.to_json(report), progress)
    leave(report.interrupted, report.passed)


def at_least(name: str, value: int | None, least: int) -> None:
    """What no model could take is refused before one is loaded. Raises ArgumentError."""
    from clusterfusion.arguments import as_int  # with torch, which --help need not wait for

    if value is not None:
        as_int(name, value, least, sys.maxsize, f"at least {least}")


def show(facts: Facts, table: Table | None, lines: Sequence[str], note: str) -> None:
    """The report on stdout: what was measured, the table, what it says, and what to know of it."""
    from clusterfusion.bench.evaluation import heading

    show_report([heading(facts)], [table] if table is not None else [], lines, note)
