"""What is seen of a GPU's clock while loops are timed, on a GPU that does not exist."""

from __future__ import annotations

import itertools
import threading
import time

import pytest
import torch

from clusterfusion.bench import clocks
from clusterfusion.bench.clocks import ClockSampler

GPU = torch.device("cuda", 0)


def test_what_falls_into_a_span_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clocks, "PERIOD_S", 0.001)
    looks = itertools.count()
    enough = threading.Event()

    def look() -> tuple[float, float]:
        at = next(looks)
        if at == 40:
            enough.set()
        return (1980.0, 100.0) if at == 0 else (1400.0 + at % 3, 700.0)

    with ClockSampler(GPU, look) as sampler:
        begin = time.perf_counter()
        assert enough.wait(30)
        end = time.perf_counter()
    assert sampler.obstacle is None
    assert all(thread.name != "clock sampler" for thread in threading.enumerate())
    seen = sampler.during([(begin, end)])
    assert seen is not None and seen.samples >= 3
    assert 1400 <= seen.lowest_sm_mhz <= seen.sm_mhz <= seen.highest_sm_mhz <= 1402, "what was seen before is not in it"
    assert seen.watts == 700
    everything = sampler.during([(0.0, end + 1.0)])
    assert everything is not None and everything.highest_sm_mhz == 1980.0
    assert sampler.during([(end + 1.0, end + 2.0)]) is None
    assert sampler.during([]) is None


@pytest.mark.parametrize("fails_at", [0, 3])
def test_a_driver_that_does_not_answer_ends_nothing(fails_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clocks, "PERIOD_S", 0.001)
    looks = itertools.count()
    failed = threading.Event()

    def look() -> tuple[float, float]:
        if next(looks) == fails_at:
            failed.set()
            raise ModuleNotFoundError("nvidia-ml-py does not\nseem to be installed")
        return 1.0, 2.0

    with ClockSampler(GPU, look) as sampler:
        assert failed.wait(30)
    assert sampler.obstacle is not None and "nvidia-ml-py" in sampler.obstacle and "\n" not in sampler.obstacle
    assert sampler.obstacle.endswith("the extra clocks has it")
    assert sampler.during([(0.0, time.perf_counter())]) is None, "a part would pass for the whole"


def test_without_a_gpu_there_is_nothing_to_see() -> None:
    with ClockSampler(torch.device("cpu")) as sampler:
        pass
    assert sampler.obstacle == "there is no GPU to look at"
    assert sampler.during([(0.0, time.perf_counter())]) is None
