"""What `bench full` and `bench decode` have both measured: the same loops in two processes, whose ratios should be the same, as far as their
sources are."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from benchmark_files import COMPILED, ResultFile, of_kind

from clusterfusion.bench.results import Point

MODE = "model"


@dataclasses.dataclass(frozen=True)
class Twice:
    """Mode `model` at one context, by a file of `bench full` and by one of `bench decode`."""

    files: tuple[ResultFile, ResultFile]
    points: tuple[Point, Point]

    @property
    def over_floor(self) -> tuple[float, float] | None:
        """Our time over the floor; None without a read ceiling."""
        first, second = (point.ours[MODE] / point.floor_ms if point.floor_ms else None for point in self.points)
        return None if first is None or second is None else (first, second)

    @property
    def over_compiled(self) -> tuple[float, float] | None:
        """torch.compile's time over ours; None where it was not measured."""
        first, second = (
            point.peers[COMPILED] / point.ours[MODE] if COMPILED in point.peers else None for point in self.points
        )
        return None if first is None or second is None else (first, second)


def measured_twice(results: Sequence[ResultFile]) -> Iterator[Twice]:
    """In the order of the files and their contexts; what has no ratio in common is left out."""
    for full in of_kind(results, "full"):
        for decode in of_kind(results, "decode"):
            if _what(full) != _what(decode):
                continue
            again = {point.context: point for point in decode.times.points if MODE in point.ours}
            for point in full.times.points:
                if MODE in point.ours and point.context in again:
                    twice = Twice((full, decode), (point, again[point.context]))
                    if twice.over_floor or twice.over_compiled:
                        yield twice


def change(ratios: tuple[float, float]) -> float:
    """From the first to the second, as a share of the first."""
    return ratios[1] / ratios[0] - 1


def _what(file: ResultFile) -> tuple[str, str, str, int]:
    """The model by its whole name, the device's name, the dtype, and how many tokens a loop makes."""
    return file.data["model"]["name"], file.origin["device"]["name"], file.times.dtype, file.data["new_tokens"]
