"""`bench prefill` on a CPU: options, a whole run with transformers, the order of visits, and what a failed peer leaves."""

from __future__ import annotations

import dataclasses
import json
import time
import types
from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch

from clusterfusion.bench import prefill as made
from clusterfusion.bench.prefill import PEER, prefill_options
from clusterfusion.engine import Engine, load
from clusterfusion.errors import ArgumentError
from clusterfusion.named_shapes import named_shape

CONFIG = dataclasses.replace(named_shape("pythia-14m"), num_layers=2, vocab_size=64, max_position=40)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return load(random_weights=CONFIG, device="cpu", dtype="float32")


def test_what_is_left_out_fits_the_model_and_the_machine() -> None:
    assert prefill_options(2048, on_gpu=True).prompts == (16, 128, 512, 1024, 2048)
    assert prefill_options(1000, on_gpu=True).prompts == (16, 128, 512)
    assert prefill_options(8, on_gpu=True).prompts == (8,)
    assert prefill_options(2048, on_gpu=False).prompts == (16,)
    assert prefill_options(None, on_gpu=True, prompts="7, 2048").prompts == (7, 2048)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"prompts": "41"}, "prompts is 41; it must be an int from 1 to 40"),
        ({"prompts": "0"}, "prompts is 0; it must be an int from 1"),
        ({"prompts": "3,3"}, "none twice"),
        ({"runs": 4}, "runs is 4; it must be an int from 5"),
    ],
)
def test_bad_options_are_named_with_value_and_need(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        prefill_options(40, on_gpu=True, **options)
    assert expected in str(caught.value)


def test_on_a_gpu_loops_run_untimed_until_clocks_have_risen(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def loop(ids: Sequence[int]) -> int:
        calls.append(len(ids))
        time.sleep(0.005)
        return 7

    monkeypatch.setattr(made, "WARM_S", 0.1)
    for device in ("cpu", "cuda"):
        calls.clear()
        engine = types.SimpleNamespace(config=CONFIG, device=torch.device(device))
        began = time.perf_counter()
        times = made._measure_prompt(cast("Engine", engine), {"ours": loop}, 3, runs=5)
        took = time.perf_counter() - began
        assert len(times.timings["ours"].times_ms) == 5
        assert (len(calls) - 5 == made.WARM_RUNS) == (device == "cpu")
        assert (took >= 0.1) or device == "cpu"


def test_a_run_fills_the_context_and_agrees_with_transformers(engine: Engine) -> None:
    seen = []
    options = prefill_options(40, on_gpu=False, prompts="5,40", runs=5)
    report = made.measure_prefill(engine, options, lambda line: None, "a command", seen.append)
    assert [len(one.prompts) for one in seen] == [1, 2]
    for times in report.prompts:
        assert list(times.timings) == ["reference", PEER]
        assert times.first_tokens["reference"] == times.first_tokens[PEER]
        assert all(len(timing.times_ms) == 5 and timing.error is None for timing in times.timings.values())
        assert times.ratio(PEER) == 1 and times.ratio("reference") is not None
    out = json.loads(json.dumps(made.to_json(report), allow_nan=False))
    assert out["prompts"][1]["loops"]["reference"]["samples"] == 5
    assert made.to_json(seen[0])["asked_prompts"] == out["asked_prompts"] == [5, 40], "so that a killed run is known"
    assert len(list(made.rows(report))) == made.table(report).row_count == 4
    said = made.markdown(report)
    assert "| 40 | reference |" in said and "`a command`" in said


def test_loops_are_visited_in_turn_and_a_failed_peer_is_reported(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    visits: list[str] = []

    def loop(name: str) -> made.FirstToken:
        def first_token(ids: Sequence[int]) -> int:
            visits.append(name)
            if name == PEER:
                raise RuntimeError("no kernel image")
            return 3

        return first_token

    names = ("model", "reference", PEER)
    monkeypatch.setattr(made, "_loops", lambda *_: {name: loop(name) for name in names})
    options = prefill_options(40, on_gpu=False, prompts="5", runs=5)
    report = made.measure_prefill(engine, options, lambda line: None)
    assert visits == ["model"] * 3 + ["reference"] * 3 + [PEER] + ["model", "reference"] * 4
    (times,) = report.prompts
    assert times.ratio("model") is None and times.timings[PEER].times_ms == ()
    assert made.lines(report) == [f"{PEER} failed at a prompt of 5: RuntimeError: no kernel image"]
    assert "failed" in made.markdown(report)
    assert made.to_json(report)["prompts"][0]["loops"][PEER]["error"] == "RuntimeError: no kernel image"


def test_an_interrupted_run_keeps_what_is_done(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def loop(ids: Sequence[int]) -> int:
        if len(ids) == 6:
            raise KeyboardInterrupt
        return 3

    monkeypatch.setattr(made, "_loops", lambda *_: {"model": loop})
    report = made.measure_prefill(engine, prefill_options(40, on_gpu=False, prompts="5,6", runs=5), lambda line: None)
    assert report.interrupted and len(report.prompts) == 1
    assert made.lines(report) == ["interrupted after 1 of 2 prompts"]
    with pytest.raises(KeyboardInterrupt):
        made.measure_prefill(engine, prefill_options(40, on_gpu=False, prompts="6", runs=5), lambda line: None)
