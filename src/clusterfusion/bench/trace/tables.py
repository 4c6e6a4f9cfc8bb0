"""The summary of a recorded step for readers: lines, where the time goes, how far CTAs are apart."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from clusterfusion.bench.trace.measure import TraceReport
from clusterfusion.bench.trace.summary import RoleTimes, Summary
from clusterfusion.plan.trace import ROLES

if TYPE_CHECKING:
    from rich.table import Table

_TIMES = ("role", "time", "layer us", "%", "LM head us", "%", "step us", "%")
_SKEWS = ("given by all CTAs", "skew us", "worst us", "in layer", "last most often", "hand-over us")
_SEQUENTIAL = "With sequential residual, streaming of up and 'middle' include the wait for the middle residual, which has no events."


def heading(report: TraceReport) -> list[str]:
    """What was recorded on what, and the bytes a second."""
    summary, timeline = report.summary, report.timeline
    slowest, fastest = summary.ghz
    layer_us = summary.layer["vectors"].total_ns / 1e3
    head_us = summary.head["vectors"].total_ns / 1e3
    return [
        f"{report.name}, {report.dtype}, mode model, one step after {summary.cached_tokens} cached tokens, on "
        f"{report.origin.device['name']}: {timeline.ctas} CTAs, {timeline.layers} layers",
        f"step {summary.step_ns / 1e3:.1f} us, {summary.step_rate / 1e12:.3f} TB/s; "
        f"layer {layer_us:.2f} us, {summary.layer_rate / 1e12:.3f} TB/s; "
        f"LM head {head_us:.2f} us, {summary.head_rate / 1e12:.3f} TB/s",
        f"SM clocks {slowest:.3f} to {fastest:.3f} GHz; the global timer moved in steps of {summary.timer_ns} ns: times of "
        "different CTAs compare no finer",
    ]


def note(report: TraceReport) -> str:
    """What the tables' words mean."""
    text = (
        "Means over CTAs, and over layers; the recording itself costs some time. tiles: the first warp of those that stream "
        "weights; its waits end when the CTA's vectors are ready, so 'residual' holds the norm. vectors: the warps that norm, "
        "attend and publish; load: activations into shared memory; sums: until the CTA's tiles are summed, and publishing. "
        "start: launch, and the wait for the step before. skew: last less median CTA to give its share; hand-over: from then "
        "until a CTA that waited goes on, the median."
    )
    return text if report.timeline.config.parallel_residual else f"{text} {_SEQUENTIAL}"


def time_rows(summary: Summary) -> Iterator[tuple[str, ...]]:
    """Cells: for each role its total, then its parts."""
    for role in ROLES:
        columns = (summary.layer[role], summary.head[role], summary.step[role])
        yield (role, "all", *(cell for times in columns for cell in (f"{times.total_ns / 1e3:.2f}", "")))
        for part in summary.step[role].parts:
            yield ("", part, *(cell for times in columns for cell in _cells(times, part)))


def skew_rows(summary: Summary) -> Iterator[tuple[str, ...]]:
    """Cells: a dependency each."""
    for skew in summary.skews:
        yield (
            skew.dependency,
            f"{skew.mean_ns / 1e3:.2f}",
            f"{skew.worst_ns / 1e3:.2f}",
            str(skew.worst_layer),
            f"CTA {skew.last_cta}, {skew.times_last} of {skew.layers}",
            "" if skew.hand_over_ns is None else f"{skew.hand_over_ns / 1e3:.2f}",
        )


def tables(summary: Summary) -> list[Table]:
    """Where the time goes, and how far CTAs are apart."""
    return [
        _table(_TIMES, 2, time_rows(summary)),
        _table(_SKEWS, 1, skew_rows(summary)),
    ]


def _cells(times: RoleTimes, part: str) -> tuple[str, str]:
    if part not in times.parts:
        return "", ""
    return f"{times.parts[part] / 1e3:.2f}", f"{100 * times.share(part):.1f}"


def _table(columns: tuple[str, ...], texts: int, rows: Iterator[tuple[str, ...]]) -> Table:
    """The first `texts` columns are text, the others numbers."""
    from rich.table import Table

    made = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1))
    for index, name in enumerate(columns):
        made.add_column(name, justify="left" if index < texts else "right", no_wrap=True)
    for row in rows:
        made.add_row(*row)
    return made
