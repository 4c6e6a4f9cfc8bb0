"""The run of `bench layer` on a CPU, with stand-ins for what needs a GPU: what is asked of whom, and what stops it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from clusterfusion.bench import layer
from clusterfusion.bench.forms import FORMS, agreed_output
from clusterfusion.bench.options import LayerOptions, layer_options
from clusterfusion.bench.report import to_json
from clusterfusion.bench.samples import Candidate
from clusterfusion.errors import ClusterFusionError, DeviceError
from clusterfusion.jit.read_ceiling import VARIANTS

TIMES_MS = {"graph": 2.0, "split graph": 3.5, "fused": 3.0, "split": 4.0, "bulk copies": 1.0, "loads": 1.25}


class StandInCeiling:
    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.lead: Callable[[], None] = lambda: None

    def check(self) -> None:
        pass

    def candidates(self, samples: int) -> list[Candidate]:
        return [Candidate(variant, lambda: None, lambda: None, samples) for variant in VARIANTS]


class StandInForm:
    wrong: str | None = None

    def __init__(self, name: str, weights: Any, cache: Any, x: Tensor) -> None:
        self.name, self._x, self.contexts = name, x, [0]

    def set_context(self, context: int) -> None:
        self.contexts.append(context)

    def output(self) -> Tensor:
        return self._x + self.contexts[-1] + (self.name == self.wrong)

    def candidate(self, samples: int) -> Candidate:
        return Candidate(self.name, lambda: None, lambda: None, samples)


@pytest.fixture
def options(monkeypatch: pytest.MonkeyPatch) -> LayerOptions:
    monkeypatch.setattr(layer, "require_gpu", lambda what: torch.device("cpu", 0))
    monkeypatch.setattr(layer, "require_memory", lambda *_: None)
    monkeypatch.setattr(layer, "ReadCeiling", StandInCeiling)
    monkeypatch.setattr(layer, "Form", StandInForm)
    monkeypatch.setattr(layer, "DeviceTimer", lambda lead: lambda of, count: [TIMES_MS[of.name]] * count)
    return layer_options("pythia-14m", contexts=(0, 33), layers=2, peers=False)


def test_a_run_measures_every_form_at_every_context(options: LayerOptions) -> None:
    lines: list[str] = []
    so_far: list[int] = []
    report = layer.measure_layers(
        options, lines.append, "the command", lambda report: so_far.append(len(report.contexts))
    )
    assert so_far == list(range(1, len(options.contexts) + 1)), "a report after every context"
    said = to_json(report)
    assert [context["context"] for context in said["contexts"]] == [0, 33]
    for context in said["contexts"]:
        assert {name: form["median_ms"] for name, form in context["forms"].items()} == {n: TIMES_MS[n] for n in FORMS}
        assert all(form["samples"] == 100 for form in context["forms"].values())
        assert context["peers"] == {}
    assert said["read_ceiling"]["variants"]["loads"]["samples"] == 200
    assert said["command"] == "the command"
    assert any("context 33" in line for line in lines)


def test_peers_that_fail_are_in_the_report(options: LayerOptions) -> None:
    """Without a GPU every peer fails, each with its reason."""
    report = layer.measure_layers(dataclasses.replace(options, peer_contexts=options.contexts), lambda line: None)
    for context in to_json(report)["contexts"]:
        assert len(context["peers"]) == 3
        assert all(peer["error"] for peer in context["peers"].values())
        assert context["forms"]["graph"]["speedup_over"] == {}


def test_interrupted_it_keeps_what_is_done(options: LayerOptions) -> None:
    def stop_at(context: int) -> Callable[[str], None]:
        def stop(line: str) -> None:
            if line == f"context {context}: measuring":
                raise KeyboardInterrupt

        return stop

    report = layer.measure_layers(options, stop_at(33))
    written = to_json(report)
    assert written["interrupted"] and written["asked_contexts"] == [0, 33]
    assert [times["context"] for times in written["contexts"]] == [0]
    assert not to_json(layer.measure_layers(options, lambda line: None))["interrupted"]
    with pytest.raises(KeyboardInterrupt):
        layer.measure_layers(options, stop_at(0))


def test_forms_that_differ_stop_the_run(options: LayerOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StandInForm, "wrong", "split")
    with pytest.raises(ClusterFusionError, match="split and graph differ at context 0 in 128 of 128 values"):
        layer.measure_layers(options, lambda line: None)


def test_agreement_is_to_the_bit_and_finite() -> None:
    x = torch.ones(8)
    assert torch.equal(agreed_output({"graph": x, "split": x.clone()}, 5), x)
    other = x.clone()
    other[3] += torch.finfo(torch.float32).eps
    with pytest.raises(ClusterFusionError, match="in 1 of 8 values"):
        agreed_output({"graph": x, "split": other}, 5)
    other[3] = torch.nan
    with pytest.raises(ClusterFusionError, match="graph at context 5: 1 of 8 values are not finite"):
        agreed_output({"graph": other, "split": other}, 5)


def test_without_a_gpu_it_says_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match=r"compute capability 9\.0"):
        layer.measure_layers(layer_options("pythia-14m"), lambda line: None)
