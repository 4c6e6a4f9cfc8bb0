"""`bench trace` from made-up records: one time axis, every figure of the summary, the file, and records that no step wrote."""

from __future__ import annotations

import gzip
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench.trace_records import (
    DATA_WAITED,
    HEAD_LAYER,
    LAYER,
    START,
    TILES,
    VECTORS,
    check_nested,
    make_record,
    small_plan,
)
from rich.console import Console

from clusterfusion.bench import costs, environment
from clusterfusion.bench.environment import Origin
from clusterfusion.bench.trace import measure, tables
from clusterfusion.bench.trace.chrome import chrome_trace, file_content, spread
from clusterfusion.bench.trace.measure import TraceReport, measure_trace
from clusterfusion.bench.trace.options import TraceOptions, require_shape, trace_options
from clusterfusion.bench.trace.summary import Summary, summarise
from clusterfusion.bench.trace.timeline import Timeline, read_record
from clusterfusion.cli import main
from clusterfusion.engine import load
from clusterfusion.errors import ArgumentError, ClusterFusionError, UnsupportedModelError
from clusterfusion.plan import trace as layout
from clusterfusion.plan.trace import Role

LAYERS = 3
STEP = START + LAYERS * LAYER + 10 + HEAD_LAYER  # of a CTA


def timeline_of(plan: Any = None, *arguments: Any, **options: Any) -> Timeline:
    plan = plan or small_plan(LAYERS)
    return read_record(make_record(plan, *arguments, **options), plan)


def parts(summary: Summary, of: str, role: Role) -> dict[str, float]:
    times = getattr(summary, of)[role]
    assert sum(times.parts.values()) == pytest.approx(times.total_ns)
    return {name: pytest.approx(ns, abs=1e-6) for name, ns in times.parts.items()}


# -- one axis ----------------------------------------------------------------------------------------------------------


def test_clocks_of_all_ctas_come_onto_one_axis() -> None:
    timeline = timeline_of(delays=(40, 0, 10, 3))
    assert timeline.start.tolist() == [40, 0, 10, 3]
    assert timeline.end.tolist() == [STEP + delay for delay in (40, 0, 10, 3)]
    assert timeline.step_ns == STEP + 40
    begins = timeline.at("begin")
    wanted = [[delay + START + 10 + LAYER * layer for layer in range(LAYERS + 1)] for delay in (40, 0, 10, 3)]
    assert np.abs(begins - wanted).max() < 1e-3
    assert timeline.ghz.tolist() == [2.0] * 4
    assert timeline.timer_ns == 1
    assert np.isnan(timeline.at("published")[:, -1]).all(), "not passed after the last layer"


def test_a_coarse_timer_moves_ctas_by_its_step_and_is_named() -> None:
    exact, coarse = (timeline_of(delays=(40, 0, 900, 333), timer_ns=timer) for timer in (1, 32))
    assert coarse.timer_ns == 32
    apart = coarse.times - exact.times
    assert np.nanmax(apart - np.nanmin(apart)) <= 64
    durations = coarse.took(coarse.phases[0]) / exact.took(exact.phases[0])
    assert np.nanmax(np.abs(durations - 1)) <= 32 / STEP + 1e-9


def test_bounds_cover_the_step_without_gaps() -> None:
    timeline = timeline_of()
    for role in layout.ROLES:
        begin, end = timeline.bounds(role)
        assert (begin[:, 1:] == end[:, :-1]).all() and (end[:, -1] == timeline.end).all()


