"""`bench trace` from made-up records: one time axis, every figure of the summary, the run and what it prints. The file is in
test_trace_file.py, records that no step wrote in test_trace_refused.py."""

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
    LAYERS,
    START,
    STEP,
    TILES,
    make_record,
    small_plan,
    timeline_of,
)
from plan.orders import ORDERS
from rich.console import Console

from clusterfusion.bench import costs, environment
from clusterfusion.bench.environment import Origin
from clusterfusion.bench.trace import measure, tables
from clusterfusion.bench.trace.chrome import chrome_trace
from clusterfusion.bench.trace.measure import TraceReport, measure_trace
from clusterfusion.bench.trace.options import TraceOptions, require_shape, trace_options
from clusterfusion.bench.trace.summary import Summary, summarise
from clusterfusion.bench.trace.timeline import Timeline, read_record
from clusterfusion.cli import main
from clusterfusion.engine import load
from clusterfusion.errors import ArgumentError, UnsupportedModelError
from clusterfusion.plan import trace as layout
from clusterfusion.plan.block import Order
from clusterfusion.plan.trace import Role


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


@pytest.mark.parametrize("order", ORDERS)
def test_nobody_goes_on_before_what_it_waits_for(order: Order) -> None:
    """In the records of these tests: what follows from them would say nothing of a step otherwise."""
    timeline = timeline_of(small_plan(order=order))
    for of in layout.DEPENDENCIES:
        given, goes_on = (
            timeline.at(of.given)[:, :LAYERS],
            timeline.at(of.begin)[:, int(of.of_next_layer) :][:, :LAYERS],
        )
        assert (given.max(axis=0) <= goes_on).all(), of
    signals = [("normed", "project_begin"), ("down_ready", "down_tiles_begin"), ("output_ready", "o_begin")]
    signals += [("attention_begin", "cached_begin"), ("cached_done", "attention_done")]
    signals += [("qkv_done", "output_ready"), ("up_done", "down_ready")]  # the places of what they bring
    signals += [("o_done", "published"), ("down_tiles_done", "published")]
    if order == "sequential":
        signals += [("o_done", "down_wait"), ("down_wait", "up_done")]  # around the middle residual
    for given, goes_on in signals:
        assert (timeline.at(given) <= timeline.at(goes_on))[:, :LAYERS].all(), (given, goes_on)
    for role, name in (("vectors", "published"), ("tiles", layout.passed("tiles", order)[-2])):
        _, end = timeline.bounds(role)
        assert (timeline.at(name) <= end)[:, :LAYERS].all(), name
    for event in layout.TIMES:
        passed = ~np.isnan(timeline.at(event))
        assert (passed[:, :LAYERS] == (event != "logits_done")).all(), event
        behind = event in ("begin", "residual_read", "normed", "project_wait", "project_begin", "logits_done")
        assert (passed[:, LAYERS] == behind).all(), event


@pytest.mark.parametrize(
    ("order", "last"), [("up_first", "o_done"), ("qkv_first", "o_done"), ("sequential", "down_tiles_done")]
)
def test_tiles_that_leave_the_lm_head_to_others_end_with_their_last_event(order: Order, last: str) -> None:
    def gaps(cta: int, layer: int, role: Role, usual: dict[str, int]) -> dict[str, int]:
        return {} if layer == LAYERS and role == "tiles" else usual

    plan = small_plan(order=order)
    words = make_record(plan, gaps)
    events = words.reshape(-1)[: int(np.prod(layout.trace_shape(plan)))].reshape(layout.trace_shape(plan))
    events[:, -1, layout.EVENTS.index(layout.DATA_WAITED)] = 0
    timeline = read_record(words, plan)
    begin, end = timeline.bounds("tiles")
    assert np.isnan(begin[:, -1]).all() and np.isnan(end[:, -1]).all()
    assert end[0, -2] == timeline.at(last)[0, -2]
    summary = summarise(timeline, 5)
    assert summary.head["tiles"].total_ns == 0 and summary.head["tiles"].share("streaming") == 0
    waits = (LAYERS - 1) * TILES[order]["project_wait"]
    assert summary.step["tiles"].parts["other"] == pytest.approx(HEAD_LAYER + 10 + waits)
    json.dumps(chrome_trace(timeline, about=summary.to_json()), allow_nan=False)


