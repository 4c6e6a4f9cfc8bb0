"""A timeline in the trace event format of Chrome, which ui.perfetto.dev and about:tracing open.

A process is a role, a thread a CTA. A layer is a slice, and what the role did in it are slices inside that one.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from clusterfusion.bench.trace.summary import part_name
from clusterfusion.bench.trace.timeline import Timeline, Times
from clusterfusion.errors import ArgumentError
from clusterfusion.plan.trace import ROLES, Phase, Role

_PROCESS = {role: number for number, role in enumerate(ROLES, start=1)}


def chrome_trace(
    timeline: Timeline, ctas: Sequence[int] | None = None, about: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The trace as JSON values, of `ctas` alone if they are given; `about` is what the file says of itself.

    Times are in us from the first CTA's start, whole nanoseconds all. Raises ArgumentError for a CTA that there is not.
    """
    chosen = range(timeline.ctas) if ctas is None else sorted(set(ctas))
    for cta in chosen:
        if not 0 <= cta < timeline.ctas:
            raise ArgumentError(f"ctas holds {cta}; it must hold CTAs from 0 to {timeline.ctas - 1}")
    events = []
    for role in ROLES:
        events += [_name("process_name", role, 0, role)]
        events += [_name("thread_name", role, cta, f"CTA {cta}") for cta in chosen]
        events += _slices(timeline, role, chosen)
    return {"displayTimeUnit": "ns", "otherData": about or {}, "traceEvents": events}


def spread(count: int, ctas: int) -> list[int]:
    """So many of the CTAs, as far from one another as can be."""
    return [index * ctas // count for index in range(count)] if count < ctas else list(range(ctas))


def file_content(trace: dict[str, Any], name: str) -> str | bytes:
    """What to write into a file of this name: text, or with .gz at the end gzip of it."""
    text = json.dumps(trace, separators=(",", ":"), allow_nan=False) + "\n"
    return gzip.compress(text.encode(), mtime=0) if name.endswith(".gz") else text


def _slices(timeline: Timeline, role: Role, ctas: Sequence[int]) -> Iterator[dict[str, Any]]:
    begins, ends = timeline.bounds(role)
    phases = [phase for phase in timeline.phases if phase.role == role]
    times = [(timeline.at(phase.begin), timeline.at(phase.end)) for phase in phases]
    for cta in ctas:
        for layer in range(timeline.layers + 1):
            name = f"layer {layer}" if layer < timeline.layers else "lm_head"
            args = {"data_waited_us": _microseconds(timeline.data_waited[cta, layer])} if role == "tiles" else {}
            yield from _slice(role, cta, layer, name, "layer", (begins, ends), args)
            for phase, bounds in zip(phases, times, strict=True):
                yield from _slice(role, cta, layer, _phase_name(phase), phase.kind, bounds)


def _slice(
    role: Role,
    cta: int,
    layer: int,
    name: str,
    kind: str,
    bounds: tuple[Times, Times],
    args: dict[str, Any] | None = None,
) -> Iterator[dict[str, Any]]:
    """One complete event, or none for what was not passed or took no nanosecond."""
    begin, end = (bound[cta, layer] for bound in bounds)
    if np.isnan(begin) or np.isnan(end) or round(end) <= round(begin):
        return
    event = {"name": name, "cat": kind, "ph": "X", "pid": _PROCESS[role], "tid": cta}
    event |= {"ts": _microseconds(begin), "dur": (round(end) - round(begin)) / 1000}
    yield event | ({"args": args} if args else {})


def _name(kind: str, role: Role, cta: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": _PROCESS[role], "tid": cta, "args": {"name": name}}


def _phase_name(phase: Phase) -> str:
    return phase.name if phase.kind == "stream" else part_name(phase)


def _microseconds(nanoseconds: float) -> float:
    return round(nanoseconds) / 1000
