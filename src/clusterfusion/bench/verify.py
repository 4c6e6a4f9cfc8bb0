"""`clusterfusion verify`: our greedy tokens against transformers', and every run's logits against the first run's bits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from clusterfusion.arguments import as_int
from clusterfusion.bench.divergence import (
    RULE,
    BitDifference,
    Divergence,
    first_bit_difference,
    first_divergence,
    little_endian,
    measure,
)
from clusterfusion.bench.evaluation import OVERFLOW, Facts, Progress, Sides
from clusterfusion.bench.texts import PROMPTS, RANDOM_LENGTHS, no_tokenizer, random_tokens
from clusterfusion.bench.truth import true_logits
from clusterfusion.engine import MODES, Engine, Session
from clusterfusion.engine.memory import require_memory
from clusterfusion.engine.modes import ModeChoice, choose_mode
from clusterfusion.errors import ArgumentError, ClusterFusionError

MOST_PROMPTS = 10_000
MOST_RUNS = 1000


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What greedy decoding starts from: a built-in text, or random tokens (`text` is None)."""

    label: str
    text: str | None
    ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class PromptResult:
    """One prompt. `same_tokens` new tokens are transformers' own before the first difference, or all of them.
    `largest_difference` is the largest |our logit - theirs| over the steps that had the same prefix."""

    label: str
    text: str | None
    prompt_tokens: int
    same_tokens: int
    largest_difference: float
    divergences: tuple[Divergence, ...]
    bit_differences: tuple[BitDifference, ...]


@dataclasses.dataclass(frozen=True)
class VerifyReport:
    """One run of `verify`. `modes` are as resolved, each with its reason; the first run of the first one is what all
    others are held to."""

    facts: Facts
    modes: tuple[ModeChoice, ...]
    runs: int
    tokens: int
    asked_prompts: int
    no_texts: str | None  # why all prompts are random tokens
    prompts: tuple[PromptResult, ...]
    interrupted: bool
    rule: str = RULE

    @property
    def divergences(self) -> list[Divergence]:
        return [found for prompt in self.prompts for found in prompt.divergences]

    @property
    def bit_differences(self) -> list[BitDifference]:
        return [found for prompt in self.prompts for found in prompt.bit_differences]

    @property
    def passed(self) -> bool:
        """Every divergence is explained, and all runs and modes are equal to the bit."""
        return not self.bit_differences and all(found.verdict != "error" for found in self.divergences)


def mode_names(modes: str) -> list[str]:
    """The names in text such as "auto" or "fused,graph". Raises ArgumentError for one that does not exist."""
    names = [name.strip() for name in modes.split(",")]
    for name in names:
        if name != "auto" and name not in MODES:
            raise ArgumentError(
                f"modes is {modes[:80]!r}; it must be 'auto' or names from {', '.join(map(repr, MODES))}, with commas "
                "between"
            )
    return names


def check_counts(prompts: int, runs: int) -> None:
    """What can be checked before a model is loaded. Raises ArgumentError."""
    as_int("prompts", prompts, 1, MOST_PROMPTS)
    as_int("runs", runs, 1, MOST_RUNS)


def resolve_modes(modes: str, engine: Engine) -> tuple[ModeChoice, ...]:
    """The modes of `mode_names` as `engine` takes them; one that comes twice counts once. Raises ArgumentError for one
    that does not exist or cannot run here."""
    chosen: dict[str, ModeChoice] = {}
    for name in mode_names(modes):
        choice = choose_mode(name, engine.config, engine.dtype, engine.device)
        chosen.setdefault(choice.name, choice)
    return tuple(chosen.values())


def make_prompts(engine: Engine, count: int, longest: int) -> list[Prompt]:
    """`count` prompts of at most `longest` tokens: built-in texts and random tokens in turn, and random tokens alone once
    the texts are used up or where there is no tokenizer."""
    made = list(_alternate(engine, count, longest))
    return made[:count]


def _alternate(engine: Engine, count: int, longest: int) -> Iterator[Prompt]:
    texts = iter(PROMPTS if engine.tokenizer is not None else ())
    for index in range(count):
        text = next(texts, None)
        if text is not None:
            yield Prompt(f"text {PROMPTS.index(text)}", text, tuple(engine.encode(text)[:longest]))
        length = min(RANDOM_LENGTHS[index % len(RANDOM_LENGTHS)], longest)
        yield Prompt(f"random {index}", None, tuple(random_tokens(engine.config.vocab_size, length, seed=index)))