def test_tiles_that_leave_the_lm_head_to_others_end_with_their_last_event() -> None:
    def gaps(cta: int, layer: int, role: Role, usual: dict[str, int]) -> dict[str, int]:
        return {} if layer == LAYERS and role == "tiles" else usual

    plan = small_plan(LAYERS)
    words = make_record(plan, gaps)
    events = words.reshape(-1)[: int(np.prod(layout.trace_shape(plan)))].reshape(layout.trace_shape(plan))
    events[:, -1, layout.EVENTS.index(layout.DATA_WAITED)] = 0
    timeline = read_record(words, plan)
    begin, end = timeline.bounds("tiles")
    assert np.isnan(begin[:, -1]).all() and np.isnan(end[:, -1]).all()
    assert end[0, -2] == timeline.at("down_tiles_done")[0, -2]
    summary = summarise(timeline, 5)
    assert summary.head["tiles"].total_ns == 0 and summary.head["tiles"].share("streaming") == 0
    assert summary.step["tiles"].parts["other"] == pytest.approx(HEAD_LAYER + 10 + (LAYERS - 1) * TILES["project_wait"])
    json.dumps(chrome_trace(timeline, about=summary.to_json()), allow_nan=False)


# -- figures -----------------------------------------------------------------------------------------------------------


def test_every_figure_of_a_layer() -> None:
    summary = summarise(timeline_of(), cached_tokens=7)
    assert parts(summary, "layer", "vectors") == {
        "wait: residual": 100,
        "norm": 50,
        "wait: q/k/v": 260,
        "attention": 200,
        "wait: attention": 70,
        "load": 30 + 40,
        "wait: hidden": 80,
        "sums": 130,
        "other": 20 + 5 + 5 + 10,
    }
    assert parts(summary, "layer", "tiles") == {
        "streaming": 200 + 180 + 80 + 100 - DATA_WAITED,
        "wait: data": DATA_WAITED,
        "wait: residual": 150,
        "wait: attention": 260,
        "wait: hidden": 20,
        "other": 10,
    }
    for role in layout.ROLES:
        assert summary.layer[role].total_ns == pytest.approx(LAYER)
    assert summary.layer["tiles"].share("streaming") == pytest.approx(504 / 1000)
    assert summary.layer["tiles"].share("no such part") == 0


def test_every_figure_of_the_lm_head_and_the_step() -> None:
    summary = summarise(timeline_of(), cached_tokens=7)
    assert summary.head["vectors"].total_ns == pytest.approx(HEAD_LAYER)
    head = parts(summary, "head", "tiles")
    assert {name: ns for name, ns in head.items() if ns != 0} == {
        "streaming": 300 - 32,
        "wait: data": 32,
        "wait: residual": 150,
        "other": HEAD_LAYER - 450,
    }
    assert parts(summary, "step", "tiles") == {
        "start": START + 10,
        "streaming": 3 * 504 + 268,
        "wait: data": 3 * DATA_WAITED + 32,
        "wait: residual": 4 * 150,
        "wait: attention": 3 * 260,
        "wait: hidden": 3 * 20,
        "other": 3 * 10 + HEAD_LAYER - 450,
    }
    assert parts(summary, "step", "vectors")["wait: q/k/v"] == 3 * 260
    assert summary.step["vectors"].total_ns == summary.step_ns == STEP


def test_bytes_a_second() -> None:
    plan = small_plan(LAYERS)
    config = plan.config
    summary = summarise(timeline_of(plan), cached_tokens=7)
    kv = 7 * 2 * config.hidden_size * 2  # a layer
    assert summary.layer_bytes == config.layer_parameters * 2 + kv
    assert summary.head_bytes == 2 * (config.vocab_size * config.hidden_size + 2 * config.hidden_size)
    assert summary.step_bytes == LAYERS * summary.layer_bytes + summary.head_bytes + 2 * config.hidden_size
    assert summary.step_bytes == costs.whole_step_weight_bytes(config) + LAYERS * kv
    assert summary.step_rate == pytest.approx(summary.step_bytes / (STEP * 1e-9))
    assert summary.layer_rate == pytest.approx(summary.layer_bytes / (LAYER * 1e-9))
    assert summary.head_rate == pytest.approx(summary.head_bytes / (HEAD_LAYER * 1e-9))


