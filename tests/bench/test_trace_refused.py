"""Records that no step wrote: refused with the CTA, the layer and the event. And one that looks odd and is not."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from bench.trace_records import LAYERS, STEP, make_record, small_plan, timeline_of
from plan.orders import ORDERS

from clusterfusion.bench.trace.timeline import read_record
from clusterfusion.errors import ArgumentError, ClusterFusionError
from clusterfusion.plan import trace as layout
from clusterfusion.plan.block import Order
from clusterfusion.plan.trace import Role

event = layout.EVENTS.index
OF_TILES = slice(event("project_wait"), event("data_waited"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda events, clocks: (events.fill(0), clocks.fill(0)), "the record is empty"),
        (lambda events, clocks: clocks.fill(0), "CTA 0 ran from clock 0 to 0"),
        (lambda events, clocks: clocks[2].put(3, 5), "CTA 2 ran from clock"),
        (lambda events, clocks: events[1, 2, OF_TILES].fill(0), "the tiles of CTA 1 have no event in layer 2"),
        (
            lambda events, clocks: events[3, 1].put(event("attention_begin"), 1),
            "attention_begin of CTA 3 in layer 1 of 3 comes before",
        ),
        (lambda events, clocks: events[0, 0].put(event("begin"), 7), "begin of CTA 0 in layer 0 of 3 comes before"),
        (
            lambda events, clocks: events[2, 3].put(event("logits_done"), 7),
            "logits_done of CTA 2 in layer 3 of 3 comes before",
        ),
        (
            lambda events, clocks: events[0, 0].put(event("data_waited"), -2),
            "CTA 0 waited -1 ns for data in layer 0",
        ),
        (
            lambda events, clocks: events[0, 2].put(event("data_waited"), 1200),
            "waited 600 ns for data in layer 2, where it streamed for 560",
        ),
        (
            lambda events, clocks: events[0, 3].put(event("data_waited"), 700),
            "waited 350 ns for data in layer 3, where it streamed for 300",
        ),
    ],
)
def test_a_record_that_no_step_wrote_is_refused(spoil: Any, message: str) -> None:
    plan = small_plan()
    words = make_record(plan)
    size = int(np.prod(layout.trace_shape(plan)))
    events, clocks = words[:size].reshape(layout.trace_shape(plan)), words[size:].reshape(plan.ctas, 4)
    read_record(words, plan)
    spoil(events, clocks)
    with pytest.raises(ClusterFusionError, match=message):
        read_record(words, plan)


@pytest.mark.parametrize(("order", "other"), list(itertools.permutations(ORDERS, 2)))
def test_a_record_of_a_step_in_another_order_is_refused(order: Order, other: Order) -> None:
    words = make_record(small_plan(order=order))
    read_record(words, small_plan(order=order))
    with pytest.raises(ClusterFusionError, match="comes before an earlier event"):
        read_record(words, small_plan(order=other))


def test_a_record_of_another_size_or_type_is_refused() -> None:
    plan = small_plan()
    words = make_record(plan)
    for bad in (words[:-1], words.astype(np.float64), words.reshape(1, -1), []):
        with pytest.raises(ArgumentError, match=r"the record of a step on 4 CTAs with 3 layers is int64 \[496\]"):
            read_record(bad, plan)


def test_the_last_word_of_the_tiles_may_come_after_the_end() -> None:
    def gaps(cta: int, layer: int, role: Role, usual: dict[str, int]) -> dict[str, int]:
        return usual | {"logits_done": 354} if (layer, role) == (LAYERS, "tiles") else usual

    timeline = timeline_of(gaps=gaps)
    assert timeline.end.tolist() == pytest.approx([STEP + 4] * 4)
