"""What a traced step records: as many words as the program writes, and every event in some phase or dependency's place."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from clusterfusion.named_shapes import named_shape
from clusterfusion.plan import H200, plan_block, trace
from clusterfusion.plan.block import MATRICES, Order


def test_the_record_has_the_agreed_events_and_size() -> None:
    assert len(trace.TIMES) == 25
    assert trace.EVENTS[0] == "begin" and trace.EVENTS[13:15] == ("published", "project_wait")
    assert trace.EVENTS[-2:] == ("logits_done", "data_waited")
    plan = plan_block(named_shape("pythia-2.8b"), H200)
    assert trace.trace_shape(plan) == (132, 33, 26)
    assert trace.trace_words(plan) == 132 * 33 * 26 + 132 * 4
    few = dataclasses.replace(plan, ctas=8)
    assert trace.trace_words(few) == 8 * 33 * 26 + 8 * 4


@pytest.mark.parametrize("order", MATRICES)
def test_phases_follow_the_order_of_events(order: Order) -> None:
    for role in trace.ROLES:
        events = trace.passed(role, order)
        assert set(events) <= set(trace.TIMES) and len(set(events)) == len(events)
        mine = [phase for phase in trace.phases(order) if phase.role == role]
        for phase in mine:
            assert events.index(phase.begin) < events.index(phase.end), phase
        for before, after in itertools.pairwise(mine):
            assert events.index(before.end) <= events.index(after.begin), (before, after)
    assert sorted(trace.passed("vectors", order) + trace.passed("tiles", order)) == sorted(trace.TIMES)


@pytest.mark.parametrize("order", MATRICES)
def test_every_wait_of_the_vectors_is_a_dependency(order: Order) -> None:
    waits = {(p.name, p.begin, p.end) for p in trace.phases(order) if (p.role, p.kind) == ("vectors", "wait")}
    assert waits == {(d.name, d.wait, d.begin) for d in trace.DEPENDENCIES}
    assert all(dependency.given in trace.TIMES for dependency in trace.DEPENDENCIES)


@pytest.mark.parametrize("order", MATRICES)
def test_matrices_stream_in_their_order(order: Order) -> None:
    streams = [phase.name for phase in trace.phases(order) if phase.kind == "stream"]
    assert streams == [*MATRICES[order], "lm_head"]
