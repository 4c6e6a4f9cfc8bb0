"""The figures of a timeline: what a step and a layer spend their time on, how far CTAs are apart, bytes a second."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from clusterfusion.bench import costs
from clusterfusion.bench.trace.timeline import Timeline, Times
from clusterfusion.plan.trace import DEPENDENCIES, ROLES, Dependency, Phase, Role

START, STREAMING, DATA, OTHER = "start", "streaming", "wait: data", "other"


@dataclasses.dataclass(frozen=True)
class RoleTimes:
    """Mean nanoseconds of a role: over CTAs, and for a layer over layers. `parts` add up to `total_ns`."""

    total_ns: float
    parts: Mapping[str, float]

    def share(self, part: str) -> float:
        """Of the total; 0 for what is not a part of it."""
        return self.parts.get(part, 0.0) / self.total_ns if self.total_ns else 0.0


@dataclasses.dataclass(frozen=True)
class Skew:
    """How far apart CTAs give their shares of a dependency: the last one's time less the median of all, in ns. The mean over
    layers, and the most with its layer. `last_cta` is the one that was most often last, in `times_last` of `layers`.

    `hand_over_ns`: from the last share given to the median time when a CTA that was waiting for it goes on; the mean over
    the layers where some CTA waited, None if there are none, or where a CTA waits for some of the others only.
    """

    dependency: str
    layers: int
    mean_ns: float
    worst_ns: float
    worst_layer: int
    last_cta: int
    times_last: int
    hand_over_ns: float | None


@dataclasses.dataclass(frozen=True)
class Summary:
    """Of one step after `cached_tokens`. `layer` is one decoder layer on average, `head` what comes after the last one.
    `layer_ns` is a vectors' layer, to its end at the next one's beginning."""

    cached_tokens: int
    step_ns: float
    step: Mapping[Role, RoleTimes]
    layer: Mapping[Role, RoleTimes]
    head: Mapping[Role, RoleTimes]
    step_bytes: int
    layer_bytes: int
    head_bytes: int
    skews: tuple[Skew, ...]
    ghz: tuple[float, float]  # the slowest and the fastest CTA's clock
    timer_ns: int

    @property
    def step_rate(self) -> float:
        """Bytes a second over the whole step."""
        return self.step_bytes / self.step_ns * 1e9

    @property
    def layer_rate(self) -> float:
        return self.layer_bytes / self.layer["vectors"].total_ns * 1e9

    @property
    def head_rate(self) -> float:
        total = self.head["vectors"].total_ns
        return self.head_bytes / total * 1e9 if total else 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            **dataclasses.asdict(self),
            "step_bytes_per_s": self.step_rate,
            "layer_bytes_per_s": self.layer_rate,
            "head_bytes_per_s": self.head_rate,
        }


def part_name(phase: Phase) -> str:
    """What a phase counts as."""
    return {"wait": f"wait: {phase.name}", "stream": STREAMING, "work": phase.name}[phase.kind]


def summarise(timeline: Timeline, cached_tokens: int) -> Summary:
    """The figures of a step after `cached_tokens`."""
    config, layers = timeline.config, timeline.layers
    parts = {role: _parts(timeline, role) for role in ROLES}
    totals = {role: np.nan_to_num(np.subtract(*reversed(timeline.bounds(role)))) for role in ROLES}
    embedding_row = config.hidden_size * costs.ELEMENT_BYTES
    head_bytes = costs.whole_step_weight_bytes(config) - costs.weight_bytes(config) - embedding_row
    return Summary(
        cached_tokens=cached_tokens,
        step_ns=timeline.step_ns,
        step={role: _whole_step(timeline, role, parts[role]) for role in ROLES},
        layer={
            role: _mean(totals[role][:, :layers], {k: v[:, :layers] for k, v in parts[role].items()}) for role in ROLES
        },
        head={
            role: _mean(totals[role][:, layers:], {k: v[:, layers:] for k, v in parts[role].items()}) for role in ROLES
        },
        step_bytes=costs.whole_step_weight_bytes(config) + costs.kv_bytes(config, cached_tokens),
        layer_bytes=costs.step_bytes(config, cached_tokens) // layers,
        head_bytes=head_bytes,
        skews=tuple(skew for of in DEPENDENCIES if (skew := _skew(timeline, of))),
        ghz=(float(timeline.ghz.min()), float(timeline.ghz.max())),
        timer_ns=timeline.timer_ns,
    )


def _parts(timeline: Timeline, role: Role) -> dict[str, Times]:
    """Nanoseconds by part, [CTAs, layers + 1] each, but for what has no name."""
    parts: dict[str, Times] = {}
    for phase in timeline.phases:
        if phase.role == role:
            name = part_name(phase)
            parts[name] = parts.get(name, 0.0) + np.nan_to_num(timeline.took(phase))
    if role == "tiles":
        parts = {STREAMING: parts.pop(STREAMING) - timeline.data_waited, DATA: timeline.data_waited, **parts}
    return parts


def _mean(totals: Times, parts: Mapping[str, Times]) -> RoleTimes:
    total = float(totals.mean())
    means = {name: float(values.mean()) for name, values in parts.items()}
    return RoleTimes(total, means | {OTHER: total - sum(means.values())})


def _whole_step(timeline: Timeline, role: Role, parts: Mapping[str, Times]) -> RoleTimes:
    """From a CTA's start to its end; START is what comes before the role's first event: the launch, and waiting for the step
    before this one."""
    begin, _ = timeline.bounds(role)
    whole = {START: begin[:, 0] - timeline.start} | {name: values.sum(axis=1) for name, values in parts.items()}
    return _mean(timeline.end - timeline.start, whole)


def _skew(timeline: Timeline, of: Dependency) -> Skew | None:
    """None if nobody gives such a share, as in a model without layers that do."""
    layers = timeline.layers
    later = int(of.of_next_layer)
    given = timeline.at(of.given)[:, :layers]
    waits, begins = (timeline.at(event)[:, later : layers + later] for event in (of.wait, of.begin))
    seen = [layer for layer in range(layers) if not np.isnan(given[:, layer]).all()]
    if not seen:
        return None
    given, waits, begins = given[:, seen], waits[:, seen], begins[:, seen]
    last = np.nanmax(given, axis=0)
    apart = last - np.nanmedian(given, axis=0)
    late = np.bincount(np.nanargmax(given, axis=0), minlength=timeline.ctas)
    waiting = waits < last  # NaN, who does not wait at all, is not
    hand_overs = [float(np.median(begins[waiting[:, i], i]) - last[i]) for i in range(len(seen)) if waiting[:, i].any()]
    worst = int(apart.argmax())
    return Skew(
        dependency=of.name,
        layers=len(seen),
        mean_ns=float(apart.mean()),
        worst_ns=float(apart[worst]),
        worst_layer=seen[worst],
        last_cta=int(late.argmax()),
        times_last=int(late.max()),
        hand_over_ns=float(np.mean(hand_overs)) if hand_overs and not of.of_own_head else None,
    )
