"""Sampling against transformers' logits processors, and its statistics."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from clusterfusion.engine.sampling import Sampler, SamplingOptions, filter_scores, penalise
from clusterfusion.errors import ArgumentError


def logits(seed: int, vocab: int = 50) -> torch.Tensor:
    return 3 * torch.randn(vocab, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("top_k", [None, 1, 5, 50, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 0.01])
def test_filters_keep_the_tokens_that_transformers_keeps(top_k: int | None, top_p: float) -> None:
    for seed in range(20):
        processors = LogitsProcessorList()
        if top_k is not None:
            processors.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            processors.append(TopPLogitsWarper(top_p))
        wanted = processors(torch.zeros(1, 1, dtype=torch.int64), logits(seed)[None])[0]
        assert torch.equal(filter_scores(logits(seed), top_k, top_p), wanted)


def test_repetition_penalty_is_that_of_transformers() -> None:
    seen = [3, 4, 4, 49, 0]
    for penalty in (0.5, 1.3, 5.0):
        wanted = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([seen]), logits(1)[None])[0]
        assert torch.equal(penalise(logits(1), set(seen), penalty), wanted)


def test_penalty_counts_generated_tokens_too() -> None:
    sampler = Sampler(SamplingOptions(repetition_penalty=2.0), prompt=[])
    scores = torch.tensor([1.0, 1.5, 0.1])
    assert [sampler.choose(scores) for _ in range(3)] == [1, 0, 1]  # 1.5 -> 0.75 < 1.0 -> 0.5 < 0.75


def test_greedy_takes_the_first_of_equals() -> None:
    assert Sampler(SamplingOptions(), []).choose(torch.tensor([0.0, 2.0, 2.0])) == 1


def test_seeds() -> None:
    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingOptions(temperature=1.0, seed=seed), [])
        return [sampler.choose(torch.zeros(50)) for _ in range(40)]  # flat, so that no two seeds agree by chance

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    assert draw(None) != draw(None)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.9])
def test_frequencies_follow_the_probabilities(temperature: float) -> None:
    scores = torch.tensor([2.0, 1.0, 0.0, -1.0, -30.0])
    draws = 20_000
    sampler = Sampler(SamplingOptions(temperature=temperature, seed=1), [])
    counts = torch.bincount(torch.tensor([sampler.choose(scores) for _ in range(draws)]), minlength=5)
    expected = torch.softmax(scores / temperature, -1) * draws
    chi_square = ((counts - expected).square() / expected.clamp_min(1e-3))[:4].sum().item()
    assert chi_square < 21.1, "3 degrees of freedom: beyond one in ten thousand"
    assert counts[4] == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("temperature", math.nan), ("temperature", "hot"), ("temperature", None),
        ("top_k", 0), ("top_k", 1.5), ("top_k", -3), ("top_k", True),
        ("top_p", 0), ("top_p", 1.01), ("top_p", math.nan),
        ("repetition_penalty", 0), ("repetition_penalty", -1), ("repetition_penalty", math.inf),
        ("seed", -1), ("seed", 0.5), ("seed", 2**63), ("seed", "x"),
    ],
)  # fmt: skip
def test_bad_options_are_named(name: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=f"{name} is "):
        SamplingOptions(**{name: value})
