"""`clusterfusion perplexity`: sliding windows through decoding, through prefill, and through transformers.

A window's first tokens are context alone, scored by the window before; each token of the text but the first is scored
once. All three paths see the same windows, at positions from 0, and probabilities are taken in float64.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from clusterfusion.arguments import as_int
from clusterfusion.bench.agreement import negative_log_likelihood
from clusterfusion.bench.evaluation import Facts, Pace, Progress, Sides
from clusterfusion.bench.texts import (
    DEFAULT_DATASET,
    check_dataset_name,
    dataset_text,
    default_text,
    encode,
    has_datasets,
    read_text,
    text_bytes,
)
from clusterfusion.engine import Engine, Session
from clusterfusion.engine.loading import DEMO
from clusterfusion.engine.memory import require_memory
from clusterfusion.errors import ArgumentError

DEFAULT_WINDOW = 1024
DEFAULT_MAX_TOKENS = 4096
MOST_TOKENS = 10**9
_MOST_NATS = math.log(sys.float_info.max)  # whose exp is a number
PEER = "transformers"
PATHS = ("decode", "prefill", PEER)


@dataclasses.dataclass(frozen=True)
class Window:
    """Tokens `start` … `end - 1` of the text, of which those from `first` on are scored."""

    start: int
    end: int
    first: int


@dataclasses.dataclass(frozen=True)
class Loss:
    """A path's cost of the scored tokens."""

    nats_per_token: float
    perplexity: float
    bits_per_byte: float


@dataclasses.dataclass(frozen=True)
class Difference:
    """Between two paths' costs, token by token, in nats: the mean of (one - other), and the largest |one - other|."""

    mean_nats: float
    largest_nats: float
    perplexity: float  # of one less that of the other


@dataclasses.dataclass(frozen=True)
class PerplexityReport:
    """One run of `perplexity`. `scored_bytes` is what the scored tokens decode to, in UTF-8."""

    facts: Facts
    source: str
    text_tokens: int
    window: int
    stride: int
    windows: int
    asked_windows: int
    scored_tokens: int
    scored_bytes: int
    losses: Mapping[str, Loss]
    differences: Mapping[str, Difference]  # by "one - other"
    interrupted: bool

    @property
    def not_finite(self) -> tuple[str, ...]:
        """The paths whose perplexity is not finite."""
        return tuple(path for path, loss in self.losses.items() if not math.isfinite(loss.perplexity))

    @property
    def passed(self) -> bool:
        """Whether our paths have one that is; transformers may lack it."""
        return set(self.not_finite) <= {PEER}


def make_windows(tokens: int, window: int, stride: int) -> list[Window]:
    """Windows of at most `window` tokens that advance by `stride` until every token but the first is scored once."""
    made: list[Window] = []
    scored = 1
    for start in range(0, tokens, stride):
        end = min(start + window, tokens)
        if end > scored:
            made.append(Window(start, end, scored))
        scored = max(scored, end)
        if end == tokens:
            break
    return made


def check_source(text_file: Path | None, dataset: str | None) -> None:
    """Raise ArgumentError where both are named, and for what cannot name a data set."""
    if text_file is not None and dataset is not None:
        raise ArgumentError(f"--text is {str(text_file)!r} and --dataset is {dataset!r}; give one of them")
    if dataset is not None:
        check_dataset_name(dataset)


def perplexity_text(engine: Engine, text_file: Path | None, dataset: str | None) -> tuple[str, str]:
    """The text and where it comes from: a file, a data set, the demo model's held-out excerpt, or wikitext-2.

    Raises ArgumentError where both are named, or nothing is and wikitext-2 cannot be had.
    """
    check_source(text_file, dataset)
    if text_file is not None:
        return read_text(text_file), str(text_file)
    if dataset is not None:
        return dataset_text(dataset), dataset
    if engine.name == DEMO:
        return default_text(engine)
    if not has_datasets():
        raise ArgumentError(
            f"--text is left out, and the package datasets, which would give {DEFAULT_DATASET}, is not installed; name a "
            "file with --text FILE, or pip install datasets"
        )
    return dataset_text(), DEFAULT_DATASET


