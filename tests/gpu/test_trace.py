"""A step recorded on the GPU: events in order, phases within the step, the file as it should be, and the same logits as a step
that is not recorded."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from bench.trace_records import check_nested

import clusterfusion
from clusterfusion import reference
from clusterfusion.bench.trace.measure import TraceReport, measure_trace
from clusterfusion.bench.trace.options import trace_options
from clusterfusion.cli import main
from clusterfusion.engine import Engine
from clusterfusion.engine.step_decoder import StepDecoder
from clusterfusion.ops.layer_launch import plan_for
from clusterfusion.plan.trace import ROLES, TIMES, trace_words

pytestmark = pytest.mark.gpu
CONTEXT, STEPS = 40, 8


@pytest.fixture(scope="module")
def engine() -> Engine:
    return clusterfusion.load("demo", dtype="float16")


@pytest.fixture(scope="module")
def report(engine: Engine) -> TraceReport:
    options = trace_options(engine.config.max_position, context=CONTEXT, steps=STEPS, ctas=8)
    return measure_trace(engine, options, lambda line: None)


def test_every_cta_passes_every_event_of_every_layer(report: TraceReport) -> None:
    timeline = report.timeline
    plan = plan_for(timeline.config, torch.cuda.current_device())
    assert (timeline.ctas, timeline.layers) == (plan.ctas, timeline.config.num_layers)
    works = np.array([plan.works(cta, CONTEXT + STEPS - 1) for cta in range(timeline.ctas)])
    for event in TIMES:
        passed = ~np.isnan(timeline.at(event))
        wanted = works if event.startswith("attention") else np.full_like(works, event != "logits_done")
        assert (passed[:, :-1] == wanted[:, None]).all(), event
        behind = event in ("begin", "residual_read", "normed", "project_wait", "project_begin", "logits_done")
        assert (passed[:, -1] == behind).all(), event


def test_phases_lie_in_their_layers_and_add_up_to_no_more_than_the_step(report: TraceReport) -> None:
    timeline = report.timeline
    assert 0.5 < timeline.ghz.min() <= timeline.ghz.max() < 4
    assert timeline.ghz.max() / timeline.ghz.min() < 1.2
    assert timeline.step_ns < 10e6
    for role in ROLES:
        begin, end = timeline.bounds(role)
        busy = np.zeros(timeline.ctas)
        for phase in timeline.phases:
            if phase.role == role:
                took = timeline.took(phase)
                assert (np.isnan(took) | (took >= 0)).all(), phase
                with np.errstate(invalid="ignore"):
                    assert not (timeline.at(phase.begin) < begin).any() and not (timeline.at(phase.end) > end).any(), (
                        phase
                    )
                busy += np.nansum(took, axis=1)
        assert (busy <= timeline.end - timeline.start).all()
        summary = report.summary
        assert summary.layer[role].total_ns * timeline.layers < summary.step_ns
        assert sum(summary.step[role].parts.values()) == pytest.approx(summary.step[role].total_ns)
        assert min(summary.step[role].parts.values()) > -1e-3
    assert report.summary.layer["tiles"].parts["streaming"] > 0
    assert [skew.dependency for skew in report.summary.skews] == ["residual", "q/k/v", "attention", "hidden"]


def test_nobody_goes_on_before_everyone_has_given(report: TraceReport) -> None:
    """Up to the steps in which the global timer moves, at both ends of a CTA."""
    slack = 2 * report.timeline.timer_ns + 100
    for skew in report.summary.skews:
        assert skew.hand_over_ns is None or skew.hand_over_ns > -slack, skew


def test_the_command_writes_a_file_of_nested_slices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "trace.json.gz"
    arguments = f"bench trace demo --context {CONTEXT} --steps 3 --ctas 4 --out {file}".split()
    monkeypatch.setattr(sys, "argv", ["clusterfusion", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert f"one step after {CONTEXT + 2} cached tokens" in capsys.readouterr().out
    trace = json.loads(gzip.decompress(file.read_bytes()))
    assert trace["otherData"]["model"] == "demo"
    threads = check_nested(trace["traceEvents"])
    assert len(threads) == 2 * 4 and min(threads.values()) > 0


def test_a_recorded_step_has_the_same_bits(engine: Engine) -> None:
    weights, config = engine.weights, engine.config
    plan = plan_for(config, weights.device.index)
    ids = torch.arange(CONTEXT, device=weights.device) % config.vocab_size
    seen = []
    for on in (False, True):
        cache = reference.KVCache.allocate(config, CONTEXT + STEPS, weights.dtype, weights.device)
        reference.forward(weights, ids, cache, 0)
        record = torch.zeros(trace_words(plan), dtype=torch.int64, device=weights.device) if on else None
        decoder = StepDecoder(weights, cache, plan=plan, trace=record)
        logits = torch.stack([decoder.step(7 + step, CONTEXT + step) for step in range(STEPS)])
        tokens = list(decoder.stream(7, CONTEXT, STEPS))
        decoder.check_error()
        seen.append((logits, tokens, cache))
    (logits, tokens, cache), (traced_logits, traced_tokens, traced_cache) = seen
    assert torch.equal(logits, traced_logits) and tokens == traced_tokens
    assert torch.equal(cache.k, traced_cache.k) and torch.equal(cache.v, traced_cache.v)
