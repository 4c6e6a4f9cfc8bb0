"""The clock and the power of a GPU while loops are timed. A GPU that reads at its memory's speed can be at its power limit; the driver then
lowers the clock, and a time says less without it."""

from __future__ import annotations

import dataclasses
import statistics
import threading
import time
from collections.abc import Callable, Sequence

import torch

from clusterfusion.bench.samples import one_line

PERIOD_S = 0.05
Span = tuple[float, float]  # of time.perf_counter
Look = Callable[[], tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Clocks:
    """Of the SMs, in MHz: median, lowest and highest; the median of the driver's power, an average over its last second or so, in W."""

    sm_mhz: float
    lowest_sm_mhz: float
    highest_sm_mhz: float
    watts: float
    samples: int


class ClockSampler:
    """As a context, once: looks at a GPU every PERIOD_S in a thread of its own. Where it cannot, `obstacle` says why, and nothing was seen."""

    def __init__(self, device: torch.device, look: Look | None = None) -> None:
        self._look = look or (lambda: _look(device))
        self._samples: list[tuple[float, float, float]] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.obstacle: str | None = None
        if look is None and device.type != "cuda":
            self.obstacle = "there is no GPU to look at"

    def __enter__(self) -> ClockSampler:
        if self.obstacle is None:
            self._sample()
        if self.obstacle is None:
            self._thread = threading.Thread(target=self._run, name="clock sampler", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def during(self, spans: Sequence[Span]) -> Clocks | None:
        """What was seen in any of these spans of time; None if nobody looked, or a look failed."""
        if self.obstacle is not None:
            return None
        seen = [sample for sample in self._samples if any(begin <= sample[0] <= end for begin, end in spans)]
        if not seen:
            return None
        clocks = [mhz for _, mhz, _ in seen]
        return Clocks(
            sm_mhz=statistics.median(clocks),
            lowest_sm_mhz=min(clocks),
            highest_sm_mhz=max(clocks),
            watts=statistics.median(watts for *_, watts in seen),
            samples=len(seen),
        )

    def _run(self) -> None:
        while self.obstacle is None and not self._stop.wait(PERIOD_S):
            self._sample()

    def _sample(self) -> None:
        try:
            mhz, watts = self._look()
        except Exception as error:  # NVML's are a class of a package that need not be there
            self.obstacle = one_line(error) + ("; the extra clocks has it" if isinstance(error, ImportError) else "")
        else:
            self._samples.append((time.perf_counter(), mhz, watts))


def _look(device: torch.device) -> tuple[float, float]:
    return float(torch.cuda.clock_rate(device)), torch.cuda.power_draw(device) / 1e3
