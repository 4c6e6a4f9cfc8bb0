"""Verdicts on fabricated divergences, and differences of bits."""

from __future__ import annotations

import math

import pytest
import torch

from clusterfusion.bench.divergence import (
    Verdict,
    first_bit_difference,
    first_divergence,
    judge,
    little_endian,
    measure,
)

OURS, THEIRS, NEITHER = "ours", "theirs", "neither"


@pytest.mark.parametrize(
    ("margin", "our_error", "their_error", "best", "expected"),
    [
        (-0.01, 0.02, 0.02, THEIRS, "tie"),
        (0.01, 0.02, 0.02, OURS, "tie"),
        (-0.05, 0.02, 0.02, THEIRS, "error"),  # more than both errors
        (0.05, 0.02, 0.02, OURS, "ours is right"),
        (-3.0, 5.0, 0.02, THEIRS, "error"),  # within the sum, but only because we are wrong by 5
        (3.0, 0.02, 5.0, OURS, "ours is right"),  # and the same of theirs
        (0.001, 5.0, 0.02, NEITHER, "error"),  # a third token is best: ours is out of line all the same
        (0.001, 0.02, 0.02, NEITHER, "tie"),
        (-0.001, 0.002, 0.03, THEIRS, "tie"),  # theirs rounds more coarsely, and was lucky
        (-0.0005, 0.0009, 0.0, THEIRS, "tie"),  # theirs is exact; ours is within rounding
        (-0.0005, 0.1, 0.0, THEIRS, "error"),
        (0.0, 0.01, 0.01, THEIRS, "tie"),
        (-0.01, math.nan, 0.02, THEIRS, "error"),
        (-0.01, math.inf, math.inf, THEIRS, "error"),
        (math.nan, 0.02, 0.02, NEITHER, "error"),
    ],
)
def test_verdicts(margin: float, our_error: float, their_error: float, best: str, expected: Verdict) -> None:
    verdict = judge(margin, our_error, their_error, 0.001, ours_is_best=best == OURS, theirs_is_best=best == THEIRS)
    assert verdict == expected


def test_measured_numbers() -> None:
    truth = torch.tensor([1.0, 4.0, 3.5, -8.0], dtype=torch.float64)
    ours = torch.tensor([1.0, 4.0, 4.25, -8.0])
    theirs = torch.tensor([1.0, 4.0, 3.5, -7.75]).half()
    found = measure("graph", 9, 2, (2, 1), ("a", None), (ours, theirs), truth, torch.float16)
    assert (found.margin, found.our_error, found.their_error, found.best_token) == (-0.5, 0.75, 0.25, 1)
    assert (found.ours.reference, found.ours.ours, found.ours.theirs) == (3.5, 4.25, 3.5)
    assert (found.theirs.token, found.theirs.text, found.ours.text) == (1, None, "a")
    assert found.rounding == 8.0 * 2**-10
    assert found.verdict == "tie"  # 0.75 is no more than four times 0.25


def test_first_divergence() -> None:
    assert first_divergence([1, 2, 3], [1, 2, 3]) is None
    assert first_divergence([1, 2, 3], [1, 5, 6]) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bits(dtype: torch.dtype) -> None:
    first = torch.zeros(3, 5, dtype=dtype)
    first[0, 0] = torch.nan
    other = first.clone()
    assert first_bit_difference(first, other) is None  # NaN equals itself
    other[1, 3], other[1, 4], other[2, 0] = -0.0, 1.0, 1.0
    assert first_bit_difference(first, other) == (1, 3, 2)


def test_bytes() -> None:
    assert little_endian(torch.tensor(1.0)) == "0000803f"
    assert little_endian(torch.tensor(-0.0)) == "00000080"
    assert little_endian(torch.tensor(1.0, dtype=torch.float64)) == "000000000000f03f"