def test_skew_and_hand_over_of_every_dependency() -> None:
    def gaps(cta: int, layer: int, role: Role, usual: dict[str, int]) -> dict[str, int]:
        """CTA 3 has no head. In layer 1, CTA 1 gives q, k, v 65 ns late, and has that much less to do after."""
        if cta == 3 and role == "vectors" and layer < LAYERS:
            return {name: ns for name, ns in usual.items() if not name.startswith("attention")} | {"output_wait": 485}
        if (cta, layer, role) == (1, 1, "tiles"):
            return usual | {"qkv_done": 265, "up_done": 115}
        return usual

    summary = summarise(timeline_of(None, gaps, delays=(0, 10, 20, 50)), cached_tokens=7)
    skews = {skew.dependency: skew for skew in summary.skews}
    assert list(skews) == ["residual", "q/k/v", "attention", "hidden"]
    for name in ("residual", "hidden"):  # 0, 10, 20 and 50 ns after the usual
        skew = skews[name]
        assert (skew.mean_ns, skew.worst_ns) == (pytest.approx(35), pytest.approx(35))
        assert (skew.last_cta, skew.times_last, skew.layers) == (3, 3, 3)
    # In layer 1 CTA 1 gives q, k, v 75 ns after the usual, so that the median is 35.
    qkv = skews["q/k/v"]
    assert (qkv.mean_ns, qkv.worst_ns) == (pytest.approx((35 + 40 + 35) / 3), pytest.approx(40))
    assert (qkv.worst_layer, qkv.last_cta, qkv.times_last) == (1, 3, 2)
    # Only CTAs with a head give attention.
    assert (skews["attention"].mean_ns, skews["attention"].last_cta) == (pytest.approx(10), 2)

    # In ns of a layer of CTA 0. The residual is last given at 1050; all but CTA 3, which begins at 1060, wait for it, and go on
    # at 1110, 1120, 1130.
    assert skews["residual"].hand_over_ns == pytest.approx(1120 - 1050)
    # q, k, v: last given at 410, in layer 1 at 435; CTAs 0, 1 and 2 go on at 440, 450, 460.
    assert qkv.hand_over_ns is None, "of the own head only"
    # Attention: last given at 660; waits begin at 645, 655, 665 and 695, of which two are in time, and end 70 ns later.
    assert skews["attention"].hand_over_ns == pytest.approx((715 + 725) / 2 - 660)
    assert skews["hidden"].hand_over_ns is None, "given at 590, and nobody looks before 750"


def test_sequential_residual_streams_up_after_o() -> None:
    summary = summarise(timeline_of(small_plan(LAYERS, parallel=False)), cached_tokens=7)
    assert parts(summary, "layer", "tiles")["streaming"] == 200 + 80 + 180 + 100 - DATA_WAITED
    assert parts(summary, "layer", "vectors")["middle"] == VECTORS["down_wait"]


# -- the file ----------------------------------------------------------------------------------------------------------


def test_the_file_opens_in_perfetto() -> None:
    timeline = timeline_of(delays=(0, 10, 20, 50))
    trace = json.loads(file_content(chrome_trace(timeline, about={"model": "demo"}), "trace.json"))
    assert trace["otherData"] == {"model": "demo"}
    events = trace["traceEvents"]
    names = {(e["pid"], e["tid"], e["args"]["name"]) for e in events if e["name"] == "thread_name"}
    assert names == {(pid, cta, f"CTA {cta}") for pid in (1, 2) for cta in range(4)}
    assert [e["args"]["name"] for e in events if e["name"] == "process_name"] == ["vectors", "tiles"]
    # Nine phases of the vectors and seven of the tiles; after the layers two and two.
    assert check_nested(events) == {(1, cta): 3 * 10 + 3 for cta in range(4)} | {
        (2, cta): 3 * 8 + 3 for cta in range(4)
    }
    (wait,) = [e for e in events if (e["name"], e["tid"], e.get("ts")) == ("wait: q/k/v", 3, 0.43)]  # 50 + 200 + 180 ns
    assert (wait["pid"], wait["dur"], wait["cat"]) == (1, 0.26, "wait")
    tiles = [e for e in events if (e["pid"], e["tid"]) == (2, 0)]
    assert [e["name"] for e in tiles if e["ph"] == "X" and e["cat"] == "stream"] == ["qkv", "up", "o", "down"] * 3 + [
        "lm_head"
    ]
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

    threads = check_nested(chrome_trace(timeline_of(None, gaps))["traceEvents"])
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


