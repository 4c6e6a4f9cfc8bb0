"""Records of steps that never ran: every CTA spends known nanoseconds on its way from each event to the next. And what is
true of the file of any step."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from plan.orders import in_order

from clusterfusion.bench.trace.timeline import Timeline, read_record
from clusterfusion.named_shapes import named_shape
from clusterfusion.plan import H200, BlockPlan, plan_block, trace
from clusterfusion.plan.block import Order
from clusterfusion.plan.trace import Role

# Nanoseconds before each event, since the role's one before it; nobody goes on before what it waits for.
VECTORS: dict[Order, dict[str, int]] = {
    "up_first": {
        "begin": 10, "residual_read": 100, "normed": 50, "down_wait": 5, "down_begin": 190, "down_ready": 40,
        "attention_wait": 20, "attention_begin": 150, "attention_done": 200, "output_wait": 5, "output_begin": 70,
        "output_ready": 30, "sums_wait": 0, "published": 130,
    },
    "qkv_first": {
        "begin": 10, "residual_read": 100, "normed": 50, "attention_wait": 20, "attention_begin": 260, "attention_done": 200,
        "down_wait": 5, "down_begin": 80, "down_ready": 40, "output_wait": 5, "output_begin": 70, "output_ready": 30,
        "sums_wait": 0, "published": 130,
    },
    "sequential": {
        "begin": 10, "residual_read": 100, "normed": 50, "attention_wait": 20, "attention_begin": 190, "attention_done": 100,
        "output_wait": 5, "output_begin": 70, "output_ready": 30, "down_wait": 130, "down_begin": 180, "down_ready": 10,
        "sums_wait": 0, "published": 105,
    },
}  # fmt: skip
TILES: dict[Order, dict[str, int]] = {
    "up_first": {
        "project_wait": 10, "project_begin": 150, "up_done": 180, "qkv_done": 200, "down_tiles_wait": 0,
        "down_tiles_begin": 20, "cached_wait": 35, "cached_begin": 15, "cached_done": 25, "down_tiles_done": 40, "o_wait": 0,
        "o_begin": 245, "o_done": 80,
    },
    "qkv_first": {
        "project_wait": 10, "project_begin": 150, "qkv_done": 200, "up_done": 180, "cached_wait": 0, "cached_begin": 15,
        "cached_done": 10, "down_tiles_wait": 0, "down_tiles_begin": 245, "down_tiles_done": 90, "o_wait": 0, "o_begin": 20,
        "o_done": 80,
    },
    "sequential": {
        "project_wait": 10, "project_begin": 150, "qkv_done": 200, "cached_wait": 0, "cached_begin": 15, "cached_done": 10, "o_wait": 0,
        "o_begin": 245, "o_done": 70, "up_done": 180, "down_tiles_wait": 0, "down_tiles_begin": 20, "down_tiles_done": 100,
    },
}  # fmt: skip
LAYER = 1000  # ns, of both
# After the last layer.
HEAD = {
    "vectors": {"begin": 10, "residual_read": 100, "normed": 50},
    "tiles": {"project_wait": 10, "project_begin": 150, "logits_done": 300},
}
HEAD_LAYER = 500  # to the CTA's end
LAYERS = 3
DATA_WAITED, HEAD_DATA_WAITED = 56, 32
START = 200  # before the first event's own gap
STEP = START + LAYERS * LAYER + HEAD["vectors"]["begin"] + HEAD_LAYER  # of a CTA, with so many layers

Gaps = Callable[[int, int, Role, dict[str, int]], dict[str, int]]  # CTA, layer, role, the usual gaps -> this one's


def small_plan(layers: int = LAYERS, *, ctas: int = 4, order: Order = "qkv_first") -> BlockPlan:
    """Of a small model on a GPU of so many multiprocessors."""
    config = dataclasses.replace(named_shape("pythia-14m"), num_layers=layers)
    plan = plan_block(config, dataclasses.replace(H200, name="small", multiprocessors=ctas))
    assert plan.ctas == ctas
    return in_order(plan, order)


def usual(cta: int, layer: int, role: Role, gaps: dict[str, int]) -> dict[str, int]:
    return gaps


def make_record(
    plan: BlockPlan,
    gaps: Gaps = usual,
    *,
    delays: tuple[int, ...] = (),
    clocks_per_ns: int = 2,
    timer_ns: int = 1,
) -> NDArray[np.int64]:
    """The words of such a step. CTA c starts `delays[c]` ns after the first, 0 if left out; each has a clock of its own."""
    c = plan.config
    events = np.zeros(trace.trace_shape(plan), np.int64)
    clocks = np.zeros((plan.ctas, len(trace.CLOCKS)), np.int64)
    for cta in range(plan.ctas):
        delay = delays[cta] if cta < len(delays) else 0
        started = 1_790_000_000_000_000_000 + delay  # as large as nanoseconds since 1970
        clock = 3_000_000_000_000_000 + 123_456_789 * cta
        for role in trace.ROLES:
            now = START
            for layer in range(c.num_layers + 1):
                usually = (
                    HEAD[role] if layer == c.num_layers else {"vectors": VECTORS, "tiles": TILES}[role][plan.order]
                )
                for event in trace.passed(role, plan.order):
                    mine = gaps(cta, layer, role, usually)
                    if event in mine:
                        now += mine[event]
                        events[cta, layer, trace.EVENTS.index(event)] = clock + clocks_per_ns * now
        waited = [DATA_WAITED] * c.num_layers + [HEAD_DATA_WAITED]
        events[cta, :, trace.EVENTS.index(trace.DATA_WAITED)] = clocks_per_ns * np.array(waited)
        end = START + c.num_layers * LAYER + HEAD["vectors"]["begin"] + HEAD_LAYER
        seen = [(started + ns) // timer_ns * timer_ns for ns in (0, end)]
        clocks[cta] = clock, seen[0], clock + clocks_per_ns * end, seen[1]
    return np.concatenate([events.ravel(), clocks.ravel()])


def timeline_of(plan: BlockPlan | None = None, gaps: Gaps = usual, **options: Any) -> Timeline:
    plan = plan or small_plan()
    return read_record(make_record(plan, gaps, **options), plan)


def check_nested(events: list[dict[str, Any]]) -> dict[tuple[int, int], int]:
    """Slices of a thread lie inside one another or apart; a slice in a layer's. Returns how many each thread has."""
    threads = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            begin = round(event["ts"] * 1000)
            threads[event["pid"], event["tid"]].append((begin, begin + round(event["dur"] * 1000), event["cat"]))
    for slices in threads.values():
        stack: list[tuple[int, int, str]] = []
        for begin, end, kind in sorted(slices, key=lambda s: (s[0], -s[1], s[2] != "layer")):
            while stack and stack[-1][1] <= begin:
                stack.pop()
            assert end > begin
            assert not stack or end <= stack[-1][1], "half inside another"
            assert kind == "layer" if not stack else kind != "layer", "a layer holds all else"
            stack.append((begin, end, kind))
    return {thread: len(slices) for thread, slices in threads.items()}
