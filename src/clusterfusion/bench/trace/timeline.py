"""A step's record (plan/trace.py) on one time axis: when each CTA passed each event of each layer.

Clocks of different SMs have nothing in common. Each CTA's are put on the axis of the GPU's global timer by the straight line
through its two pairs of clock and nanoseconds. That timer moves in steps of about 32 ns to 1 us, depending on the GPU:
durations within a CTA are as good as its clock, but for the rate; times of different CTAs compare to one such step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from clusterfusion.architecture import DecoderConfig
from clusterfusion.errors import ArgumentError, ClusterFusionError
from clusterfusion.plan import BlockPlan
from clusterfusion.plan import trace as layout
from clusterfusion.plan.block import Order
from clusterfusion.plan.trace import Phase, Role

Times = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Timeline:
    """Nanoseconds since the first CTA's start. `times` is [CTAs, layers + 1, TIMES], NaN where a CTA did not pass;
    `data_waited`, durations, [CTAs, layers + 1]; `start`, `end` and `ghz`, the rate of the CTA's clock, [CTAs].

    `timer_ns` is the greatest step that all readings of the global timer are multiples of; 0 if they were all the same.
    """

    config: DecoderConfig
    order: Order
    times: Times
    data_waited: Times
    start: Times
    end: Times
    ghz: Times
    timer_ns: int

    @property
    def ctas(self) -> int:
        return len(self.start)

    @property
    def layers(self) -> int:
        return self.config.num_layers

    @property
    def step_ns(self) -> float:
        """From the first CTA's start to the last one's end."""
        return float(self.end.max() - self.start.min())

    @property
    def phases(self) -> tuple[Phase, ...]:
        return layout.phases(self.order)

    def at(self, event: str) -> Times:
        """[CTAs, layers + 1]."""
        return self.times[:, :, layout.TIMES.index(event)]

    def took(self, phase: Phase) -> Times:
        """[CTAs, layers + 1]; NaN where a CTA did not go through it."""
        return self.at(phase.end) - self.at(phase.begin)

    def bounds(self, role: Role) -> tuple[Times, Times]:
        """When a role began and ended each layer, [CTAs, layers + 1] each: from its first event to its first event of the
        next, and at last to the CTA's end. The part after the layers is NaN if the role has no event there; then its last
        layer ends with its last event."""
        events = self.times[:, :, [layout.TIMES.index(event) for event in layout.passed(role, self.order)]]
        begin = np.fmin.reduce(events, axis=2)
        end = np.concatenate([begin[:, 1:], self.end[:, None]], axis=1)
        idle = np.isnan(begin[:, -1])
        end[idle, -1] = np.nan
        end[idle, -2] = np.fmax.reduce(events[:, -2], axis=1)[idle]
        return begin, end


def read_record(words: NDArray[np.int64] | Sequence[int], plan: BlockPlan) -> Timeline:
    """The timeline of the record of a step that ran by `plan`.

    Raises ArgumentError if `words` are not as many as such a record has, ClusterFusionError with the CTA, the layer and the
    event if no step can have written them.
    """
    values = np.asarray(words)
    wanted = layout.trace_words(plan)
    if values.shape != (wanted,) or values.dtype != np.int64:
        raise ArgumentError(
            f"words is {values.dtype} {list(values.shape)}; the record of a step on {plan.ctas} CTAs with "
            f"{plan.config.num_layers} layers is int64 [{wanted}]"
        )
    shape = layout.trace_shape(plan)
    events, clocks = np.split(values, [int(np.prod(shape))])
    events = events.reshape(shape)
    clock_at_start, ns_at_start, clock_at_end, ns_at_end = clocks.reshape(plan.ctas, len(layout.CLOCKS)).T
    _check_clocks(events, clock_at_start, ns_at_start, clock_at_end, ns_at_end)
    passed, data_waited = events[:, :, : len(layout.TIMES)], events[:, :, layout.EVENTS.index(layout.DATA_WAITED)]
    for role in layout.ROLES:
        _check_order(passed, clock_at_start, role, plan.order)

    first = ns_at_start.min()
    clock_ns = (ns_at_end - ns_at_start) / (clock_at_end - clock_at_start)
    start = (ns_at_start - first).astype(np.float64)
    # Differences of int64 first: clocks are too large for a float64 to keep their nanoseconds.
    times = start[:, None, None] + (passed - clock_at_start[:, None, None]) * clock_ns[:, None, None]
    times[passed == 0] = np.nan
    last = np.fmax.reduce(
        times, axis=(1, 2)
    )  # tiles may say that they are done after thread 0 has read the end's clock
    timeline = Timeline(
        config=plan.config,
        order=plan.order,
        times=times,
        data_waited=data_waited * clock_ns[:, None],
        start=start,
        end=np.fmax(ns_at_end - first, last),
        ghz=1 / clock_ns,
        timer_ns=int(np.gcd.reduce(np.concatenate([ns_at_start, ns_at_end]) - first)),
    )
    _check_data_waited(timeline)
    return timeline


# -- what no step can have written -------------------------------------------------------------------------------------


def _check_clocks(
    events: NDArray[np.int64],
    clock_at_start: NDArray[np.int64],
    ns_at_start: NDArray[np.int64],
    clock_at_end: NDArray[np.int64],
    ns_at_end: NDArray[np.int64],
) -> None:
    if not events.any():
        raise ClusterFusionError("the record is empty: no step has run with it, or none that records")
    bad = (clock_at_start <= 0) | (ns_at_start <= 0) | (clock_at_end <= clock_at_start) | (ns_at_end <= ns_at_start)
    if bad.any():
        cta = int(bad.argmax())
        raise _impossible(
            f"CTA {cta} ran from clock {clock_at_start[cta]} to {clock_at_end[cta]}, and from {ns_at_start[cta]} ns to "
            f"{ns_at_end[cta]} ns"
        )


def _check_order(passed: NDArray[np.int64], clock_at_start: NDArray[np.int64], role: Role, order: Order) -> None:
    """Each layer has an event of the role, the part after the layers maybe; none comes before one that it follows."""
    names = layout.passed(role, order)
    ctas, parts, _ = passed.shape
    of_role = passed[:, :, [layout.TIMES.index(name) for name in names]]
    silent = ~of_role[:, :-1].any(axis=2)
    if silent.any():
        cta, layer = np.argwhere(silent)[0]
        raise _impossible(f"the {role} of CTA {cta} have no event in layer {layer}")
    row = np.concatenate([clock_at_start[:, None], of_role.reshape(ctas, -1)], axis=1)
    early = (row != 0) & (row < np.maximum.accumulate(row, axis=1))
    if early.any():
        cta, index = np.argwhere(early)[0]
        layer, event = divmod(int(index) - 1, len(names))
        raise _impossible(f"{names[event]} of CTA {cta} in layer {layer} of {parts - 1} comes before an earlier event")


def _check_data_waited(timeline: Timeline) -> None:
    """A wait for data is part of streaming; half a nanosecond is rounding."""
    streams = [phase for phase in timeline.phases if phase.kind == "stream"]
    most = np.nansum([timeline.took(phase) for phase in streams], axis=0)
    bad = (timeline.data_waited < 0) | (timeline.data_waited > most + 0.5)
    if bad.any():
        cta, layer = np.argwhere(bad)[0]
        raise _impossible(
            f"CTA {cta} waited {timeline.data_waited[cta, layer]:.0f} ns for data in layer {layer}, where it streamed for "
            f"{most[cta, layer]:.0f} ns"
        )


def _impossible(what: str) -> ClusterFusionError:
    return ClusterFusionError(
        f"the record is not one of a step: {what}; the program's events must be those of plan/trace.py, in that order"
    )