@torch.no_grad()
def perplexity(
    sides: Sides,
    progress: Progress,
    *,
    text_file: Path | None = None,
    dataset: str | None = None,
    window: int | None = None,
    stride: int | None = None,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    command: str = "",
) -> PerplexityReport:
    """Score a text's first `max_tokens` tokens by all three paths. `window` is the context in tokens (None: 1024, or the
    model's limit), `stride` how far it advances (None: half of it). Ctrl-C ends it with the windows that are done; before
    the first one it is raised.

    Raises ArgumentError for unusable options, DeviceError where the caches do not fit.
    """
    engine = sides.engine
    limit = engine.config.max_position
    window = as_int("window", min(DEFAULT_WINDOW, limit) if window is None else window, 2, limit)
    stride = as_int("stride", max(window // 2, 1) if stride is None else stride, 1, window - 1)
    max_tokens = as_int("max_tokens", max_tokens, 2, MOST_TOKENS)
    text, source = perplexity_text(engine, text_file, dataset)
    ids = encode(engine, text)[:max_tokens]
    if len(ids) < 2:
        raise ArgumentError(f"--text is {source!r}, which makes {len(ids)} token; it must make at least two")
    todo = make_windows(len(ids), window, stride)
    room = min(window, len(ids))
    cache_bytes = 2 * engine.config.kv_elements_per_token * room * engine.dtype.itemsize
    require_memory(f"two K/V caches of {room} tokens", cache_bytes, engine.device)
    session = Session(engine.weights, room, engine.mode)
    prompts = Session(engine.weights, room, engine.mode)
    steps = Pace(progress, "decoded tokens", sum(w.end - w.start - 1 for w in todo))
    progress(f"{len(ids)} tokens in {len(todo)} windows of {room}, stride {stride} ({source})")
    nats: dict[str, list[Tensor]] = {path: [] for path in PATHS}
    done = decoded = 0
    interrupted = False
    try:
        for one in todo:
            tokens = ids[one.start : one.end]
            scored = len(tokens) - (one.end - one.first)  # where they begin, in the window
            results = (
                _decode(session, tokens, scored, steps, decoded),
                _prefill(prompts, tokens, scored),
                _score(sides.peer.logits(tokens), tokens, scored),
            )
            for path, values in zip(PATHS, results, strict=True):
                nats[path].append(values.cpu())
            decoded += len(tokens) - 1
            done += 1
    except KeyboardInterrupt:
        if not done:
            raise
        interrupted = True
    end = todo[done - 1].end
    return _report(
        sides.facts(command),
        source=source,
        text_tokens=len(ids),
        window=window,
        stride=stride,
        windows=done,
        asked_windows=len(todo),
        scored_bytes=text_bytes(engine, ids[:end]),
        nats={path: torch.cat(nats[path][:done]) for path in PATHS},
        interrupted=interrupted,
    )


def _decode(session: Session, tokens: list[int], scored: int, pace: Pace, decoded: int) -> Tensor:
    """Nats of `tokens[scored:]`, each after a step of the one before it."""
    session.reset()
    values = []
    for index, token in enumerate(tokens[:-1]):
        logits = session.step(token)
        if index + 1 >= scored:
            target = torch.tensor([tokens[index + 1]], device=logits.device)
            values.append(negative_log_likelihood(logits[None], target))
        pace(decoded + index + 1)
    session.check()
    return torch.cat(values)


def _prefill(session: Session, tokens: list[int], scored: int) -> Tensor:
    """The same in one call, as the engine takes in a prompt in its mode."""
    session.reset()
    return _score(session.prefill_all(tokens), tokens, scored)


def _score(logits: Tensor, tokens: list[int], scored: int) -> Tensor:
    """Nats of `tokens[scored:]` by the logits [T, vocab] of the tokens before them."""
    targets = torch.tensor(tokens[scored:], device=logits.device)
    return negative_log_likelihood(logits[scored - 1 : -1], targets)


def _report(
    facts: Facts,
    *,
    source: str,
    text_tokens: int,
    window: int,
    stride: int,
    windows: int,
    asked_windows: int,
    scored_bytes: int,
    nats: Mapping[str, Tensor],
    interrupted: bool,
) -> PerplexityReport:
    losses = {path: loss(values, scored_bytes) for path, values in nats.items()}
    pairs = (("decode", "transformers"), ("prefill", "transformers"), ("decode", "prefill"))
    differences = {}
    for one, other in pairs:
        apart = nats[one] - nats[other]
        differences[f"{one} - {other}"] = Difference(
            mean_nats=float(apart.mean()),
            largest_nats=float(apart.abs().max()),
            perplexity=losses[one].perplexity - losses[other].perplexity,
        )
    return PerplexityReport(
        facts=facts,
        source=source,
        text_tokens=text_tokens,
        window=window,
        stride=stride,
        windows=windows,
        asked_windows=asked_windows,
        scored_tokens=len(nats["decode"]),
        scored_bytes=scored_bytes,
        losses=losses,
        differences=differences,
        interrupted=interrupted,
    )


def loss(nats: Tensor, scored_bytes: int) -> Loss:
    """The cost of tokens that took `nats` each and stand for `scored_bytes` bytes together."""
    mean = float(nats.mean())
    bits = float(nats.sum()) / math.log(2) / scored_bytes if scored_bytes > 0 else math.nan
    return Loss(mean, math.inf if mean > _MOST_NATS else math.exp(mean), bits)
