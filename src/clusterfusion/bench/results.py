"""What plots and pages read of result files: the times of `bench layer`, `bench decode` and `bench full`, alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

TIMED = ("full", "decode", "layer")
UNITS = {"full": "ms a token", "decode": "ms a token", "layer": "ms a step of the layers"}


@dataclasses.dataclass(frozen=True)
class Point:
    """Median milliseconds at one context, by name, and those that reading the bytes takes; None without a read ceiling.
    Peers that failed are not in it."""

    context: int
    floor_ms: float | None
    ours: Mapping[str, float]
    peers: Mapping[str, float]

    @property
    def times(self) -> dict[str, float]:
        """Of all, peers first."""
        return {**self.peers, **self.ours}


@dataclasses.dataclass(frozen=True)
class Times:
    """What one result file holds. `model` is the shape's or checkpoint's name."""

    benchmark: str
    model: str
    dtype: str
    device: str
    points: tuple[Point, ...]

    @property
    def names(self) -> list[str]:
        """Of everything that was timed at some context, peers first, ours from the slowest form to the fastest one."""
        found = {name for point in self.points for name in point.times}
        known = [name for name in _ORDER if name in found]
        return known + sorted(found - set(known))

    def peers(self) -> Iterator[str]:
        return (name for name in self.names if any(name in point.peers for point in self.points))

    def ours(self) -> Iterator[str]:
        return (name for name in self.names if any(name in point.ours for point in self.points))


_ORDER = (
    "transformers eager",
    "transformers CUDA graph",
    "transformers compile",
    "reference",
    "split",
    "split graph",
    "fused",
    "graph",
    "model",
)


def times_of(result: Mapping[str, Any]) -> Times:
    """The times of a result's JSON values, whose "benchmark" is in TIMED. Raises KeyError for what is no such result."""
    model, ours = result["model"], "forms" if result["benchmark"] == "layer" else "modes"
    return Times(
        benchmark=result["benchmark"],
        model=str(model.get("shape") or model["name"]).removesuffix(" (random weights)"),
        dtype=model["dtype"],
        device=result["device"]["name"],
        points=tuple(
            Point(
                context=point["context"],
                floor_ms=point["floor_ms"],
                ours=_medians(point[ours]),
                peers=_medians(point["peers"]),
            )
            for point in result["contexts"]
        ),
    )


def _medians(loops: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    return {name: loop["median_ms"] for name, loop in loops.items() if loop.get("median_ms") is not None}
