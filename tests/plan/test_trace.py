"""What a traced step records: as many words as the program writes, and every event in some phase or dependency's place."""

from __future__ import annotations

import dataclasses
import importlib.resources
import itertools
import re

import pytest

from clusterfusion.named_shapes import named_shape
from clusterfusion.plan import H200, plan_block, trace
from clusterfusion.plan.block import MATRICES, Order


def test_the_record_has_the_agreed_events_and_size() -> None:
    assert len(trace.TIMES) == 28
    assert trace.EVENTS[0] == "begin" and trace.EVENTS[13:15] == ("published", "project_wait")
    assert trace.EVENTS[-3:] == ("logits_done", "data_waited", "room_waited")
    plan = plan_block(named_shape("pythia-2.8b"), H200)
    assert trace.trace_shape(plan) == (132, 33, 30)
    assert trace.trace_words(plan) == 132 * 33 * 30 + 132 * 4
    few = dataclasses.replace(plan, ctas=8)
    assert trace.trace_words(few) == 8 * 33 * 30 + 8 * 4


def test_the_program_has_the_same_events() -> None:
    source = importlib.resources.files("clusterfusion").joinpath("cuda/block/trace.cuh").read_text(encoding="utf-8")
    listed = re.search(r"enum class TraceEvent \{(.*?)\}", source, re.DOTALL)
    assert listed and re.findall(r"\w+", listed[1]) == [*trace.EVENTS, "count"]


# What a role passes in a layer, and what it passes behind the last one.
VECTORS: dict[Order, str] = {
    "up_first": "begin residual_read normed down_wait down_begin down_ready attention_wait attention_begin attention_done "
    "output_wait output_begin output_ready sums_wait published",
    "qkv_first": "begin residual_read normed attention_wait attention_begin attention_done down_wait down_begin down_ready "
    "output_wait output_begin output_ready sums_wait published",
    "sequential": "begin residual_read normed attention_wait attention_begin attention_done "
    "output_wait output_begin output_ready down_wait down_begin down_ready sums_wait published",
}
TILES: dict[Order, str] = {
    "up_first": "project_wait project_begin up_done qkv_done down_tiles_wait down_tiles_begin "
    "cached_wait cached_begin cached_done down_tiles_done o_wait o_begin o_done",
    "qkv_first": "project_wait project_begin qkv_done up_done cached_wait cached_begin cached_done down_tiles_wait down_tiles_begin down_tiles_done "
    "o_wait o_begin o_done",
    "sequential": "project_wait project_begin qkv_done cached_wait cached_begin cached_done o_wait o_begin o_done up_done "
    "down_tiles_wait down_tiles_begin down_tiles_done",
}
HEAD = {"vectors": ["begin", "residual_read", "normed"], "tiles": ["project_wait", "project_begin", "logits_done"]}


@pytest.mark.parametrize("order", MATRICES)
def test_events_come_in_the_order_of_the_program(order: Order) -> None:
    assert list(trace.passed("vectors", order)) == VECTORS[order].split()
    assert list(trace.passed("tiles", order)) == [*TILES[order].split(), "logits_done"]
    assert sorted(trace.passed("vectors", order) + trace.passed("tiles", order)) == sorted(trace.TIMES)


@pytest.mark.parametrize("order", MATRICES)
def test_phases_follow_the_order_of_events(order: Order) -> None:
    """Those of a layer, and those of the LM head, which passes some of a layer's events and has one of its own."""
    phases = trace.phases(order)
    for role, of_layer in (("vectors", VECTORS[order].split()), ("tiles", TILES[order].split())):
        for events in (of_layer, HEAD[role]):
            mine = [p for p in phases if p.role == role and {p.begin, p.end} <= set(events)]
            for phase in mine:
                assert events.index(phase.begin) < events.index(phase.end), phase
            for before, after in itertools.pairwise(mine):
                assert events.index(before.end) <= events.index(after.begin), (before, after)
        nowhere = [p for p in phases if p.role == role and not {p.begin, p.end} <= set(of_layer)]
        assert [(p.name, p.begin, p.end) for p in nowhere] == (
            [] if role == "vectors" else [("lm_head", "project_begin", "logits_done")]
        )
    head = [p.name for role in trace.ROLES for p in phases if p.role == role and {p.begin, p.end} <= set(HEAD[role])]
    assert head == ["residual", "norm", "residual", "lm_head"]


@pytest.mark.parametrize("order", MATRICES)
def test_the_tiles_are_busy_or_wait_from_the_first_event_to_the_last(order: Order) -> None:
    """Nothing of a layer of theirs is without a name but the moment between two phases."""
    events = TILES[order].split()
    mine = [p for p in trace.phases(order) if p.role == "tiles" and p.name != "lm_head"]
    assert (mine[0].begin, mine[-1].end) == (events[0], events[-1])
    for before, after in itertools.pairwise(mine):
        assert events.index(after.begin) - events.index(before.end) <= (after.kind == "wait"), (before, after)


@pytest.mark.parametrize("order", MATRICES)
def test_every_wait_of_the_vectors_is_a_dependency(order: Order) -> None:
    waits = {(p.name, p.begin, p.end) for p in trace.phases(order) if (p.role, p.kind) == ("vectors", "wait")}
    assert waits == {(d.name, d.wait, d.begin) for d in trace.DEPENDENCIES}
    assert all(dependency.given in trace.TIMES for dependency in trace.DEPENDENCIES)


@pytest.mark.parametrize(
    ("order", "streams"),
    [
        (
            "up_first",
            "up project_begin, qkv up_done, down down_tiles_begin, kv cached_begin, down cached_done, o o_begin",
        ),
        ("qkv_first", "qkv project_begin, up qkv_done, kv cached_begin, down down_tiles_begin, o o_begin"),
        ("sequential", "qkv project_begin, kv cached_begin, o o_begin, up o_done, down down_tiles_begin"),
    ],
)
def test_matrices_stream_in_their_order(order: Order, streams: str) -> None:
    """Each from when it may begin, and the cached tokens among them."""
    found = [(phase.name, phase.begin) for phase in trace.phases(order) if phase.kind == "stream"]
    assert [name for name in dict.fromkeys(name for name, _ in found) if name != "kv"] == [*MATRICES[order], "lm_head"]
    assert [" ".join(each) for each in found] == [*streams.split(", "), "lm_head project_begin"]


def test_the_middle_is_a_phase_of_the_sequential_residual_alone() -> None:
    for order in MATRICES:
        middle = [p for p in trace.phases(order) if p.name == "middle"]
        assert middle == (
            [trace.Phase("vectors", "work", "middle", "output_ready", "down_wait")] if order == "sequential" else []
        )
