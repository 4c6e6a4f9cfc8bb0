"""Sampling against transformers' logits processors, and its statistics."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from clusterfusion.engine.gumbel import gumbel_noise
from clusterfusion.engine.sampling import Sampler, SamplingOptions, filter_scores, penalise
from clusterfusion.errors import ArgumentError, DeviceError


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
    assert [sampler.choose(scores, 0) for _ in range(3)] == [1, 0, 1]  # 1.5 -> 0.75 < 1.0 -> 0.5 < 0.75


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_greedy_takes_the_first_of_equals(dtype: torch.dtype) -> None:
    assert Sampler(SamplingOptions(), []).choose(torch.tensor([0.0, 2.0, 2.0], dtype=dtype), 0) == 1
    scores = torch.zeros(50304, dtype=dtype)
    scores[[40001, 7, 50303]] = 1
    assert Sampler(SamplingOptions(), []).choose(scores, 0) == 7


def test_seeds() -> None:
    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingOptions(temperature=1.0, seed=seed), [])
        # flat, so that no two seeds agree by chance
        return [sampler.choose(torch.zeros(50), position) for position in range(40)]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    assert draw(None) != draw(None)


def test_a_fresh_seed_can_be_used_again() -> None:
    first = Sampler(SamplingOptions(temperature=1.0), [])
    assert 0 <= first.seed < 2**63
    again = Sampler(SamplingOptions(temperature=1.0, seed=first.seed), [])
    assert [first.choose(logits(p), p) for p in range(20)] == [again.choose(logits(p), p) for p in range(20)]


def test_a_choice_depends_on_its_position_and_on_no_earlier_choice() -> None:
    options = SamplingOptions(temperature=1.0, seed=3)
    forwards = Sampler(options, [])
    tokens = [forwards.choose(logits(0) / 9, position) for position in range(30)]
    assert len(set(tokens)) > 5
    backwards = Sampler(options, [1, 2, 3])
    assert [backwards.choose(logits(0) / 9, position) for position in reversed(range(30))] == tokens[::-1]


def test_a_sampled_token_is_the_highest_score_with_noise() -> None:
    sampler = Sampler(SamplingOptions(temperature=0.7, seed=2**62 + 5), [])
    for position in (0, 1, 2**32 - 1):
        noise = torch.from_numpy(gumbel_noise(2**62 + 5, position, 50))
        assert sampler.choose(logits(position), position) == int((logits(position).double() / 0.7 + noise).argmax())


@pytest.mark.parametrize("options", [{"top_k": 3}, {"top_p": 0.5}])
def test_filtered_tokens_are_never_drawn(options: dict[str, Any]) -> None:
    scores = logits(0)
    kept = filter_scores(scores / 5, options.get("top_k"), options.get("top_p", 1.0)).isfinite()
    sampler = Sampler(SamplingOptions(temperature=5.0, seed=0, **options), [])
    drawn = {sampler.choose(scores, position) for position in range(300)}
    assert len(drawn) > 1 and kept[sorted(drawn)].all()


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.9])
def test_frequencies_follow_the_probabilities(temperature: float) -> None:
    scores = torch.tensor([2.0, 1.0, 0.0, -1.0, -30.0])
    draws = 10_000
    sampler = Sampler(SamplingOptions(temperature=temperature, seed=1), [])
    counts = torch.bincount(torch.tensor([sampler.choose(scores, at) for at in range(draws)]), minlength=5)
    expected = torch.softmax(scores / temperature, -1) * draws
    chi_square = ((counts - expected).square() / expected.clamp_min(1e-3))[:4].sum().item()
    assert chi_square < 21.1, "3 degrees of freedom: beyond one in ten thousand"
    assert counts[4] == 0


def test_neighbouring_positions_are_independent() -> None:
    """Pairs of consecutive tokens against the product of their frequencies."""
    sampler = Sampler(SamplingOptions(temperature=1.0, seed=4), [])
    tokens = torch.tensor([sampler.choose(torch.zeros(4), at) for at in range(8_000)])
    counts = torch.bincount(4 * tokens[0::2] + tokens[1::2], minlength=16)
    chi_square = ((counts - 250).double().square() / 250).sum().item()
    assert chi_square < 44.3, "15 degrees of freedom: beyond one in ten thousand"


@pytest.mark.parametrize(
    ("options", "on_device"),
    [
        ({}, True),
        ({"temperature": 0.8, "seed": 1}, True),
        ({"top_k": 5, "top_p": 0.5}, True),  # greedy all the same
        ({"temperature": 0.8, "top_k": 5}, False),
        ({"temperature": 0.8, "top_p": 0.9}, False),
        ({"repetition_penalty": 1.1}, False),
        ({"temperature": 0.8, "repetition_penalty": 0.9}, False),
    ],
)
def test_what_a_device_can_choose_by_itself(options: dict[str, Any], on_device: bool) -> None:
    assert SamplingOptions(**options).on_device is on_device


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_refused(temperature: float, bad: float) -> None:
    with pytest.raises(DeviceError, match="logits are not finite"):
        Sampler(SamplingOptions(temperature=temperature, seed=0), []).choose(torch.tensor([0.0, bad, 1.0]), 0)


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
