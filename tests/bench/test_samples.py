"""Round robin over candidates, and what is made of their times."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from clusterfusion.bench.samples import Candidate, least_squares_slope, one_line, percentile, round_robin, summarise
from clusterfusion.errors import ArgumentError


def candidate(name: str, samples: int, may_fail: bool = False) -> Candidate:
    return Candidate(name, lambda: None, lambda: None, samples, may_fail)


@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_percentiles_are_numpys(count: int) -> None:
    values = np.random.default_rng(count).random(count).tolist()
    for percent in (0, 10, 50, 90, 100):
        assert percentile(values, percent) == pytest.approx(np.percentile(values, percent))


def test_a_summary_holds_median_percentiles_and_count() -> None:
    summary = summarise([float(value) for value in range(101)][::-1])
    assert (summary.median_ms, summary.p10_ms, summary.p90_ms, summary.samples) == (50.0, 10.0, 90.0, 101)
    with pytest.raises(ArgumentError, match="empty"):
        summarise([])


def test_slopes_are_numpys() -> None:
    generator = np.random.default_rng(1)
    x, y = generator.random(7).tolist(), generator.random(7).tolist()
    assert least_squares_slope(list(zip(x, y, strict=True))) == pytest.approx(np.polyfit(x, y, 1)[0])
    assert least_squares_slope([(1e9, 5.0), (1e9 + 1, 7.0)]) == pytest.approx(2.0)
    for points in ([], [(1.0, 2.0)], [(1.0, 2.0), (1.0, 3.0)]):
        with pytest.raises(ArgumentError, match="two different x"):
            least_squares_slope(points)


def test_every_round_visits_every_candidate_for_its_share() -> None:
    visits: list[tuple[str, int]] = []

    def sample(of: Candidate, count: int) -> Sequence[float]:
        visits.append((of.name, count))
        return [float(len(visits))] * count

    timings = round_robin([candidate("a", 100), candidate("b", 22), candidate("c", 1)], sample, rounds=5)
    assert [name for name, _ in visits if name != "c"] == ["a", "b"] * 5
    assert {name: len(timing.times_ms) for name, timing in timings.items()} == {"a": 100, "b": 22, "c": 1}
    assert sorted(count for name, count in visits if name == "b") == [4, 4, 4, 5, 5]


def test_a_failing_peer_is_kept_as_an_error_and_the_others_go_on() -> None:
    calls = {"a": 0, "peer": 0}

    def sample(of: Candidate, count: int) -> Sequence[float]:
        calls[of.name] += 1
        if of.name == "peer" and calls["peer"] == 2:
            raise RuntimeError("\nCUDA graphs are cross\nand more")
        return [1.0] * count

    timings = round_robin([candidate("a", 10), candidate("peer", 10, may_fail=True)], sample, rounds=5)
    assert len(timings["a"].times_ms) == 10
    assert timings["peer"].times_ms == ()
    assert timings["peer"].error == "RuntimeError: CUDA graphs are cross"
    assert calls == {"a": 5, "peer": 2}


def test_our_own_failure_ends_the_run() -> None:
    def sample(of: Candidate, count: int) -> Sequence[float]:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        round_robin([candidate("a", 10)], sample)


def test_an_exception_becomes_one_short_line() -> None:
    assert one_line(ValueError("  \nfirst\nsecond")) == "ValueError: first"
    assert one_line(KeyError()) == "KeyError"
    assert len(one_line(ValueError("x" * 1000))) == 300
