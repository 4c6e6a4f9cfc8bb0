"""`bench roofline`: bytes a second that this GPU reads, in both ways of reading and at several sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from clusterfusion.arguments import as_float, as_int
from clusterfusion.bench.device_timer import DeviceTimer
from clusterfusion.bench.environment import Origin, origin, require_gpu
from clusterfusion.bench.options import FEWEST_REPEATS, MOST_REPEATS
from clusterfusion.bench.read_ceiling import LEAD_BYTES, ReadCeiling, ReadSpeeds
from clusterfusion.bench.samples import Candidate, round_robin, summarise
from clusterfusion.engine.memory import require_memory
from clusterfusion.errors import ArgumentError
from clusterfusion.jit.read_ceiling import ALIGNMENT, VARIANTS

if TYPE_CHECKING:
    from rich.table import Table

FORMAT = 1  # of the JSON; grows when a field changes its meaning or goes away
DEFAULT_GIGABYTES = 4.0
LEAST_GIGABYTES, MOST_GIGABYTES = 1.0, 1000.0
PARTS = (16, 8, 4, 2, 1)  # the data is read in these fractions: what short streams lose to launch and tail
SCOPE = (
    "random data read once from device memory by one launch, nothing of it in the L2 cache before; 'bulk copies' through a "
    "ring in shared memory as the decoder kernels read, 'loads' plainly"
)


@dataclasses.dataclass(frozen=True)
class RooflineOptions:
    """Checked by `roofline_options`."""

    num_bytes: int
    repeats: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bytes to read, the shortest first."""
        return tuple(self.num_bytes // part // ALIGNMENT * ALIGNMENT for part in PARTS)


def roofline_options(gigabytes: float = DEFAULT_GIGABYTES, repeats: int = FEWEST_REPEATS) -> RooflineOptions:
    """Raises ArgumentError naming the option, its value and what is needed."""
    needed = f"a number of gigabytes from {LEAST_GIGABYTES:g} to {MOST_GIGABYTES:g}"
    value = as_float("bytes", gigabytes, needed)
    if not LEAST_GIGABYTES <= value <= MOST_GIGABYTES:
        raise ArgumentError(f"bytes is {value:g}; it must be {needed}")
    return RooflineOptions(int(value * 1e9), as_int("repeats", repeats, FEWEST_REPEATS, MOST_REPEATS))


@dataclasses.dataclass(frozen=True)
class RooflineReport:
    """One run; `reads` at growing sizes."""

    origin: Origin
    reads: tuple[ReadSpeeds, ...]


def measure_roofline(options: RooflineOptions, progress: Callable[[str], None], command: str = "") -> RooflineReport:
    """Check that both kernels read everything, then time them at all sizes in turn, on the current GPU.

    Raises DeviceError without a GPU that runs the kernels, or without the memory; ClusterFusionError when a kernel does
    not read what it should.
    """
    device = require_gpu("bench roofline")
    require_memory("bench roofline", options.num_bytes + LEAD_BYTES, device)
    progress(f"{options.num_bytes / 1e9:.1f} GB of random data")
    ceiling = ReadCeiling(options.sizes[-1], device)
    candidates: dict[tuple[int, str], Candidate] = {}
    for size in options.sizes:
        ceiling.check(size)
        for candidate in ceiling.candidates(options.repeats, size):
            candidates[size, candidate.name] = dataclasses.replace(candidate, name=f"{candidate.name} of {size}")
    progress("every word is read: XOR of both variants equals PyTorch's, at every size; measuring")
    timings = round_robin(list(candidates.values()), DeviceTimer(ceiling.lead))
    return RooflineReport(
        origin(command, device),
        tuple(
            ReadSpeeds(size, {name: summarise(timings[candidates[size, name].name].times_ms) for name in VARIANTS})
            for size in options.sizes
        ),
    )


def to_json(report: RooflineReport) -> dict[str, Any]:
    """The report as JSON values. Times in ms, sizes in bytes; the ceiling is that of the longest read."""
    return {
        "benchmark": "roofline",
        "format": FORMAT,
        "scope": SCOPE,
        **dataclasses.asdict(report.origin),
        "bytes_per_s": report.reads[-1].ceiling,
        "reads": [read.to_json() for read in report.reads],
    }


def heading(report: RooflineReport) -> str:
    longest = report.reads[-1]
    speeds = ", ".join(f"{name} {longest.speed(name) / 1e12:.3f} TB/s" for name in longest.times)
    return f"{report.origin.device['name']}: {speeds}, by the median time of {longest.num_bytes / 1e9:.2f} GB"


def table(report: RooflineReport) -> Table:
    """A row for every variant at every size. Speeds at the 90th percentile of time are the slower ones."""
    from rich.table import Table

    made = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1))
    made.add_column("GB", justify="right", no_wrap=True)
    made.add_column("read by", no_wrap=True)
    for name in ("ms", "p10", "p90", "TB/s", "at p90", "at p10", "samples"):
        made.add_column(name, justify="right", no_wrap=True)
    for read in report.reads:
        for name, times in read.times.items():
            made.add_row(
                f"{read.num_bytes / 1e9:.2f}",
                name,
                *(f"{ms:.4f}" for ms in (times.median_ms, times.p10_ms, times.p90_ms)),
                *(f"{read.num_bytes / ms / 1e9:.3f}" for ms in (times.median_ms, times.p90_ms, times.p10_ms)),
                str(times.samples),
            )
    return made
