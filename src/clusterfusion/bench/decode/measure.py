"""The run of `bench decode`: at every context all loops are made and warmed up, then visited in turn, round by round."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from clusterfusion.bench import costs, environment
from clusterfusion.bench.clocks import ClockSampler, Span
from clusterfusion.bench.decode.loops import Decoded, EngineLoop, Loop, choose_modes
from clusterfusion.bench.decode.options import DecodeOptions
from clusterfusion.bench.decode.peers import EAGER, EAGER_RUNS, PeerLoops
from clusterfusion.bench.decode.report import ContextTimes, DecodeReport, LoopTimes, ModelFacts
from clusterfusion.bench.device_timer import DeviceTimer
from clusterfusion.bench.peers import PEERS, forget_compiled
from clusterfusion.bench.read_ceiling import LEAD_BYTES, ReadCeiling, data_bytes
from clusterfusion.bench.samples import Candidate, Timing, one_line, round_robin
from clusterfusion.bench.texts import random_tokens
from clusterfusion.engine import Engine
from clusterfusion.engine.memory import require_memory
from clusterfusion.errors import ArgumentError, DeviceError
from clusterfusion.jit.read_ceiling import VARIANTS

READS_A_ROUND = 20  # of each of the read ceiling's variants

Progress = Callable[[str], None]
OnShare = Callable[[float], None]


@dataclasses.dataclass
class _Entry:
    """A loop at one context that has been warmed up, what it made then, and its timed runs, with the time of each."""

    loop: Loop
    token_ids: tuple[int, ...]
    peak_bytes: int | None
    runs: list[Decoded] = dataclasses.field(default_factory=list)
    spans: list[Span] = dataclasses.field(default_factory=list)


class _Run:
    """What stays the same over all contexts."""

    def __init__(self, engine: Engine, options: DecodeOptions, progress: Progress, on_share: OnShare) -> None:
        self.engine, self.options, self.progress = engine, options, progress
        self.modes, self.left_out = choose_modes(options.modes, engine)
        if options.modes_named and len(self.left_out) == len(options.modes):
            reasons = "; ".join(dict.fromkeys(self.left_out.values()))
            raise ArgumentError(
                f"modes is {','.join(options.modes)!r}, and none of them can run here: {reasons}; name reference, or leave "
                "it out"
            )
        self.on_share = on_share
        self.contexts_done = self.steps_done = 0
        self.missing: list[str] = []
        self.ceiling = self._make_ceiling()
        self.timer = DeviceTimer(self.ceiling.lead) if self.ceiling else None
        self.peers = PeerLoops(engine.weights) if options.peer_contexts else None
        self.peer_names = PEERS if engine.device.type == "cuda" else (EAGER,)
        if self.peers and self.peer_names != PEERS:
            others = " and ".join(name for name in PEERS if name not in self.peer_names)
            self.missing.append(f"{others}, which need an NVIDIA GPU")

    def _make_ceiling(self) -> ReadCeiling | None:
        engine = self.engine
        loops = len(self.modes) + len(PEERS) * bool(self.options.peer_contexts)
        caches = loops * self.options.room * engine.config.kv_elements_per_token * engine.dtype.itemsize
        what = f"bench decode of {engine.name}"
        if engine.device.type != "cuda":
            require_memory(what, caches, engine.device)
            self.missing.append("the read ceiling, and so the floor: PyTorch sees no NVIDIA GPU here")
            return None
        read_bytes = data_bytes(costs.whole_step_weight_bytes(engine.config, engine.dtype.itemsize))
        require_memory(what, caches + read_bytes + LEAD_BYTES, engine.device)
        self.progress(f"read ceiling: {read_bytes / 1e9:.1f} GB of random data")
        try:
            ceiling = ReadCeiling(read_bytes, engine.device)
        except DeviceError as error:
            self.missing.append(f"the read ceiling, and so the floor: {error}")
            return None
        ceiling.check()
        return ceiling

    def context(self, context: int) -> ContextTimes:
        """Everything at one context. Frees what it made, but for the weights, before it returns."""
        self.steps_done = 0
        try:
            times = self._context(context)
        finally:
            if self.engine.device.type == "cuda":
                forget_compiled()
        self.contexts_done += 1
        self.on_share(self.contexts_done / len(self.options.contexts))
        return times

    def _step_done(self, context: int) -> None:
        """A loop is prepared or visited; so many steps are a context."""
        loops = len(self.modes) + len(self.peer_names) * (context in self.options.peer_contexts)
        steps = loops + self.options.runs * (loops + len(VARIANTS) * (self.ceiling is not None))
        self.steps_done = min(self.steps_done + 1, steps)
        self.on_share((self.contexts_done + self.steps_done / steps) / len(self.options.contexts))

    def _context(self, context: int) -> ContextTimes:
        options = self.options
        ids = random_tokens(self.engine.config.vocab_size, context, seed=context)
        peers = self.peer_names if context in options.peer_contexts else ()
        # Peers first: while torch.compile records, it drops the workspaces that the graph mode's library calls write to.
        entries, errors = self._set_up_peers(peers, context, ids)
        for mode in self.modes:
            self.progress(f"context {context}: preparing {mode.name}")
            entries[mode.name] = self._warm_up(
                partial(EngineLoop, self.engine, mode, options.room, ids, options.new_tokens)
            )
            self._step_done(context)
        self.progress(f"context {context}: measuring {', '.join(entries)}")
        candidates = self.ceiling.candidates(READS_A_ROUND * options.runs) if self.ceiling else []
        for name, entry in entries.items():
            runs = min(EAGER_RUNS, options.runs) if name == EAGER else options.runs
            candidates.append(Candidate(name, _nothing, entry.loop.decode, runs, may_fail=name in PEERS))

        def sample(candidate: Candidate, count: int) -> list[float]:
            times = self._sample(candidate, count, entries)
            self._step_done(context)
            return times

        with ClockSampler(self.engine.device) as clocks:
            timings = round_robin(candidates, sample, options.runs)
        said = f"the GPU's clocks: {clocks.obstacle}"
        if clocks.obstacle and self.engine.device.type == "cuda" and said not in self.missing:
            self.missing.append(said)  # once; a loop without clocks says where
        made = [mode.name for mode in self.modes]
        expected = entries[made[0]].token_ids
        errors |= {name: timings[name].error for name in peers if name in entries and timings[name].error is not None}
        return ContextTimes(
            context=context,
            modes={name: _times(entries[name], expected, clocks) for name in made},
            peers={
                name: LoopTimes((), (), error=errors[name])
                if name in errors
                else _times(entries[name], expected, clocks)
                for name in peers
            },
            read_ms=_read_times(timings),
            differences=tuple(_differences(context, {name: entries[name] for name in made})),
        )

    def _set_up_peers(
        self, names: Sequence[str], context: int, ids: list[int]
    ) -> tuple[dict[str, _Entry], dict[str, str | None]]:
        entries: dict[str, _Entry] = {}
        errors: dict[str, str | None] = {}
        for name in names:
            assert self.peers is not None
            self.progress(f"context {context}: preparing {name}")
            try:
                entries[name] = self._warm_up(partial(self.peers.make, name, ids, self.options.new_tokens))
            except Exception as error:
                errors[name] = one_line(error)
                self.progress(f"context {context}: {name} failed: {errors[name]}")
            self._step_done(context)
        return entries, errors

    def _warm_up(self, make: Callable[[], Loop]) -> _Entry:
        """Make a loop and run it untimed, seeing what memory it takes."""
        device = self.engine.device
        before = 0
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
        loop = make()
        token_ids = loop.decode().token_ids
        peak = None
        if device.type == "cuda":
            peak = self.engine.weights.num_bytes + torch.cuda.max_memory_allocated(device) - before
        return _Entry(loop, token_ids, peak)

    def _sample(self, candidate: Candidate, count: int, entries: dict[str, _Entry]) -> list[float]:
        entry = entries.get(candidate.name)
        if entry is None:
            assert self.timer is not None
            return self.timer(candidate, count)
        for _ in range(count):
            begin = time.perf_counter()
            entry.runs.append(entry.loop.decode())
            entry.spans.append((begin, time.perf_counter()))
        return [run.ms_per_token for run in entry.runs[-count:]]


@torch.no_grad()
def measure_decode(
    engine: Engine,
    options: DecodeOptions,
    progress: Progress,
    command: str = "",
    on_context: Callable[[DecodeReport], None] = lambda report: None,
    on_share: OnShare = lambda share: None,
) -> DecodeReport:
    """Everything in one run on `engine`'s weights and device, whose own mode does not matter. `on_context` gets the report
    so far after every context, `on_share` the share of the work that is done, between the timed runs. Ctrl-C ends the run
    with what is done; before the first context is done it is raised.

    Raises ArgumentError where the caller named modes of which none can run; DeviceError without the memory, or when one of
    our modes fails. A peer that fails is in the report and ends nothing; so are tokens of our modes that differ.
    """
    run = _Run(engine, options, progress, on_share)
    config, weights = engine.config, engine.weights
    report = DecodeReport(
        options=options,
        origin=environment.origin(command, engine.device),
        model=ModelFacts(
            name=engine.name,
            config=config,
            dtype=str(weights.dtype).removeprefix("torch."),
            element_bytes=weights.dtype.itemsize,
            has_tokenizer=engine.tokenizer is not None,
        ),
        left_out=run.left_out,
        missing=tuple(run.missing),
        read_bytes=run.ceiling.num_bytes if run.ceiling else 0,
        contexts=(),
    )
    try:
        for context in options.contexts:
            times = run.context(context)
            report = dataclasses.replace(report, contexts=(*report.contexts, times), missing=tuple(run.missing))
            measured = {name: loop.summary.median_ms for name, loop in times.loops.items() if loop.ms_per_token}
            said = ", ".join(f"{name} {ms:.3f}" for name, ms in measured.items())
            progress(f"context {context}: ms a token: {said}")
            on_context(report)
    except KeyboardInterrupt:
        if not report.contexts:
            raise
        return dataclasses.replace(report, interrupted=True)
    return report


def same_tokens(expected: Sequence[int], seen: Sequence[int]) -> int:
    """How many tokens are the same before the first difference."""
    for index, (ours, theirs) in enumerate(zip(expected, seen, strict=False)):
        if ours != theirs:
            return index
    return min(len(expected), len(seen))


def _times(entry: _Entry, expected: Sequence[int], clocks: ClockSampler) -> LoopTimes:
    return LoopTimes(
        ms_per_token=tuple(run.ms_per_token for run in entry.runs),
        first_token_ms=tuple(run.first_token_ms for run in entry.runs),
        same_tokens=same_tokens(expected, entry.token_ids),
        peak_bytes=entry.peak_bytes,
        clocks=clocks.during(entry.spans),
    )


def _differences(context: int, entries: dict[str, _Entry]) -> list[str]:
    """Where a run of a mode differs from its first one, or a mode from the first one. The reference mode sums in another
    order, so it is only held to itself."""
    found = []
    kernels = [name for name in entries if name != "reference"]
    for name, entry in entries.items():
        other = next((run.token_ids for run in entry.runs if run.token_ids != entry.token_ids), None)
        if other is not None:
            same = same_tokens(entry.token_ids, other)
            found.append(f"context {context}: two runs of {name} differ from new token {same} on")
        if name in kernels[1:] and entry.token_ids != entries[kernels[0]].token_ids:
            same = same_tokens(entries[kernels[0]].token_ids, entry.token_ids)
            found.append(f"context {context}: {name} and {kernels[0]} differ from new token {same} on")
    return found


def _read_times(timings: dict[str, Timing]) -> dict[str, tuple[float, ...]]:
    return {variant: timings[variant].times_ms for variant in VARIANTS if variant in timings}


def _nothing() -> None:
    pass
