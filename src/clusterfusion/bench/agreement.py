"""How far logits are from the truth, position by position, and how sure a mean over positions is."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from clusterfusion.errors import ArgumentError

RESAMPLES = 2000
CONFIDENCE = 0.95
_BLOCK = 1 << 22  # indices drawn at once


def kl_divergence(truth: Tensor, logits: Tensor) -> Tensor:
    """KL(truth || logits) in nats of the distributions that two [T, vocab] of logits stand for, [T] float64."""
    p, q = torch.log_softmax(truth.double(), dim=-1), torch.log_softmax(logits.double(), dim=-1)
    terms = p.exp() * (p - q)
    return torch.where(p == -torch.inf, torch.zeros_like(terms), terms).sum(-1)  # 0 log 0 is 0


def top_k_overlap(truth: Tensor, logits: Tensor, k: int) -> Tensor:
    """The share of truth's k likeliest tokens that are among the k likeliest of `logits`, [T] float64. k is at most the
    vocabulary."""
    k = min(k, truth.shape[-1])
    wanted, got = truth.topk(k).indices, logits.topk(k).indices
    return (wanted[:, :, None] == got[:, None, :]).any(-1).double().mean(-1)


def greedy_match(truth: Tensor, logits: Tensor) -> Tensor:
    """1 where both have the same likeliest token, else 0, [T] float64."""
    return (truth.argmax(-1) == logits.argmax(-1)).double()


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """-ln p(target) in nats, [T] float64, from logits [T, vocab] of any dtype, a few rows at a time."""
    rows = 256
    pieces = []
    for start in range(0, len(targets), rows):
        chances = torch.log_softmax(logits[start : start + rows].double(), dim=-1)
        pieces.append(-chances.gather(-1, targets[start : start + rows, None])[:, 0])
    return torch.cat(pieces)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over positions, and the bootstrap interval that holds it with 95% confidence."""

    mean: float
    low: float
    high: float


def bootstrap(values: Sequence[float], seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """The mean of `values` with the percentile bootstrap's interval (Efron 1979): positions drawn with replacement, the
    same ones for the same seed and count. Neighbouring positions of a text are not independent, which it does not see.

    Raises ArgumentError without values.
    """
    data = np.asarray(values, dtype=np.float64)
    if not len(data):
        raise ArgumentError("values is empty; an estimate needs at least one position")
    if not np.isfinite(data).all():
        with np.errstate(invalid="ignore"):  # infinities may have no sum
            return Estimate(float(data.mean()), float("nan"), float("nan"))
    generator = np.random.default_rng(seed)
    means = []
    rows = max(_BLOCK // len(data), 1)
    for start in range(0, resamples, rows):
        picks = generator.integers(len(data), size=(min(rows, resamples - start), len(data)))
        means.append(data[picks].mean(axis=1))
    tail = (1 - CONFIDENCE) / 2 * 100
    low, high = np.percentile(np.concatenate(means), (tail, 100 - tail))
    return Estimate(float(data.mean()), float(low), float(high))
