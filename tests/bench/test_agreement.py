"""Agreement measures and the bootstrap against values computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from clusterfusion.bench.agreement import (
    bootstrap,
    greedy_match,
    kl_divergence,
    negative_log_likelihood,
    top_k_overlap,
)
from clusterfusion.errors import ArgumentError


def test_kl_by_hand() -> None:
    truth = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25], [1.0, 0.0, 0.0]], dtype=torch.float64).log()
    other = torch.tensor([[0.25, 0.5, 0.25], [0.5, 0.25, 0.25], [0.5, 0.5, 0.0]], dtype=torch.float64).log()
    # 0.5 ln 2 - 0.25 ln 2 = 0.25 ln 2; equal; ln 2, where 0 ln 0 counts as 0. Logits may be shifted as one.
    expected = torch.tensor([0.25 * math.log(2), 0.0, math.log(2)], dtype=torch.float64)
    torch.testing.assert_close(kl_divergence(truth, other + 7), expected, rtol=1e-12, atol=1e-15)
    swapped = kl_divergence(other[:1], truth[:1])
    torch.testing.assert_close(swapped, torch.tensor([0.25 * math.log(2)], dtype=torch.float64))


def test_top_k_overlap_is_of_sets() -> None:
    truth = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0], [5.0, 4.0, 3.0, 2.0, 1.0]])
    other = torch.tensor([[4.0, 5.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
    assert top_k_overlap(truth, other, 1).tolist() == [0.0, 0.0]
    assert top_k_overlap(truth, other, 2).tolist() == [1.0, 0.0]
    assert top_k_overlap(truth, other, 3).tolist() == pytest.approx([1.0, 1 / 3])
    assert top_k_overlap(truth, other, 10).tolist() == [1.0, 1.0]  # no more than there are
    assert greedy_match(truth, other).tolist() == [0.0, 0.0]
    assert greedy_match(truth, truth).tolist() == [1.0, 1.0]


def test_negative_log_likelihood_by_hand() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log().repeat(600, 1)  # more rows than are taken at once
    targets = torch.arange(600) % 3
    expected = torch.tensor([math.log(2), math.log(4), math.log(4)], dtype=torch.float64).repeat(200)
    torch.testing.assert_close(negative_log_likelihood(logits, targets), expected, rtol=1e-7, atol=0)


def test_bootstrap_is_seeded_and_as_wide_as_theory_says() -> None:
    values = np.random.default_rng(5).normal(3.0, 2.0, size=400).tolist()
    made = bootstrap(values, seed=1)
    half = 1.96 * float(np.std(values)) / math.sqrt(len(values))
    assert made.mean == pytest.approx(float(np.mean(values)), rel=1e-12)
    assert made.low == pytest.approx(made.mean - half, abs=0.1 * half)
    assert made.high == pytest.approx(made.mean + half, abs=0.1 * half)
    assert bootstrap(values, seed=1) == made
    assert bootstrap(values, seed=2) != made


def test_bootstrap_of_little() -> None:
    constant = bootstrap([0.25] * 7)
    assert (constant.mean, constant.low, constant.high) == (0.25, 0.25, 0.25)
    two = bootstrap([0.0, 1.0])  # resamples are 0, 1/2 or 1
    assert (two.mean, two.low, two.high) == (0.5, 0.0, 1.0)
    broken = bootstrap([1.0, math.inf])
    assert broken.mean == math.inf
    assert math.isnan(broken.low)
    with pytest.raises(ArgumentError, match="values is empty"):
        bootstrap([])
