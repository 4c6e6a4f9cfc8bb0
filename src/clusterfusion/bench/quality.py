"""`clusterfusion quality`: our logits and transformers', over the same text, against the float64 reference.

Both sides take the text in token by token, as decoding does, whatever they would have said themselves.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clusterfusion.arguments import as_int
from clusterfusion.bench.agreement import (
    CONFIDENCE,
    RESAMPLES,
    Estimate,
    bootstrap,
    greedy_match,
    kl_divergence,
    top_k_overlap,
)
from clusterfusion.bench.evaluation import Facts, Pace, Progress, Sides
from clusterfusion.bench.texts import default_text, encode, random_tokens, read_text
from clusterfusion.bench.truth import HiddenProbe, Truth
from clusterfusion.engine import Engine, Session

DEFAULT_TOKENS = 256
SEED = 0
CHUNK = 64  # positions whose logits are held at once

Columns = dict[str, list[float]]  # a measure's value at each position, by the measure's name


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A measure's mean over positions for both sides, and for the difference (ours - theirs) at each position. None where a
    side's values cannot be had.

    `rounded`: of our logits as rounded to the dtype that transformers gives its own in, since that rounding is a part of its
    error. None where it changes nothing."""

    ours: Estimate | None
    transformers: Estimate | None
    difference: Estimate | None
    rounded: Estimate | None = None


@dataclasses.dataclass(frozen=True)
class Largest:
    """The largest |logit - reference| over all positions and the vocabulary. Without an interval: the bootstrap has none
    to give for an extreme."""

    ours: float
    transformers: float
    rounded: float | None = None  # ours, as in Comparison


@dataclasses.dataclass(frozen=True)
class QualityReport:
    """One run of `quality`. `positions` of `asked_tokens` were measured; `measures` by name."""

    facts: Facts
    source: str
    asked_tokens: int
    positions: int
    measures: Mapping[str, Comparison]
    logits_max: Largest
    hidden_note: str | None  # why our hidden state is left out, if it is
    confidence: float
    resamples: int
    seed: int
    interrupted: bool

    @property
    def not_finite(self) -> tuple[str, ...]:
        """The sides, as `Comparison` names them, of whose means one is not finite; so it is where a largest error is not."""

        def is_finite(side: str) -> bool:
            estimates = [getattr(measure, side) for measure in self.measures.values()]
            return all(math.isfinite(estimate.mean) for estimate in estimates if estimate is not None)

        return tuple(side for side in ("ours", "rounded", "transformers") if not is_finite(side))

    @property
    def passed(self) -> bool:
        """Whether our numbers are finite; transformers' need not be, nor ours as rounded to its dtype."""
        return "ours" not in self.not_finite


def quality_tokens(
    engine: Engine, text_file: Path | None, tokens: int | None, random_text: bool
) -> tuple[list[int], str]:
    """At most `tokens` token ids to measure on, and where they come from. Random ones for random weights, and where no
    file is named and there is no tokenizer. Raises ArgumentError for unusable options."""
    limit = engine.config.max_position
    tokens = as_int("tokens", min(DEFAULT_TOKENS, limit) if tokens is None else tokens, 1, limit)
    if text_file is not None:
        return encode(engine, read_text(text_file))[:tokens], str(text_file)
    if random_text or engine.tokenizer is None:
        return random_tokens(engine.config.vocab_size, tokens, SEED), f"random tokens, seed {SEED}"
    text, source = default_text(engine)
    return encode(engine, text)[:tokens], source


