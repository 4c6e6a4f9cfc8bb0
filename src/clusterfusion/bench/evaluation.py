"""What `verify`, `quality` and `perplexity` share: both sides of a comparison, the facts of a run, progress, JSON."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from clusterfusion import checkpoint
from clusterfusion.bench.causal_lm import CausalLM
from clusterfusion.bench.environment import origin
from clusterfusion.bench.options import require_one_source
from clusterfusion.engine import Engine, load
from clusterfusion.engine.loading import DEMO, demo_folder

FORMAT = 1  # of the JSON; grows when a field changes its meaning or goes away
_PACE_S = 2.0

Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Facts:
    """What was evaluated, on what, with which sources: what makes a result file evidence."""

    model: str
    family: str
    parameters: int
    mode: str
    mode_reason: str
    dtype: str
    transformers_weights: str
    device: Mapping[str, Any]
    versions: Mapping[str, str | None]
    source_digest: str
    command: str
    date: str


@dataclasses.dataclass(frozen=True)
class Sides:
    """Our engine and transformers' model on the same weights, dtype and device."""

    engine: Engine
    peer: CausalLM

    def facts(self, command: str, mode: str | None = None) -> Facts:
        engine = self.engine
        return Facts(
            model=engine.name,
            family=engine.config.family,
            parameters=engine.config.num_parameters,
            mode=mode or engine.mode,
            mode_reason=engine.mode_reason,
            dtype=str(engine.dtype).removeprefix("torch."),
            transformers_weights=self.peer.weights,
            **vars(origin(command, engine.device)),
        )


def load_sides(
    model: str | None,
    *,
    random_weights: str | None = None,
    mode: str = "auto",
    dtype: str | None = None,
    device: str | None = None,
) -> Sides:
    """Both sides of `model` (a hub id, a folder or "demo") or of a named shape with random weights.

    Raises as `load` does, and ClusterFusionError where transformers is missing or does not load the model.
    """
    require_one_source("an evaluation", model, random_weights)
    engine = load(model, random_weights=random_weights, mode=mode, dtype=dtype, device=device)
    if model is None:
        return Sides(engine, CausalLM.shared(engine.weights))
    folder = demo_folder() if model == DEMO else checkpoint.locate(model)
    return Sides(engine, CausalLM.from_folder(folder, engine.dtype, engine.device, engine.weights.num_bytes))


class Pace:
    """Says how far a long loop is, every two seconds at most."""

    def __init__(self, progress: Progress, what: str, total: int) -> None:
        self._progress, self._what, self._total = progress, what, total
        self._said = time.monotonic()

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if now - self._said >= _PACE_S:
            self._said = now
            self._progress(f"{self._what}: {done} of {self._total}")


def to_json(evaluation: str, report: Any) -> dict[str, Any]:
    """A report dataclass as JSON values, with the evaluation's name and the format. Numbers that JSON lacks (NaN and
    infinities) become text."""
    return {"evaluation": evaluation, "format": FORMAT} | plain(dataclasses.asdict(report))


def plain(value: Any) -> Any:
    """A value as JSON has it: numbers that JSON lacks become text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


OVERFLOW = "it may be that activations overflow the dtype; bfloat16 and float32 have room for more"


def not_finite(whose: str) -> str:
    """What is to be said of `whose` numbers where some are not finite."""
    return f"NOT FINITE: {whose}; {OVERFLOW}"


def heading(facts: Facts) -> str:
    """One line: the model, how it ran, and on what."""
    return f"{facts.model}, {facts.dtype}, mode {facts.mode}, on {facts.device['name']}, beside transformers"
