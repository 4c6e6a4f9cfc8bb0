"""Times of repeated work: taken in turn over candidates, so that drifting clocks hit all alike; then summarised."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from clusterfusion.errors import ArgumentError

ROUNDS = 5


@dataclasses.dataclass(frozen=True)
class Summary:
    """Of one candidate's times, in milliseconds."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    samples: int


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Work to be timed. `prepare` comes before every sample and is not timed. `may_fail`: an exception ends this
    candidate's samples and is reported, instead of ending the run."""

    name: str
    prepare: Callable[[], None]
    run: Callable[[], object]
    samples: int
    may_fail: bool = False


@dataclasses.dataclass(frozen=True)
class Timing:
    """What came of a candidate: its times in ms, or the error that ended them, in one line."""

    times_ms: tuple[float, ...]
    error: str | None = None


def percentile(values: Sequence[float], percent: float) -> float:
    """The percentile of `values` with linear interpolation between neighbours, as NumPy's default has it."""
    if not values:
        raise ArgumentError("values is empty; a percentile needs at least one")
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def summarise(times_ms: Sequence[float]) -> Summary:
    return Summary(percentile(times_ms, 50), percentile(times_ms, 10), percentile(times_ms, 90), len(times_ms))


def least_squares_slope(points: Sequence[tuple[float, float]]) -> float:
    """The slope of the line through (x, y) `points` with the smallest squared errors in y. Raises ArgumentError without
    two different x."""
    mean_x = sum(x for x, _ in points) / max(len(points), 1)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    if not spread:
        raise ArgumentError(f"points is {points!r}; a slope needs two different x")
    return sum((x - mean_x) * y for x, y in points) / spread


def round_robin(
    candidates: Sequence[Candidate],
    sample: Callable[[Candidate, int], Sequence[float]],
    rounds: int = ROUNDS,
) -> dict[str, Timing]:
    """Times of every candidate by name. `sample(candidate, count)` takes `count` samples, in ms.

    Every round visits every candidate for its share of its samples.
    """
    times: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    errors: dict[str, str] = {}
    for turn in range(rounds):
        for candidate in candidates:
            count = candidate.samples * (turn + 1) // rounds - candidate.samples * turn // rounds
            if candidate.name in errors or count == 0:
                continue
            try:
                times[candidate.name] += sample(candidate, count)
            except Exception as error:
                if not candidate.may_fail:
                    raise
                errors[candidate.name] = one_line(error)
    return {name: Timing(() if name in errors else tuple(taken), errors.get(name)) for name, taken in times.items()}


def one_line(error: BaseException, most: int = 300) -> str:
    """An exception as one line: its type and the first line of its message that says anything."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= most else text[: most - 1] + "…"
