"""The file of `bench trace`, from made-up records: slices as they lie in a step, in each order of a layer's matrices."""

from __future__ import annotations

import gzip
import json

import pytest
from bench.trace_records import START, STEP, check_nested, make_record, small_plan, timeline_of

from clusterfusion.bench.trace.chrome import chrome_trace, file_content, spread
from clusterfusion.bench.trace.timeline import read_record
from clusterfusion.errors import ArgumentError
from clusterfusion.plan.block import Order
from clusterfusion.plan.trace import Role


@pytest.mark.parametrize(
    ("order", "asked_us", "waited_us"),
    [("up_first", 0.415, 0.15), ("qkv_first", 0.18, 0.26), ("sequential", 0.18, 0.19)],
)
def test_the_file_opens_in_perfetto(order: Order, asked_us: float, waited_us: float) -> None:
    timeline = timeline_of(small_plan(order=order), delays=(0, 10, 20, 50))
    trace = json.loads(file_content(chrome_trace(timeline, about={"model": "demo"}), "trace.json"))
    assert trace["otherData"] == {"model": "demo"}
    events = trace["traceEvents"]
    names = {(e["pid"], e["tid"], e["args"]["name"]) for e in events if e["name"] == "thread_name"}
    assert names == {(pid, cta, f"CTA {cta}") for pid in (1, 2) for cta in range(4)}
    assert [e["args"]["name"] for e in events if e["name"] == "process_name"] == ["vectors", "tiles"]
    # Nine phases of the vectors, and the middle residual; nine of the tiles, and another part of down; after the layers two and
    # two.
    of_vectors, of_tiles = 10 + (order == "sequential"), 10 + (order == "up_first")
    assert check_nested(events) == {(1, cta): 3 * of_vectors + 3 for cta in range(4)} | {
        (2, cta): 3 * of_tiles + 3 for cta in range(4)
    }
    wait, *_ = (e for e in events if (e["name"], e["tid"]) == ("wait: q/k/v", 3))  # of layer 0
    assert (wait["ts"], wait["dur"]) == (pytest.approx(0.05 + START / 1000 + asked_us), waited_us)
    assert (wait["pid"], wait["cat"]) == (1, "wait")
    tiles = [e for e in events if (e["pid"], e["tid"]) == (2, 0)]
    streams = [
        e["name"] for e in sorted(tiles, key=lambda e: e.get("ts", 0)) if e["ph"] == "X" and e["cat"] == "stream"
    ]
    each = {"up_first": "up qkv down kv down o", "qkv_first": "qkv up kv down o", "sequential": "qkv kv o up down"}[
        order
    ]
    assert streams == [*each.split() * 3, "lm_head"]
    waits = [e["name"] for e in sorted(tiles, key=lambda e: e.get("ts", 0)) if e["ph"] == "X" and e["cat"] == "wait"]
    of_layer = {
        "up_first": ["wait: residual", "wait: hidden", "wait: q/k/v", "wait: attention"],
        "qkv_first": ["wait: residual", "wait: q/k/v", "wait: hidden", "wait: attention"],
        "sequential": ["wait: residual", "wait: q/k/v", "wait: attention", "wait: hidden"],
    }[order]
    assert waits == [*of_layer * 3, "wait: residual"]
    layers = [e for e in tiles if e["ph"] == "X" and e["cat"] == "layer"]
    assert [(e["name"], e["args"]["data_waited_us"]) for e in layers] == [
        *((f"layer {i}", 0.056) for i in range(3)),
        ("lm_head", 0.032),
    ]
    assert sum(e["dur"] for e in layers) == pytest.approx((STEP - START - 10) / 1000)


def test_nested_with_a_coarse_timer_and_an_odd_clock() -> None:
    timeline = timeline_of(delays=(0, 7, 333, 911), clocks_per_ns=1, timer_ns=32)
    check_nested(chrome_trace(timeline)["traceEvents"])


def test_what_takes_no_time_is_no_slice() -> None:
    def gaps(cta: int, layer: int, role: Role, usual: dict[str, int]) -> dict[str, int]:
        return usual | {"down_begin": 0, "published": 210} if role == "vectors" and layer == cta == 1 else usual

    threads = check_nested(chrome_trace(timeline_of(gaps=gaps))["traceEvents"])
    assert (threads[1, 0], threads[1, 1]) == (33, 32)


def test_some_ctas_alone_and_gzip() -> None:
    timeline = timeline_of()
    trace = chrome_trace(timeline, [2, 0, 2])
    assert {event["tid"] for event in trace["traceEvents"]} == {0, 2}
    packed = file_content(trace, "trace.json.gz")
    assert isinstance(packed, bytes)
    assert json.loads(gzip.decompress(packed)) == json.loads(file_content(trace, "trace.json"))
    assert packed == file_content(trace, "again.gz")
    for bad in (-1, 4):
        with pytest.raises(ArgumentError, match=f"ctas holds {bad}; it must hold CTAs from 0 to 3"):
            chrome_trace(timeline, [bad])
    assert spread(3, 132) == [0, 44, 88]
    assert spread(200, 4) == spread(4, 4) == [0, 1, 2, 3]


def test_the_usual_file_is_some_megabytes_at_most() -> None:
    plan = small_plan(32, ctas=16)
    assert len(file_content(chrome_trace(read_record(make_record(plan), plan)), "x.json")) < 2_000_000