# -- records that no step wrote ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda events, clocks: (events.fill(0), clocks.fill(0)), "the record is empty"),
        (lambda events, clocks: clocks.fill(0), "CTA 0 ran from clock 0 to 0"),
        (lambda events, clocks: clocks[2].put(3, 5), "CTA 2 ran from clock"),
        (lambda events, clocks: events[1, 2, 14:24].fill(0), "the tiles of CTA 1 have no event in layer 2"),
        (lambda events, clocks: events[3, 1].put(4, 1), "attention_begin of CTA 3 in layer 1 of 3 comes before"),
        (lambda events, clocks: events[0, 0].put(0, 7), "begin of CTA 0 in layer 0 of 3 comes before"),
        (lambda events, clocks: events[0, 0].put(24, -2), "CTA 0 waited -1 ns for data in layer 0"),
        (
            lambda events, clocks: events[0, 3].put(24, 700),
            "waited 350 ns for data in layer 3, where it streamed for 300",
        ),
    ],
)
def test_a_record_that_no_step_wrote_is_refused(spoil: Any, message: str) -> None:
    plan = small_plan(LAYERS)
    words = make_record(plan)
    size = int(np.prod(layout.trace_shape(plan)))
    events, clocks = words[:size].reshape(layout.trace_shape(plan)), words[size:].reshape(plan.ctas, 4)
    read_record(words, plan)
    spoil(events, clocks)
    with pytest.raises(ClusterFusionError, match=message):
        read_record(words, plan)


def test_a_record_of_another_size_or_type_is_refused() -> None:
    plan = small_plan(LAYERS)
    words = make_record(plan)
    for bad in (words[:-1], words.astype(np.float64), words.reshape(1, -1), []):
        with pytest.raises(ArgumentError, match=r"the record of a step on 4 CTAs with 3 layers is int64 \[416\]"):
            read_record(bad, plan)


def test_the_last_word_of_the_tiles_may_come_after_the_end() -> None:
    def gaps(cta: int, layer: int, role: Role, usual: dict[str, int]) -> dict[str, int]:
        return usual | {"qkv_done": 354} if (layer, role) == (LAYERS, "tiles") else usual

    timeline = timeline_of(None, gaps)
    assert timeline.end.tolist() == pytest.approx([STEP + 4] * 4)


# -- options, the run, what is printed ---------------------------------------------------------------------------------


def test_options() -> None:
    assert trace_options(2048) == TraceOptions(512, 32, 16)
    assert trace_options(None).cached_tokens == 543
    assert trace_options(64) == TraceOptions(32, 32, 16)
    assert trace_options(16, steps=1) == TraceOptions(15, 1, 16)
    for options, message in (
        ({"context": 2048}, "context is 2048, which makes 2080 tokens with 32 steps; .* must be from 1 to 2016"),
        ({"context": 0}, "context is 0; it must be an int from 1"),
        ({"steps": 0}, "steps is 0; it must be an int from 1 to 2047"),
        ({"ctas": 0}, "ctas is 0; it must be an int from 1"),
    ):
        with pytest.raises(ArgumentError, match=message):
            trace_options(2048, **options)
    with pytest.raises(UnsupportedModelError, match="mode 'model', which cannot run pythia-14m here: .* NVIDIA GPU"):
        require_shape("pythia-14m", torch.device("cpu"))


def made_report(parallel: bool = True) -> TraceReport:
    timeline = timeline_of(small_plan(LAYERS, parallel=parallel))
    origin = Origin("", "the command", {"name": "GPU"}, {}, "")
    return TraceReport(TraceOptions(5, 3, 2), origin, "demo", "float16", timeline, summarise(timeline, 7))