@torch.no_grad()
def quality(
    sides: Sides,
    progress: Progress,
    *,
    text_file: Path | None = None,
    tokens: int | None = None,
    random_text: bool = False,
    command: str = "",
) -> QualityReport:
    """Measure both sides at every position of a text (`tokens` at most; None: 256, or the model's limit). Ctrl-C ends it with the positions that are done; before the first
    one it is raised. Raises ArgumentError for unusable options, DeviceError where the caches do not fit."""
    engine = sides.engine
    ids, source = quality_tokens(engine, text_file, tokens, random_text)
    progress(f"{len(ids)} tokens ({source})")
    truth = Truth(engine.weights, len(ids))
    probe = HiddenProbe(engine, len(ids))
    session = Session(engine.weights, len(ids), engine.mode)
    stepper = sides.peer.stepper()
    pace = Pace(progress, "positions", len(ids))
    ours: Columns = {}
    rounded: Columns = {}
    theirs: Columns = {}
    positions = 0
    interrupted = False
    for start in range(0, len(ids), CHUNK):
        our_logits: list[Tensor] = []
        our_hidden: list[Tensor] = []
        their_logits: list[Tensor] = []
        their_hidden: list[Tensor] = []
        try:
            true_hidden, true_logits = truth.push(ids[start : start + CHUNK])
            for token in ids[start : start + CHUNK]:
                logits = session.step(token)
                hidden = probe.step(token, logits)
                outputs = stepper.step(token)
                our_logits.append(logits)
                our_hidden += [] if hidden is None else [hidden]
                their_logits.append(outputs[0])
                their_hidden.append(outputs[1])
                pace(positions + len(their_logits))
            session.check()
        except KeyboardInterrupt:
            if not positions and not their_hidden:
                raise
            interrupted = True
        if count := len(their_hidden):
            own, other = torch.stack(our_logits[:count]), torch.stack(their_logits[:count])
            _extend(ours, compare(true_logits[:count], own))
            if own.dtype != other.dtype:
                _extend(rounded, compare(true_logits[:count], own.to(other.dtype)))
            _extend(theirs, compare(true_logits[:count], other))
            theirs.setdefault("hidden_mae", []).extend(mean_error(true_hidden[:count], torch.stack(their_hidden)))
            if len(our_hidden) >= count:
                states = torch.stack(our_hidden[:count])
                ours.setdefault("hidden_mae", []).extend(mean_error(true_hidden[:count], states))
            positions += count
        if interrupted:
            break
    return _report(sides.facts(command), source, len(ids), positions, ours, rounded, theirs, probe.reason, interrupted)


def compare(truth: Tensor, logits: Tensor) -> Columns:
    """Every measure of logits [T, vocab] against the truth [T, vocab] float64, at each position."""
    error = (logits.double() - truth).abs()
    columns = {"greedy_match": greedy_match(truth, logits)}
    columns |= {f"top_{k}": top_k_overlap(truth, logits, k) for k in (1, 5, 10)}
    columns |= {
        "logits_mae": error.mean(-1),
        "logits_max": error.amax(-1),
        "kl_nats": kl_divergence(truth, logits),
    }
    return {name: values.tolist() for name, values in columns.items()}


def mean_error(truth: Tensor, hidden: Tensor) -> list[float]:
    """Mean |hidden - truth| at each position of two [T, hidden]."""
    values: list[float] = (hidden.double() - truth).abs().mean(-1).tolist()
    return values


def _extend(columns: Columns, more: Columns) -> None:
    for name, values in more.items():
        columns.setdefault(name, []).extend(values)


def _report(
    facts: Facts,
    source: str,
    asked: int,
    positions: int,
    ours: Columns,
    rounded: Columns,
    theirs: Columns,
    hidden_note: str | None,
    interrupted: bool,
) -> QualityReport:
    if len(ours.get("hidden_mae", ())) < positions:
        ours.pop("hidden_mae", None)
    if rounded.get("logits_mae") == ours["logits_mae"]:
        rounded = {}
    rounded_max = rounded.pop("logits_max", None)
    largest = Largest(
        _largest(ours.pop("logits_max")),
        _largest(theirs.pop("logits_max")),
        None if rounded_max is None else _largest(rounded_max),
    )
    return QualityReport(
        facts=facts,
        source=source,
        asked_tokens=asked,
        positions=positions,
        measures={name: _comparison(ours.get(name), theirs.get(name), rounded.get(name)) for name in theirs},
        logits_max=largest,
        hidden_note=hidden_note,
        confidence=CONFIDENCE,
        resamples=RESAMPLES,
        seed=SEED,
        interrupted=interrupted,
    )


def _largest(values: Sequence[float]) -> float:
    """A NaN stays one, which max would hide."""
    return float(np.max(values))


def _comparison(
    ours: Sequence[float] | None, theirs: Sequence[float] | None, rounded: Sequence[float] | None
) -> Comparison:
    def estimate(values: Sequence[float] | None) -> Estimate | None:
        return None if values is None else bootstrap(values, SEED)

    with np.errstate(invalid="ignore"):  # infinities may have no difference
        both = None if ours is None or theirs is None else (np.asarray(ours) - np.asarray(theirs)).tolist()
    return Comparison(estimate(ours), estimate(theirs), estimate(both), estimate(rounded))
