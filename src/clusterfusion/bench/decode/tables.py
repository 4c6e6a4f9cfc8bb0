"""The results of `bench decode` for readers: a table for the terminal, the same in Markdown, and lines around it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from clusterfusion.bench.decode.peers import EAGER, EAGER_RUNS
from clusterfusion.bench.decode.report import SCOPE, ContextTimes, DecodeReport, LoopTimes, speedups
from clusterfusion.bench.samples import summarise

if TYPE_CHECKING:
    from rich.table import Table

_COLUMNS = (
    "context",
    "loop",
    "ms/token",
    "p10",
    "p90",
    "tokens/s",
    "x floor",
    "GB/s",
    "MHz",
    "first ms",
    "peak GB",
    "same",
)
_TEXT = 2  # columns from here on are numbers
NOTE = (
    f"{SCOPE}. Medians over runs; x floor: over the time that reading a step's weights and mean keys and values takes at the "
    "read ceiling; MHz: the SMs' clock; same: tokens that are our first mode's before the first difference (rounding decides near-ties)."
)


def heading(report: DecodeReport) -> list[str]:
    """Lines above the table: what was decoded, on what, and the read ceiling."""
    model, options, read = report.model, report.options, report.read
    fewer = f" ({EAGER}: {EAGER_RUNS})" if options.peer_contexts and options.runs > EAGER_RUNS else ""
    lines = [
        f"{model.name}, {model.dtype}, batch 1, {options.new_tokens} new tokens, {options.runs} runs{fewer}, on "
        f"{report.origin.device['name']}"
    ]
    if read:
        lines.append(str(read))
    lines.append(
        f"weights of a step {report.weight_bytes / 1e9:.3f} GB with the LM head; K/V {report.kv_bytes_a_token / 1e6:.3f} MB "
        "a cached token"
    )
    return lines


def rows(report: DecodeReport) -> Iterator[tuple[str, ...]]:
    """Cells in the order of the columns: at every context the floor, our modes, the peers."""
    for times in report.contexts:
        floor, read = report.floor_ms(times.context), report.read
        context = str(times.context)
        if floor and read:
            yield (
                context,
                "floor",
                f"{floor:.3f}",
                "",
                "",
                f"{1e3 / floor:.1f}",
                "1.000",
                f"{read.ceiling / 1e9:.0f}",
                "",
                "",
                "",
                "",
            )
            context = ""
        for name, loop in times.loops.items():
            yield (context, name, *_cells(report, times, loop))
            context = ""


def _cells(report: DecodeReport, times: ContextTimes, loop: LoopTimes) -> tuple[str, ...]:
    if not loop.ms_per_token:
        return ("failed", *[""] * (len(_COLUMNS) - _TEXT - 1))
    summary = loop.summary
    ratio = report.ratio(times.context, summary.median_ms)
    speed = report.step_bytes(times.context) / summary.median_ms / 1e6
    return (
        *(f"{ms:.3f}" for ms in (summary.median_ms, summary.p10_ms, summary.p90_ms)),
        f"{1e3 / summary.median_ms:.1f}",
        "" if ratio is None else f"{ratio:.3f}",
        f"{speed:.0f}" if speed >= 10 else f"{speed:.2f}",
        "" if loop.clocks is None else f"{loop.clocks.sm_mhz:.0f}",
        f"{summarise(loop.first_token_ms).median_ms:.1f}",
        "" if loop.peak_bytes is None else f"{loop.peak_bytes / 1e9:.2f}",
        "" if loop.same_tokens is None else str(loop.same_tokens),
    )


def table(report: DecodeReport) -> Table:
    from rich.table import Table

    made = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1))
    for index, name in enumerate(_COLUMNS):
        made.add_column(name, justify="left" if index == 1 else "right", no_wrap=True)
    for cells in rows(report):
        made.add_row(*cells, style="dim" if cells[1] == "floor" else None)
    return made


def lines(report: DecodeReport) -> list[str]:
    """What the table says, below it: slopes, peers, what is missing, what failed."""
    said = []
    for mode in report.contexts[0].modes if report.contexts else ():
        slope, relative = report.slope(mode), report.relative_slope(mode)
        if slope is not None and report.read:  # without a GPU it is noise
            over = "" if relative is None else f", {relative:.3f} of the time that reading its keys and values takes"
            said.append(f"slope of {mode}: {slope * 1e6:.1f} ns more for each cached token{over}")
    for times in report.contexts:
        best = min(times.modes, key=lambda mode: times.modes[mode].summary.median_ms)
        compared = ", ".join(f"{ratio:.2f}x as fast as {name}" for name, ratio in speedups(times, best).items())
        if compared:
            said.append(f"context {times.context}: {best} is {compared}")
        said += _first_token(times, best)
    said += [f"mode {name} left out: {reason}" for name, reason in report.left_out.items()]
    said += [f"missing: {what}" for what in report.missing]
    said += _failures(report)
    said += [f"FAILED: {difference}" for difference in report.differences]
    if report.interrupted:
        said.append(f"interrupted after {len(report.contexts)} of {len(report.options.contexts)} contexts")
    return said


def _first_token(times: ContextTimes, mode: str) -> list[str]:
    """How `mode`'s time to the first token compares with what transformers' users wait for; nothing without that."""
    eager = times.peers.get(EAGER)
    if eager is None or not eager.first_token_ms:
        return []
    ours, theirs = (summarise(loop.first_token_ms).median_ms for loop in (times.modes[mode], eager))
    return [
        f"context {times.context}: first token after {ours:.1f} ms, {ours / theirs:.2f} of {EAGER}'s {theirs:.1f} ms"
    ]


def _failures(report: DecodeReport) -> list[str]:
    """A line for every error of a peer, with the contexts that it came at."""
    contexts: dict[tuple[str, str], list[str]] = {}
    for times in report.contexts:
        for name, loop in times.peers.items():
            if loop.error is not None:
                contexts.setdefault((name, loop.error), []).append(str(times.context))
    return [f"{name} failed at context {', '.join(at)}: {error}" for (name, error), at in contexts.items()]


def markdown(report: DecodeReport, more_lines: Sequence[str] = ()) -> str:
    """Heading, table and lines as Markdown, `more_lines` after the lines."""
    align = ["---" if index == 1 else "---:" for index in range(len(_COLUMNS))]
    table_rows = [_COLUMNS, tuple(align), *rows(report)]
    table_lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in table_rows]
    items = [f"- {line}" for line in (*lines(report), *more_lines)]
    facts = [f"{line}  " for line in heading(report)[:-1]] + heading(report)[-1:]
    made = [*facts, "", *table_lines, "", *items, *([""] if items else []), NOTE, "", f"`{report.origin.command}`"]
    return "\n".join(made) + "\n"
