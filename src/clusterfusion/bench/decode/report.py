"""The results of `bench decode` as data: what was timed, and from it ratios, slopes and JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from clusterfusion.architecture import DecoderConfig
from clusterfusion.bench import costs
from clusterfusion.bench.clocks import Clocks
from clusterfusion.bench.decode.options import DecodeOptions
from clusterfusion.bench.environment import Origin
from clusterfusion.bench.read_ceiling import ReadSpeeds
from clusterfusion.bench.samples import Summary, least_squares_slope, summarise

FORMAT = 1  # of the JSON; grows when a field changes its meaning or goes away
SCOPE = (
    "wall time a token of whole greedy generate loops after a prompt of random tokens, batch 1: embedding, layers, LM head, "
    "choice of the token, and what the host does; the first token, which takes in the prompt, is apart"
)


@dataclasses.dataclass(frozen=True)
class ModelFacts:
    """What was decoded."""

    name: str
    config: DecoderConfig
    dtype: str
    element_bytes: int
    has_tokenizer: bool


@dataclasses.dataclass(frozen=True)
class LoopTimes:
    """One loop at one context: a time a token and a time to the first one for every run, none if it failed.

    same_tokens: how many tokens are our first mode's own before the first difference.
    peak_bytes: of PyTorch's memory on the GPU, the weights and what this loop held beside them.
    clocks: of the GPU in all runs, their prompts included; None where nobody could look, or all runs were over before anybody did.
    """

    ms_per_token: tuple[float, ...]
    first_token_ms: tuple[float, ...]
    same_tokens: int | None = None
    peak_bytes: int | None = None
    error: str | None = None
    clocks: Clocks | None = None

    @property
    def summary(self) -> Summary:
        return summarise(self.ms_per_token)


@dataclasses.dataclass(frozen=True)
class ContextTimes:
    """What was timed after prompts of `context` tokens, by name. `read_ms` are the read ceiling's variants, timed in the
    same rounds. `differences` say where tokens differ that must not."""

    context: int
    modes: Mapping[str, LoopTimes]
    peers: Mapping[str, LoopTimes]
    read_ms: Mapping[str, tuple[float, ...]]
    differences: tuple[str, ...]

    @property
    def loops(self) -> dict[str, LoopTimes]:
        """All of them, ours first."""
        return {**self.modes, **self.peers}


@dataclasses.dataclass(frozen=True)
class DecodeReport:
    """One run. `left_out` are modes that cannot run here, with the reason; `missing` is what else could not be had.
    `read_bytes` is what the read ceiling's variants read, 0 without a ceiling."""

    options: DecodeOptions
    origin: Origin
    model: ModelFacts
    left_out: Mapping[str, str]
    missing: tuple[str, ...]
    read_bytes: int
    contexts: tuple[ContextTimes, ...]
    interrupted: bool = False

    @property
    def read(self) -> ReadSpeeds | None:
        """The read ceiling, of all contexts together; None without one."""
        times: dict[str, list[float]] = {}
        for context in self.contexts:
            for variant, taken in context.read_ms.items():
                times.setdefault(variant, []).extend(taken)
        return ReadSpeeds(self.read_bytes, {name: summarise(taken) for name, taken in times.items()}) if times else None

    @property
    def differences(self) -> list[str]:
        return [said for context in self.contexts for said in context.differences]

    @property
    def weight_bytes(self) -> int:
        """Of weights that a step reads."""
        return costs.whole_step_weight_bytes(self.model.config, self.model.element_bytes)

    @property
    def kv_bytes_a_token(self) -> int:
        return self.model.config.kv_elements_per_token * self.model.element_bytes

    def step_bytes(self, context: int) -> float:
        """Bytes that a step reads, on average over the new tokens after `context`."""
        return costs.decode_bytes(self.model.config, context, self.options.new_tokens, self.model.element_bytes)

    def floor_ms(self, context: int) -> float | None:
        """Milliseconds a token that nobody can beat after `context` tokens; None without a ceiling."""
        read = self.read
        return costs.floor_ms(self.step_bytes(context), read.ceiling) if read else None

    def ratio(self, context: int, ms: float) -> float | None:
        """Of `ms` a token to the floor."""
        floor = self.floor_ms(context)
        return ms / floor if floor else None

    def slope(self, mode: str) -> float | None:
        """Milliseconds a token that one more cached token costs in `mode`, by least squares over the contexts; None with
        fewer than two."""
        points = [
            (
                costs.mean_cached_tokens(times.context, self.options.new_tokens),
                times.modes[mode].summary.median_ms,
            )
            for times in self.contexts
        ]
        return least_squares_slope(points) if len(points) > 1 else None

    def relative_slope(self, mode: str) -> float | None:
        """The slope over the time that reading one token's keys and values takes at the read ceiling."""
        slope, read = self.slope(mode), self.read
        if slope is None or read is None:
            return None
        return slope / costs.floor_ms(self.kv_bytes_a_token, read.ceiling)


