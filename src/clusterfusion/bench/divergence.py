"""Where two greedy decodings part: was it a tie within rounding, are we right, or is it an error?"""

from __future__ import annotations

import dataclasses
import math
import struct
from typing import Literal

import torch
from torch import Tensor

Verdict = Literal["tie", "ours is right", "error"]

# Same dtype, same weights: the two sides differ in the order of their sums and in what they round, which moves the largest
# error over a vocabulary by small factors. Beyond this factor an error has another cause than rounding.
OUT_OF_LINE = 4.0

RULE = (
    "At the first step where the tokens differ, each side's error is the largest |logit - float64 reference logit| over the "
    "vocabulary, after the same prefix. The margin is the float64 logit of our token minus that of theirs. 'tie': |margin| "
    "is below the sum of both errors, and a side whose token is not the float64 argmax has an error of at most "
    f"{OUT_OF_LINE:g} times the other side's (or times eps of the dtype x the largest logit, if that is more): a wrong choice "
    "always comes with an error of half the margin or more, so that error must not excuse itself. 'ours is right': no tie, "
    "and our token is the float64 argmax. 'error': neither."
)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A token as both sides and the float64 reference rate it: logits."""

    token: int
    text: str | None
    reference: float
    ours: float
    theirs: float


@dataclasses.dataclass(frozen=True)
class Divergence:
    """The first step at which the greedy tokens differ. `step` counts new tokens from 0, after a prompt of
    `prompt_tokens`; `margin` is positive where our token is the better one."""

    mode: str
    prompt_tokens: int
    step: int
    ours: Candidate
    theirs: Candidate
    best_token: int  # the float64 argmax
    margin: float
    our_error: float
    their_error: float
    rounding: float  # eps of the dtype x the largest float64 logit
    verdict: Verdict


@dataclasses.dataclass(frozen=True)
class BitDifference:
    """The first logit in which a run differs from the first run of the first mode, both as value and as bytes (hex,
    little-endian)."""

    mode: str
    run: int
    first_mode: str
    step: int
    coordinate: int
    differing: int  # logits of this step that differ
    first_value: float
    first_bytes: str
    value: float
    bytes: str


def judge(
    margin: float, our_error: float, their_error: float, rounding: float, *, ours_is_best: bool, theirs_is_best: bool
) -> Verdict:
    """The verdict of RULE. NaN anywhere excuses nothing."""
    in_line = math.isfinite(our_error + their_error)
    in_line = in_line and (ours_is_best or our_error <= OUT_OF_LINE * max(their_error, rounding))
    in_line = in_line and (theirs_is_best or their_error <= OUT_OF_LINE * max(our_error, rounding))
    if in_line and (abs(margin) < our_error + their_error or margin == 0):
        return "tie"
    return "ours is right" if ours_is_best else "error"


def first_divergence(ours: list[int], theirs: list[int]) -> int | None:
    """The first step at which the tokens differ, or None."""
    return next((step for step, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)


def measure(
    mode: str,
    prompt_tokens: int,
    step: int,
    tokens: tuple[int, int],
    texts: tuple[str | None, str | None],
    logits: tuple[Tensor, Tensor],
    truth: Tensor,
    dtype: torch.dtype,
) -> Divergence:
    """The divergence of (our, their) `tokens`, from both sides' `logits` [vocab] and the float64 `truth` [vocab]."""
    our_logits, their_logits = (side.to(truth.device).double() for side in logits)
    errors = [float((side - truth).abs().max()) for side in (our_logits, their_logits)]
    margin = float(truth[tokens[0]] - truth[tokens[1]])
    rounding = torch.finfo(dtype).eps * float(truth.abs().max())
    our_token, their_token = (
        Candidate(token, text, float(truth[token]), float(our_logits[token]), float(their_logits[token]))
        for token, text in zip(tokens, texts, strict=True)
    )
    best = int(truth.argmax())
    return Divergence(
        mode=mode,
        prompt_tokens=prompt_tokens,
        step=step,
        ours=our_token,
        theirs=their_token,
        best_token=best,
        margin=margin,
        our_error=errors[0],
        their_error=errors[1],
        rounding=rounding,
        verdict=judge(
            margin, errors[0], errors[1], rounding, ours_is_best=best == tokens[0], theirs_is_best=best == tokens[1]
        ),
    )


def first_bit_difference(first: Tensor, other: Tensor) -> tuple[int, int, int] | None:
    """(step, coordinate, how many of that step differ) where the bits of two [steps, vocab] first differ, or None. Bits:
    NaN equals itself, and -0 is not 0."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[first.element_size()]
    differ = first.view(integers) != other.view(integers)
    rows = differ.any(dim=-1).nonzero()
    if not len(rows):
        return None
    step = int(rows[0])
    return step, int(differ[step].nonzero()[0]), int(differ[step].sum())


def little_endian(value: Tensor) -> str:
    """The bytes of a float32 or float64 scalar, in hex, lowest first."""
    return struct.pack({4: "<i", 8: "<q"}[value.element_size()], _as_integer(value)).hex()


def _as_integer(value: Tensor) -> int:
    return int(value.reshape(1).view({4: torch.int32, 8: torch.int64}[value.element_size()])[0])
