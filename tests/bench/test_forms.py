"""A launch form over a stand-in decoder: what every step starts from, where it stands, and that errors are looked for."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from clusterfusion.bench import forms
from clusterfusion.bench.forms import FORMS, Form
from clusterfusion.engine.block_decoder import BlockDecoder
from clusterfusion.errors import DeviceError
from clusterfusion.named_shapes import named_shape
from clusterfusion.random_weights import random_weights


class StandInDecoder:
    """Doubles the residual vector where it lies, and adds the position."""

    def __init__(self, weights: Any, cache: Any, mode: str) -> None:
        self.mode, self.position, self.failed = mode, -1, False
        self.residual = torch.full((4,), torch.nan)

    def set_position(self, position: int) -> None:
        self.position = position

    def run_layers(self) -> Tensor:
        self.residual.mul_(2).add_(self.position)
        return self.residual

    def check_error(self) -> None:
        if self.failed:
            raise DeviceError("a decode step gave up")


@pytest.fixture
def form(monkeypatch: pytest.MonkeyPatch) -> Form:
    monkeypatch.setattr(forms, "BlockDecoder", StandInDecoder)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    config = dataclasses.replace(named_shape("pythia-14m"), num_layers=1, vocab_size=64)
    weights = random_weights(config, dtype=torch.float16, device=torch.device("cpu"))
    return Form("fused", weights, None, torch.arange(4.0))  # type: ignore[arg-type]


def test_every_output_starts_from_the_same_residual(form: Form) -> None:
    form.set_context(5)
    first = form.output()
    assert first.tolist() == [5.0, 7.0, 9.0, 11.0]
    assert torch.equal(form.output(), first)
    form.set_context(6)
    assert torch.equal(form.output(), first + 1)
    assert torch.equal(first, torch.tensor([5.0, 7.0, 9.0, 11.0])), "an output is not written over by the next"


def test_a_candidate_prepares_and_runs_the_same_step(form: Form) -> None:
    form.set_context(1)
    candidate = form.candidate(100)
    assert (candidate.name, candidate.samples, candidate.may_fail) == ("fused", 100, False)
    for _ in range(2):
        candidate.prepare()
        assert candidate.run().tolist() == [1.0, 3.0, 5.0, 7.0]  # type: ignore[attr-defined]


def test_a_wait_that_ran_out_is_an_error(form: Form) -> None:
    form.set_context(0)
    form._decoder.failed = True  # type: ignore[attr-defined]
    with pytest.raises(DeviceError, match="gave up"):
        form.output()


def test_the_decoder_has_what_forms_need() -> None:
    assert {"residual", "set_position", "run_layers", "check_error"} <= set(dir(BlockDecoder))
    assert FORMS == ("graph", "split graph", "fused", "split")
