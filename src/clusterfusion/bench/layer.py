"""`bench layer`: decoder layers alone, without embedding and LM head, one stream at batch 1, with random weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from clusterfusion import reference
from clusterfusion.bench import costs, environment
from clusterfusion.bench.device_timer import DeviceTimer
from clusterfusion.bench.environment import require_gpu
from clusterfusion.bench.forms import FORMS, Form, agreed_output
from clusterfusion.bench.options import LayerOptions
from clusterfusion.bench.peers import CACHE_UNIT, PEERS, Peers, PeerSetup
from clusterfusion.bench.read_ceiling import LEAD_BYTES, ReadCeiling, ReadSpeeds, data_bytes
from clusterfusion.bench.report import ContextTimes, LayerReport, PeerNote
from clusterfusion.bench.samples import Timing, round_robin, summarise
from clusterfusion.engine.memory import require_memory
from clusterfusion.jit.read_ceiling import VARIANTS
from clusterfusion.random_weights import random_weights, uniform
from clusterfusion.weights import DecoderWeights

SEED = 0
_VOCABULARY = 64  # nothing reads the embedding; transformers wants one
_KEYS, _VALUES, _RESIDUAL = 101, 102, 103  # streams of random values; any numbers

Progress = Callable[[str], None]


@torch.no_grad()
def measure_layers(
    options: LayerOptions,
    progress: Progress,
    command: str = "",
    on_context: Callable[[LayerReport], None] = lambda report: None,
) -> LayerReport:
    """Everything in one run on the current GPU. `progress` gets a line now and then; `command` goes into the report;
    `on_context` gets the report so far after every context. Ctrl-C ends the run with what is done; before the first context is
    done it is raised.

    Raises DeviceError without a GPU that runs the kernels, or without the memory; ClusterFusionError when the launch
    forms differ in a bit or give what is not finite. A peer that fails is in the report and ends nothing.
    """
    device = require_gpu("bench layer")
    config = dataclasses.replace(options.config, vocab_size=_VOCABULARY)
    dtype = getattr(torch, options.dtype)
    room = -(-(max(options.contexts) + 1) // CACHE_UNIT) * CACHE_UNIT
    read_bytes = data_bytes(costs.weight_bytes(config))
    kv_copies = 1 + len(PEERS) * bool(options.peer_contexts)
    needed = costs.weight_bytes(config) + kv_copies * costs.kv_bytes(config, room) + read_bytes + LEAD_BYTES
    require_memory(f"bench layer of {options.shape}", needed, device)

    progress(f"read ceiling: {read_bytes / 1e9:.1f} GB of random data")
    ceiling = ReadCeiling(read_bytes, device)
    ceiling.check()
    progress(
        f"{options.shape}: {config.num_layers} layers, {costs.weight_bytes(config) / 1e9:.2f} GB of random weights"
    )
    weights = random_weights(config, seed=SEED, dtype=dtype, device=device)
    cache = _random_cache(weights, room)
    x = uniform((config.hidden_size,), 0.0, 1.0, _RESIDUAL, dtype, device).float()
    progress("compiling the kernels")
    forms = [Form(name, weights, cache, x) for name in FORMS]
    peers = Peers(weights, cache, x) if options.peer_contexts else None

    origin = environment.origin(command, device)
    timer = DeviceTimer(ceiling.lead)
    ceiling_times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    contexts: list[ContextTimes] = []
    report: LayerReport | None = None
    try:
        for context in options.contexts:
            for form in forms:
                form.set_context(context)
            expected = agreed_output({form.name: form.output() for form in forms}, context)
            progress(f"context {context}: {', '.join(FORMS)} agree to the bit")
            with_peers = peers if context in options.peer_contexts else None
            setups = _set_up_peers(with_peers, context, expected, options.repeats, progress)
            progress(f"context {context}: measuring")
            candidates = ceiling.candidates(options.repeats) + [form.candidate(options.repeats) for form in forms]
            candidates += [setup.candidate for setup in setups if setup.candidate is not None]
            timings = round_robin(candidates, timer)
            agreed_output({"before": expected} | {form.name: form.output() for form in forms}, context)
            for variant in VARIANTS:
                ceiling_times[variant] += timings[variant].times_ms
            contexts.append(_context_times(context, timings, setups))
            report = LayerReport(
                options=options,
                origin=origin,
                read=ReadSpeeds(read_bytes, {variant: summarise(times) for variant, times in ceiling_times.items()}),
                contexts=tuple(contexts),
            )
            on_context(report)
            del setups, candidates  # caches and graphs of this context's peers
            if peers is not None:
                peers.forget_context()
    except KeyboardInterrupt:
        if report is None:
            raise
        return dataclasses.replace(report, interrupted=True)
    assert report is not None, "there is a context"
    return report


def _random_cache(weights: DecoderWeights, room: int) -> reference.KVCache:
    c = weights.config
    shape = (c.num_layers, c.num_kv_heads, room, c.head_dim)
    k, v = (uniform(shape, 0.0, 1.0, stream, weights.dtype, weights.device) for stream in (_KEYS, _VALUES))
    return reference.KVCache(k, v)


def _set_up_peers(
    peers: Peers | None, context: int, expected: Tensor, repeats: int, progress: Progress
) -> list[PeerSetup]:
    setups = []
    for name in PEERS if peers is not None else ():
        assert peers is not None
        progress(f"context {context}: preparing {name}")
        setup = peers.set_up(name, context, expected, repeats)
        if setup.error is not None:
            progress(f"context {context}: {name} failed: {setup.error}")
        setups.append(setup)
    return setups


def _context_times(context: int, timings: dict[str, Timing], setups: list[PeerSetup]) -> ContextTimes:
    notes = {}
    for setup in setups:
        error = setup.error if setup.candidate is None else timings[setup.name].error
        notes[setup.name] = PeerNote(setup.difference, error)
    measured = {name: summarise(timing.times_ms) for name, timing in timings.items() if timing.times_ms}
    return ContextTimes(
        context=context,
        ours={name: measured[name] for name in FORMS},
        peers={name: measured.get(name) for name in notes},
        peer_notes=notes,
        read={variant: measured[variant] for variant in VARIANTS},
    )