# -- figures -----------------------------------------------------------------------------------------------------------


FIGURES: dict[Order, dict[Role, dict[str, int]]] = {
    "up_first": {
        "vectors": {
            "wait: residual": 100, "norm": 50, "wait: hidden": 190, "load": 40 + 30, "wait: q/k/v": 150, "attention": 200,
            "wait: attention": 70, "sums": 130, "other": 5 + 20 + 5 + 10,
        },
        "tiles": {
            "streaming": 180 + 200 + (35 + 25 + 40) + 80 - DATA_WAITED, "wait: data": DATA_WAITED, "wait: residual": 150,
            "wait: hidden": 20, "wait: q/k/v": 15, "wait: attention": 245, "other": 10,
        },
    },
    "qkv_first": {
        "vectors": {
            "wait: residual": 100, "norm": 50, "wait: q/k/v": 260, "attention": 200, "wait: hidden": 80, "load": 40 + 30,
            "wait: attention": 70, "sums": 130, "other": 20 + 5 + 5 + 10,
        },
        "tiles": {
            "streaming": 200 + 180 + 10 + 90 + 80 - DATA_WAITED, "wait: data": DATA_WAITED, "wait: residual": 150,
            "wait: q/k/v": 15, "wait: hidden": 245, "wait: attention": 20, "other": 10,
        },
    },
    "sequential": {
        "vectors": {
            "wait: residual": 100, "norm": 50, "wait: q/k/v": 190, "attention": 100, "wait: attention": 70, "load": 30 + 10,
            "middle": 130, "wait: hidden": 180, "sums": 105, "other": 20 + 5 + 10,
        },
        "tiles": {
            "streaming": 200 + 10 + 70 + 180 + 100 - DATA_WAITED, "wait: data": DATA_WAITED, "wait: residual": 150,
            "wait: q/k/v": 15, "wait: attention": 245, "wait: hidden": 20, "other": 10,
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("order", ORDERS)
def test_every_figure_of_a_layer(order: Order) -> None:
    summary = summarise(timeline_of(small_plan(order=order)), cached_tokens=7)
    for role in layout.ROLES:
        found = parts(summary, "layer", role)
        assert found == FIGURES[order][role]
        assert list(found) == list(FIGURES[order][role]), "as a layer has them"
        assert summary.layer[role].total_ns == pytest.approx(LAYER)
    assert summary.layer["tiles"].share("streaming") == pytest.approx(504 / 1000)
    assert summary.layer["tiles"].share("no such part") == 0


@pytest.mark.parametrize("order", ORDERS)
def test_every_figure_of_the_lm_head_and_the_step(order: Order) -> None:
    summary = summarise(timeline_of(small_plan(order=order)), cached_tokens=7)
    assert summary.head["vectors"].total_ns == pytest.approx(HEAD_LAYER)
    head = parts(summary, "head", "tiles")
    assert {name: ns for name, ns in head.items() if ns != 0} == {
        "streaming": 300 - 32,
        "wait: data": 32,
        "wait: residual": 150,
        "other": HEAD_LAYER - 450,
    }
    layer = FIGURES[order]["tiles"]
    assert parts(summary, "step", "tiles") == {
        "start": START + 10,
        "streaming": 3 * 504 + 268,
        "wait: data": 3 * DATA_WAITED + 32,
        "wait: residual": 4 * 150,
        "wait: q/k/v": 3 * layer["wait: q/k/v"],
        "wait: attention": 3 * layer["wait: attention"],
        "wait: hidden": 3 * layer["wait: hidden"],
        "other": 3 * 10 + HEAD_LAYER - 450,
    }
    assert parts(summary, "step", "vectors")["wait: q/k/v"] == 3 * FIGURES[order]["vectors"]["wait: q/k/v"]
    assert summary.step["vectors"].total_ns == summary.step_ns == STEP


def test_bytes_a_second() -> None:
    plan = small_plan()
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
        """CTA 3 has no head, so that it asks for h early, and for attention. In layer 1, CTA 1 gives q, k, v 65 ns late, and has
        that much less to do after."""
        if cta == 3 and role == "vectors" and layer < LAYERS:
            without = {name: ns for name, ns in usual.items() if not name.startswith("attention")}
            return without | {"down_begin": 395, "output_ready": 195}
        if (cta, layer, role) == (1, 1, "tiles"):
            return usual | {"qkv_done": 265, "up_done": 115}
        return usual

    summary = summarise(timeline_of(gaps=gaps, delays=(0, 10, 20, 50)), cached_tokens=7)
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
    # h: last given at 590, by CTA 3, which has waited for it since 215 and goes on at 610; others look behind 645.
    assert skews["hidden"].hand_over_ns == pytest.approx(610 - 590)
    # Attention: last given at 660; CTA 3 has waited since 655 and goes on at 725; others look behind 770.
    assert skews["attention"].hand_over_ns == pytest.approx(725 - 660)


@pytest.mark.parametrize(
    ("order", "hand_overs"),
    [("up_first", {"hidden": 355 - 340}), ("qkv_first", {}), ("sequential", {"hidden": 885 - 880})],
)
def test_what_nobody_waits_for_is_not_handed_over(order: Order, hand_overs: dict[str, int]) -> None:
    """In ns of a layer, h is given at 340, 540 and 880, and asked for from 165, 645 and 705 on; attention at 765, 640 and 470,
    and asked for from 770, 770 and 475 on; the residual 10 ns before the next layer."""
    skews = summarise(timeline_of(small_plan(order=order)), cached_tokens=7).skews
    waited = {skew.dependency: skew.hand_over_ns for skew in skews if skew.hand_over_ns is not None}
    assert waited == pytest.approx(hand_overs)


# -- options, the run, what is printed ---------------------------------------------------------------------------------


def test_options() -> None:
    assert trace_options(2048) == TraceOptions(512, 31, 16)
    assert trace_options(None).cached_tokens == 542
    assert trace_options(64) == TraceOptions(33, 31, 16)
    assert trace_options(16, steps=1) == TraceOptions(15, 1, 16)
    for options, message in (
        ({"context": 2048}, "context is 2048, which makes 2079 tokens with 31 steps; .* must be from 1 to 2017"),
        ({"context": 0}, "context is 0; it must be an int from 1"),
        ({"steps": 0}, "steps is 0; it must be an int from 1 to 2047"),
        ({"ctas": 0}, "ctas is 0; it must be an int from 1"),
    ):
        with pytest.raises(ArgumentError, match=message):
            trace_options(2048, **options)
    with pytest.raises(UnsupportedModelError, match="mode 'model', which cannot run pythia-14m here: .* NVIDIA GPU"):
        require_shape("pythia-14m", torch.device("cpu"))


def made_report(order: Order = "qkv_first") -> TraceReport:
    timeline = timeline_of(small_plan(order=order))
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
    with pytest.raises(UnsupportedModelError, match="which cannot run demo here: the kernels need an NVIDIA GPU"):
        measure_trace(engine, TraceOptions(5, 3, 2), lambda line: None)


def test_a_record_is_read_from_the_decoder_after_its_last_step(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, log = small_plan(), []

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
    assert seen == [TraceOptions(9, 31, 16)]
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
    for order in ORDERS:
        assert ("'middle'" in tables.note(made_report(order))) == (order == "sequential")