@torch.no_grad()
def verify(
    sides: Sides,
    progress: Progress,
    *,
    modes: str = "auto",
    prompts: int = 16,
    tokens: int = 32,
    runs: int = 2,
    command: str = "",
) -> VerifyReport:
    """Decode `tokens` new tokens greedily after each of `prompts` prompts, `runs` times in each mode, and as transformers'
    `generate` does. Ctrl-C ends it with what is done; before the first prompt is done it is raised.

    Raises ArgumentError for unusable options, DeviceError where the sessions do not fit.
    """
    engine = sides.engine
    check_counts(prompts, runs)
    tokens = as_int("tokens", tokens, 1, engine.config.max_position - 1)
    choices = resolve_modes(modes, engine)
    todo = make_prompts(engine, prompts, engine.config.max_position - tokens)
    room = max(len(prompt.ids) for prompt in todo) + tokens
    cache_bytes = engine.config.kv_elements_per_token * room * engine.dtype.itemsize
    require_memory(f"{len(choices) * runs} sessions of {room} tokens", len(choices) * runs * cache_bytes, engine.device)
    # A session of its own for every run: other memory, and for graphs another capture.
    sessions = {
        (choice.name, run): Session(engine.weights, room, choice.name) for choice in choices for run in range(runs)
    }
    done: list[PromptResult] = []
    interrupted = False
    try:
        for prompt in todo:
            done.append(_verify_prompt(sides, prompt, tokens, sessions))
            progress(_line(done[-1], len(done), prompts, tokens))
    except KeyboardInterrupt:
        if not done:
            raise
        interrupted = True
    return VerifyReport(
        facts=sides.facts(command, ",".join(choice.name for choice in choices)),
        modes=choices,
        runs=runs,
        tokens=tokens,
        asked_prompts=prompts,
        no_texts=no_tokenizer(engine) if engine.tokenizer is None else None,
        prompts=tuple(done),
        interrupted=interrupted,
    )


def decode(session: Session, ids: tuple[int, ...], tokens: int) -> tuple[list[int], Tensor]:
    """`tokens` greedy tokens after `ids`, and the logits [tokens, vocab] that each was chosen from."""
    session.reset()
    rows = [session.prefill(ids)]
    chosen = [int(rows[0].argmax())]
    while len(chosen) < tokens:
        rows.append(session.step(chosen[-1]))
        chosen.append(int(rows[-1].argmax()))
    session.check()
    return chosen, torch.stack(rows)


def _verify_prompt(sides: Sides, prompt: Prompt, tokens: int, sessions: dict[tuple[str, int], Session]) -> PromptResult:
    their_tokens, their_logits = sides.peer.greedy(prompt.ids, tokens)
    divergences: list[Divergence] = []
    bits: list[BitDifference] = []
    first: tuple[str, Tensor] | None = None
    same = tokens
    apart = 0.0
    for (mode, run), session in sessions.items():
        our_tokens, our_logits = decode(session, prompt.ids, tokens)
        _require_finite(our_logits, mode, prompt)
        if first is None:
            first = (mode, our_logits)
        else:
            difference = _bit_difference(mode, run, first, our_logits)
            if difference is None:
                continue
            bits.append(difference)
        step = first_divergence(our_tokens, their_tokens)
        apart = max(apart, _largest(our_logits, their_logits, tokens if step is None else step + 1))
        if step is None:
            continue
        same = min(same, step)
        truth = true_logits(sides.engine.weights, [*prompt.ids, *our_tokens[:step]])
        pair = (our_tokens[step], their_tokens[step])
        texts = (_text(sides.engine, pair[0]), _text(sides.engine, pair[1]))
        logits = (our_logits[step], their_logits[step])
        divergences.append(measure(mode, len(prompt.ids), step, pair, texts, logits, truth, sides.engine.dtype))
    return PromptResult(prompt.label, prompt.text, len(prompt.ids), same, apart, tuple(divergences), tuple(bits))


def _require_finite(logits: Tensor, mode: str, prompt: Prompt) -> None:
    """Raise ClusterFusionError if they are not: then the largest of them means nothing, be it the same token everywhere."""
    bad = (~logits.isfinite()).any(-1).nonzero()
    if len(bad):
        raise ClusterFusionError(
            f"mode {mode}, prompt {prompt.label}: the model's logits are not finite at new token {int(bad[0])}; {OVERFLOW}"
        )


def _largest(ours: Tensor, theirs: Tensor, steps: int) -> float:
    apart = (ours[:steps].double() - theirs[:steps].to(ours.device).double()).abs().max()
    return float(apart.nan_to_num(nan=math.inf))


def _bit_difference(mode: str, run: int, first: tuple[str, Tensor], logits: Tensor) -> BitDifference | None:
    found = first_bit_difference(first[1], logits)
    if found is None:
        return None
    step, coordinate, differing = found
    before, now = first[1][step, coordinate], logits[step, coordinate]
    return BitDifference(
        mode=mode,
        run=run,
        first_mode=first[0],
        step=step,
        coordinate=coordinate,
        differing=differing,
        first_value=float(before),
        first_bytes=little_endian(before),
        value=float(now),
        bytes=little_endian(now),
    )


def _text(engine: Engine, token: int) -> str | None:
    return None if engine.tokenizer is None else engine.tokenizer.decode([token])


def _line(result: PromptResult, done: int, prompts: int, tokens: int) -> str:
    said = [f"{result.same_tokens} of {tokens} tokens as transformers"]
    said += [f"{found.verdict} at step {found.step}" for found in result.divergences]
    if result.bit_differences:
        said.append(f"{len(result.bit_differences)} runs differ in bits")
    return f"prompt {done} of {prompts} ({result.label}, {result.prompt_tokens} tokens): {', '.join(said)}"
