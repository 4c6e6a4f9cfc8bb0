"""The run of `bench trace`: a prompt, steps in a row in mode model, of which the last one's record is read back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from clusterfusion import reference
from clusterfusion.bench import environment
from clusterfusion.bench.environment import Origin
from clusterfusion.bench.texts import random_tokens
from clusterfusion.bench.trace.chrome import chrome_trace, spread
from clusterfusion.bench.trace.options import TraceOptions, require_mode
from clusterfusion.bench.trace.summary import Summary, summarise
from clusterfusion.bench.trace.timeline import Timeline, read_record
from clusterfusion.engine import Engine
from clusterfusion.engine.memory import require_memory
from clusterfusion.engine.step_decoder import StepDecoder
from clusterfusion.ops.layer_launch import plan_for
from clusterfusion.plan import BlockPlan
from clusterfusion.plan.trace import trace_words
from clusterfusion.weights import DecoderWeights

FORMAT = 1  # of what the file says of itself; grows when a field changes its meaning or goes away


@dataclasses.dataclass(frozen=True)
class TraceReport:
    """One recorded step and where it comes from."""

    options: TraceOptions
    origin: Origin
    name: str
    dtype: str
    timeline: Timeline
    summary: Summary

    def to_chrome(self) -> dict[str, Any]:
        """JSON values of the file, with as many CTAs as the options say."""
        about = {
            "benchmark": "trace",
            "format": FORMAT,
            **dataclasses.asdict(self.origin),
            "model": self.name,
            "dtype": self.dtype,
            "options": dataclasses.asdict(self.options),
            "summary": self.summary.to_json(),
        }
        return chrome_trace(self.timeline, spread(self.options.ctas, self.timeline.ctas), about)


def record_step(
    weights: DecoderWeights,
    cache: reference.KVCache,
    token: int,
    position: int,
    steps: int = 1,
    plan: BlockPlan | None = None,
) -> Timeline:
    """The timeline of the last of `steps` steps in a row, of which the first takes `token` at `position`. It follows
    closely on the one before it, in the same launch or the next, as in decoding.

    Raises DeviceError for a step that failed, ClusterFusionError for a record that no step can have written.
    """
    plan = plan or plan_for(weights.config, weights.device.index)
    record = torch.zeros(trace_words(plan), dtype=torch.int64, device=weights.device)
    decoder = StepDecoder(weights, cache, plan=plan, trace=record)
    for _ in decoder.stream(token, position, steps):
        pass
    torch.cuda.synchronize(weights.device)
    decoder.check_error()
    return read_record(record.cpu().numpy(), plan)


@torch.no_grad()
def measure_trace(
    engine: Engine, options: TraceOptions, progress: Callable[[str], None], command: str = ""
) -> TraceReport:
    """Record a step on `engine`'s weights and device, whose own mode does not matter.

    Raises UnsupportedModelError where mode model cannot run, DeviceError without the memory.
    """
    weights, config = engine.weights, engine.config
    require_mode(engine.name, config, weights.dtype, weights.device)
    cache_bytes = options.room * config.kv_elements_per_token * weights.dtype.itemsize
    require_memory(f"bench trace of {engine.name}", cache_bytes, weights.device)
    cache = reference.KVCache.allocate(config, options.room, weights.dtype, weights.device)
    ids = random_tokens(config.vocab_size, options.context, seed=options.context)
    progress(f"{options.context} tokens of prompt")
    reference.forward(weights, torch.tensor(ids, device=weights.device), cache, 0)
    progress(f"{options.steps} steps, of which the last is recorded")
    timeline = record_step(weights, cache, ids[-1], options.context, options.steps)
    return TraceReport(
        options=options,
        origin=environment.origin(command, weights.device),
        name=engine.name,
        dtype=str(weights.dtype).removeprefix("torch."),
        timeline=timeline,
        summary=summarise(timeline, options.cached_tokens),
    )