def speedups(times: ContextTimes, mode: str) -> dict[str, float]:
    """How many times as long each peer that did not fail takes as `mode`."""
    ours = times.modes[mode].summary.median_ms
    return {name: peer.summary.median_ms / ours for name, peer in times.peers.items() if peer.ms_per_token}


def to_json(report: DecodeReport) -> dict[str, Any]:
    """The report as JSON values. Times in ms, sizes in bytes."""
    config, options, read = report.model.config, report.options, report.read
    modes = list(report.contexts[0].modes) if report.contexts else []
    return {
        "benchmark": "decode",
        "format": FORMAT,
        "scope": SCOPE,
        **dataclasses.asdict(report.origin),
        "model": {
            "name": report.model.name,
            "family": config.family,
            "parameters": config.num_parameters,
            "layers": config.num_layers,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_heads": config.num_heads,
            "num_kv_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "vocab_size": config.vocab_size,
            "dtype": report.model.dtype,
            "has_tokenizer": report.model.has_tokenizer,
        },
        "new_tokens": options.new_tokens,
        "runs": options.runs,
        "asked_modes": list(options.modes),
        "asked_contexts": list(options.contexts),
        "left_out": dict(report.left_out),
        "missing": list(report.missing),
        "interrupted": report.interrupted,
        "bytes": {"weights": report.weight_bytes, "kv_a_token": report.kv_bytes_a_token},
        "read_ceiling": read.to_json() if read else None,
        "slopes": {
            mode: {"ms_a_cached_token": report.slope(mode), "ratio_to_floor": report.relative_slope(mode)}
            for mode in modes
        },
        "contexts": [_context_json(report, times) for times in report.contexts],
    }


def _context_json(report: DecodeReport, times: ContextTimes) -> dict[str, Any]:
    modes = {
        name: _loop_json(report, times.context, loop) | {"speedup_over": speedups(times, name)}
        for name, loop in times.modes.items()
    }
    return {
        "context": times.context,
        "mean_cached_tokens": costs.mean_cached_tokens(times.context, report.options.new_tokens),
        "bytes": report.step_bytes(times.context),
        "floor_ms": report.floor_ms(times.context),
        "modes": modes,
        "peers": {name: _loop_json(report, times.context, loop) for name, loop in times.peers.items()},
        "differences": list(times.differences),
        "read_ms": {variant: list(taken) for variant, taken in times.read_ms.items()},
    }


def _loop_json(report: DecodeReport, context: int, loop: LoopTimes) -> dict[str, Any]:
    if not loop.ms_per_token:
        return {"error": loop.error}
    summary = loop.summary
    return dataclasses.asdict(summary) | {
        "tokens_per_s": 1e3 / summary.median_ms,
        "ratio_to_floor": report.ratio(context, summary.median_ms),
        "bytes_per_s": report.step_bytes(context) / summary.median_ms * 1e3,
        "first_token_ms": summarise(loop.first_token_ms).median_ms,
        "peak_bytes": loop.peak_bytes,
        "same_tokens": loop.same_tokens,
        "clocks": dataclasses.asdict(loop.clocks) if loop.clocks else None,
        "error": loop.error,
        "runs": [
            {"ms_per_token": ms, "first_token_ms": first}
            for ms, first in zip(loop.ms_per_token, loop.first_token_ms, strict=True)
        ],
    }