def test_the_run_follows_the_prompt_with_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load("demo", device="cpu")
    seen = {}

    def record(weights: Any, cache: Any, token: int, position: int, steps: int) -> Timeline:
        seen.update(room=cache.max_len, filled=bool(cache.k[:, :, :position].abs().sum(dim=(0, 1, 3)).all()))
        seen.update(token=token, position=position, steps=steps)
        return timeline_of()

    monkeypatch.setattr(measure, "record_step", record)
    monkeypatch.setattr(measure, "require_mode", lambda *_: None)
    report = measure_trace(engine, TraceOptions(5, 3, 2), lambda line: None, "the command")
    assert (seen["room"], seen["filled"], seen["position"], seen["steps"]) == (8, True, 5, 3)
    assert report.summary.cached_tokens == 7
    said = json.loads(json.dumps(report.to_chrome(), allow_nan=False))
    about = said["otherData"]
    assert (about["command"], about["model"], about["options"]["steps"]) == ("the command", "demo", 3)
    assert about["summary"]["step_ns"] == STEP and about["source_digest"]
    assert {event["tid"] for event in said["traceEvents"]} == {0, 2}
    monkeypatch.undo()
    with pytest.raises(UnsupportedModelError, match="which cannot run demo here: the kernels need 16-bit weights"):
        measure_trace(engine, TraceOptions(5, 3, 2), lambda line: None)


def test_a_record_is_read_from_the_decoder_after_its_last_step(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, log = small_plan(LAYERS), []

    class StandIn:
        def __init__(self, weights: Any, cache: Any, *, plan: Any, trace: torch.Tensor) -> None:
            self.words, self.plan = trace, plan

        def stream(self, token: int, position: int, steps: int) -> Any:
            for step in range(steps):
                log.append((token, position + step))
                yield 0
            self.words.copy_(torch.from_numpy(make_record(self.plan)))

        def check_error(self) -> None:
            log.append("checked")

    monkeypatch.setattr(measure, "StepDecoder", StandIn)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("waited"))
    weights: Any = type("Weights", (), {"config": plan.config, "device": torch.device("cpu")})
    timeline = measure.record_step(weights, None, 7, 40, 2, plan)  # type: ignore[arg-type]
    assert timeline.step_ns == STEP
    assert log == [(7, 40), (7, 41), "waited", "checked"]


def test_the_command_prints_a_page_and_writes_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "trace.json.gz"
    monkeypatch.setattr(environment, "require_gpu", lambda what: torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    seen = []
    monkeypatch.setattr(measure, "measure_trace", lambda engine, options, *_: seen.append(options) or made_report())
    monkeypatch.setattr(sys, "argv", ["clusterfusion", "bench", "trace", "demo", "--context", "9", "--out", str(file)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert seen == [TraceOptions(9, 32, 16)]
    printed = capsys.readouterr()
    assert "wait: attention" in printed.out and f"written to {file}" in printed.err
    trace = json.loads(gzip.decompress(file.read_bytes()))
    assert {event["tid"] for event in trace["traceEvents"]} == {0, 2}, "as many as the report's options say"


def test_what_is_printed_is_a_page() -> None:
    report = made_report()
    console = Console(file=io.StringIO(), width=120)
    for line in (*tables.heading(report), *tables.tables(report.summary), tables.note(report)):
        console.print(line)
    printed = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(printed) < 60
    assert any("one step after 7 cached tokens, on GPU: 4 CTAs, 3 layers" in line for line in printed)
    assert any("steps of 3710 ns" in line for line in printed)
    cells = [re.split(r"\s{2,}", line.strip()) for line in printed]
    assert ["streaming", "0.50", "50.4", "0.27", "53.6", "1.78", "48.0"] in cells
    assert ["start", "0.21", "5.7"] in cells
    assert ["q/k/v", "0.00", "0.00", "0", "CTA 0, 3 of 3"] in cells
    assert "middle" not in tables.note(report) and "'middle'" in tables.note(made_report(parallel=False))
