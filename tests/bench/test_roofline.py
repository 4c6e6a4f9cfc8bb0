"""`bench roofline` with stand-ins for the GPU: checked before it is timed, at every size, and reported in TB/s."""

from __future__ import annotations

import io
import json
from collections.abc import Callable

import pytest
import torch
from rich.console import Console

from clusterfusion.bench import roofline
from clusterfusion.bench.roofline import heading, measure_roofline, roofline_options, table, to_json
from clusterfusion.bench.samples import Candidate
from clusterfusion.errors import ArgumentError, ClusterFusionError, DeviceError
from clusterfusion.jit.read_ceiling import ALIGNMENT, VARIANTS


class StandInCeiling:
    log: list[str]
    wrong: int | None

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.lead: Callable[[], None] = lambda: None

    def check(self, num_bytes: int) -> None:
        self.log.append(f"check {num_bytes}")
        if num_bytes == self.wrong:
            raise ClusterFusionError("it does not read what it should")

    def candidates(self, samples: int, num_bytes: int) -> list[Candidate]:
        return [Candidate(variant, lambda: None, lambda: None, samples) for variant in VARIANTS]


def milliseconds(name: str) -> float:
    """5 TB/s and a microsecond for bulk copies, 4 TB/s for loads."""
    variant, _, size = name.partition(" of ")
    return int(size) / 5e9 + 0.001 if variant == "bulk copies" else int(size) / 4e9


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    StandInCeiling.log, StandInCeiling.wrong = seen, None

    def timer(lead: Callable[[], None]) -> Callable[[Candidate, int], list[float]]:
        def sample(of: Candidate, count: int) -> list[float]:
            seen.append(of.name)
            return [milliseconds(of.name)] * count

        return sample

    monkeypatch.setattr(roofline, "require_gpu", lambda what: torch.device("cpu"))
    monkeypatch.setattr(roofline, "require_memory", lambda *_: None)
    monkeypatch.setattr(roofline, "ReadCeiling", StandInCeiling)
    monkeypatch.setattr(roofline, "DeviceTimer", timer)
    return seen


def test_every_size_is_checked_and_then_timed_in_turn(log: list[str]) -> None:
    options = roofline_options(2.0)
    assert options.sizes == (125_000_000, 250_000_000, 500_000_000, 1_000_000_000, 2_000_000_000)
    said = json.loads(json.dumps(to_json(measure_roofline(options, lambda line: None, "the command"))))
    assert log[:5] == [f"check {size}" for size in options.sizes]
    assert log[5:] == [f"{variant} of {size}" for size in options.sizes for variant in VARIANTS] * 5
    assert said["command"] == "the command"
    assert {"device", "versions", "source_digest", "date", "scope"} <= said.keys()
    assert [read["bytes"] for read in said["reads"]] == list(options.sizes)
    assert all(read["variants"]["loads"]["samples"] == 100 for read in said["reads"])
    assert said["bytes_per_s"] == pytest.approx(2e9 / (0.4e-3 + 1e-6))
    assert said["reads"][0]["variants"]["loads"]["bytes_per_s"] == pytest.approx(4e12)


def test_the_report_is_in_terabytes_a_second(log: list[str]) -> None:
    made = measure_roofline(roofline_options(4.0), lambda line: None)
    assert "bulk copies 4.994 TB/s, loads 4.000 TB/s, by the median time of 4.00 GB" in heading(made)
    console = Console(file=io.StringIO(), width=120)
    console.print(table(made))
    printed = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(printed) == 1 + 5 * 2
    assert printed[-1].split() == ["4.00", "loads", "1.0000", "1.0000", "1.0000", "4.000", "4.000", "4.000", "100"]


def test_a_kernel_that_does_not_read_ends_the_run(log: list[str]) -> None:
    options = roofline_options(1.0)
    StandInCeiling.wrong = options.sizes[2]
    with pytest.raises(ClusterFusionError, match="does not read what it should"):
        measure_roofline(options, lambda line: None)
    assert log == [f"check {size}" for size in options.sizes[:3]]


def test_options() -> None:
    assert roofline_options().num_bytes == 4_000_000_000
    assert all(size % ALIGNMENT == 0 for size in roofline_options(1.000000013).sizes)
    for value in (0.5, 1001.0, float("nan")):
        with pytest.raises(ArgumentError, match=r"bytes is .*; it must be a number of gigabytes from 1 to 1000"):
            roofline_options(value)
    with pytest.raises(ArgumentError, match="repeats is 99; it must be an int from 100"):
        roofline_options(4.0, 99)


def test_without_a_gpu_it_says_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match=r"bench roofline needs an NVIDIA GPU of compute capability 9\.0"):
        measure_roofline(roofline_options(), lambda line: None)
