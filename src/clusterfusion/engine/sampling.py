"""From logits to the next token: greedy, temperature, top-k, nucleus, repetition penalty.

Sampling adds Gumbel noise to the scores and takes the highest (engine/gumbel.py): a choice is a function of logits, seed and
position, so a GPU can make the same one.
"""

from __future__ import annotations

import dataclasses
import math
import secrets
from collections.abc import Sequence

import torch
from torch import Tensor

from clusterfusion.arguments import as_float, as_int
from clusterfusion.engine.gumbel import gumbel_noise
from clusterfusion.errors import ArgumentError, DeviceError

LEAST_TEMPERATURE_ON_DEVICE = 1e-6


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen. The order of the filters is transformers': penalty, temperature, top-k, top-p.

    temperature: 0 is greedy; otherwise logits are divided by it.
    top_k: only the k likeliest tokens (and those tied with the k-th); None for all.
    top_p: only the likeliest tokens whose probabilities reach p together (Holtzman et al. 2020); 1 for all.
    repetition_penalty: logits of tokens seen so far, prompt included, are divided by it when positive and multiplied
        when negative (Keskar et al. 2019); 1 for none.
    seed: makes sampling reproducible, on every device alike; None takes a fresh one.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    @property
    def on_device(self) -> bool:
        """Whether logits, seed and position alone decide the token, by nothing but temperature: what a GPU can do by
        itself. Greedy choice needs no filter: the likeliest token passes them all. A temperature so low that a logit over it
        could overflow is left to the host."""
        sampled = self.temperature >= LEAST_TEMPERATURE_ON_DEVICE and self.top_k is None and self.top_p == 1
        return self.repetition_penalty == 1 and (self.temperature == 0 or sampled)

    def __post_init__(self) -> None:
        temperature = as_float("temperature", self.temperature, "a finite number >= 0")
        top_p = as_float("top_p", self.top_p, "a number in (0, 1]")
        penalty = as_float("repetition_penalty", self.repetition_penalty, "a number from 1e-6 to 1e6")
        _check("temperature", temperature, temperature >= 0, "a finite number >= 0")
        _check("top_p", top_p, 0 < top_p <= 1, "a number in (0, 1]")
        _check("repetition_penalty", penalty, 1e-6 <= penalty <= 1e6, "a number from 1e-6 to 1e6")
        object.__setattr__(self, "temperature", temperature)
        object.__setattr__(self, "top_p", top_p)
        object.__setattr__(self, "repetition_penalty", penalty)
        if self.top_k is not None:
            object.__setattr__(self, "top_k", as_int("top_k", self.top_k, 1, 2**63 - 1))
        if self.seed is not None:
            object.__setattr__(self, "seed", as_int("seed", self.seed, 0, 2**63 - 1))


class Sampler:
    """Chooses tokens; holds the seed and the tokens that the repetition penalty counts."""

    def __init__(self, options: SamplingOptions, prompt: Sequence[int]) -> None:
        self.options = options
        self.seed = (
            secrets.randbits(63) if options.seed is None else options.seed
        )  # the one in use, known to the caller
        self._seen = set(prompt)

    def choose(self, logits: Tensor, position: int) -> int:
        """The token at `position` (the number of tokens before it, below 2^32), given its `logits` [vocab]. Ties go to
        the lowest id when greedy.

        Raises DeviceError when the logits are not numbers, as happens when a 16-bit model overflows.
        """
        token = self._choose(logits, position)
        if not math.isfinite(logits[token]):
            raise DeviceError(
                "the model's logits are not finite: its activations overflow the dtype; load it with dtype='bfloat16' "
                "or 'float32'"
            )
        self._seen.add(token)
        return token

    def _choose(self, logits: Tensor, position: int) -> int:
        options = self.options
        if options.repetition_penalty != 1:
            logits = penalise(logits, self._seen, options.repetition_penalty)
        if options.temperature == 0:
            return int(logits.argmax())  # the first of equals, as torch says for every device
        scores = logits.detach().to("cpu", torch.float64)
        if not torch.isfinite(scores.max()):
            return int(logits.argmax())  # not finite: choose() says so
        scores = ((scores - scores.max()) / options.temperature).clamp_min(-1e4)
        if not options.on_device:  # where the GPU may choose, the order is that of float64
            scores = filter_scores(scores.to(torch.float32), options.top_k, options.top_p)
        noise = torch.from_numpy(gumbel_noise(self.seed, position, len(scores)))
        return int((scores + noise).argmax())


def penalise(logits: Tensor, seen: set[int], penalty: float) -> Tensor:
    """A copy of logits [vocab] in which tokens already seen score less."""
    ids = torch.tensor(sorted(seen), dtype=torch.int64, device=logits.device)
    scores = logits[ids]
    return logits.index_copy(0, ids, torch.where(scores < 0, scores * penalty, scores / penalty))


def filter_scores(scores: Tensor, top_k: int | None, top_p: float) -> Tensor:
    """Scores [vocab] with -inf for tokens outside top-k or outside the nucleus."""
    if top_k is not None and top_k < len(scores):
        scores = scores.masked_fill(scores < torch.topk(scores, top_k).values[-1], -math.inf)
    if top_p < 1:
        ordered, indices = torch.sort(torch.softmax(scores, dim=-1), descending=True, stable=True)
        outside = ordered.cumsum(-1) - ordered >= top_p  # the likelier ones reach p already
        outside[0] = False
        scores = scores.masked_fill(torch.zeros_like(outside).scatter(0, indices, outside), -math.inf)
    return scores


def _check(name: str, value: object, ok: bool, needed: str) -> None:
    if not ok:
        raise ArgumentError(f"{name} is {value!r}; it must be {needed}")
