"""quality on tiny models: its columns against values computed in one forward, and what it leaves out."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor

from clusterfusion.bench import quality as module
from clusterfusion.bench.agreement import Estimate
from clusterfusion.bench.causal_lm import Stepper
from clusterfusion.bench.evaluation import Sides, load_sides
from clusterfusion.bench.quality import compare, quality
from clusterfusion.bench.quality_report import NAMES, lines, table, to_json
from clusterfusion.bench.texts import random_tokens
from clusterfusion.engine import Session
from clusterfusion.errors import ArgumentError

TOKENS = 90  # more than a chunk


@pytest.fixture(params=["gpt_neox", "llama"])
def sides(request: pytest.FixtureRequest, tmp_path: Path) -> Sides:
    tiny_model(request.param).save_pretrained(tmp_path)
    return load_sides(str(tmp_path), device="cpu")


def quiet(message: str) -> None:
    pass


def test_both_sides_are_within_rounding_of_the_truth(sides: Sides) -> None:
    report = quality(sides, quiet, tokens=TOKENS, command="clusterfusion quality x")
    assert (report.positions, report.source) == (TOKENS, "random tokens, seed 0")
    assert list(report.measures) == list(NAMES)
    for name, measure in report.measures.items():
        for side in (measure.ours, measure.transformers):
            assert side is not None, name
            assert side.low <= side.mean <= side.high
    for name in ("greedy_match", "top_1", "top_5", "top_10"):
        ours = report.measures[name].ours
        assert ours is not None
        assert ours.mean > 0.99
    assert 0 < report.logits_max.ours < 1e-3
    assert 0 < report.logits_max.transformers < 1e-3
    assert report.hidden_note is None
    written = json.loads(json.dumps(to_json(report), allow_nan=False))
    assert written["measures"]["kl_nats"]["difference"]["low"] <= written["measures"]["kl_nats"]["difference"]["high"]
    assert table(report).row_count == len(NAMES) + 1


def test_rounding_is_told_apart(sides: Sides, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of ours that are finer than transformers' are set beside it as rounded to its dtype, too."""
    step = Stepper.step

    def coarse(self: Stepper, token: int) -> tuple[Tensor, Tensor]:
        logits, hidden = step(self, token)
        return logits.bfloat16(), hidden

    assert quality(sides, quiet, tokens=20).logits_max.rounded is None
    monkeypatch.setattr(Stepper, "step", coarse)
    report = quality(sides, quiet, tokens=20)
    for name in ("logits_mae", "kl_nats"):
        measure = report.measures[name]
        assert measure.ours is not None and measure.rounded is not None and measure.transformers is not None
        assert 0 < measure.ours.mean < 0.01 * measure.rounded.mean
        assert measure.rounded.mean == pytest.approx(measure.transformers.mean, rel=1e-2)
    assert report.measures["hidden_mae"].rounded is None
    assert report.logits_max.rounded == pytest.approx(report.logits_max.transformers, rel=1e-2)
    assert "ours, rounded" in [str(column.header) for column in table(report).columns]
    assert any("rounded to the same dtype" in line for line in lines(report))


def test_the_numbers_are_those_of_one_forward(sides: Sides) -> None:
    """transformers' own float64 model is an independent truth."""
    ids = random_tokens(97, TOKENS, 0)
    logits = sides.peer.logits(ids)
    folder = sides.engine.name
    truth = load_sides(folder, dtype="float64", device="cpu").peer.logits(ids)
    error = (logits.double() - truth).abs()
    measured = quality(sides, quiet, tokens=TOKENS)
    theirs = measured.measures["logits_mae"].transformers
    assert theirs is not None
    assert theirs.mean == pytest.approx(float(error.mean()), rel=0.3)  # decoding rounds otherwise than one forward


def test_a_wrong_engine_shows(sides: Sides, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(Session):
        def step(self, token: int) -> Tensor:
            return super().step(token).flip(0)

    monkeypatch.setattr(module, "Session", Wrong)
    report = quality(sides, quiet, tokens=20)
    kl, match = report.measures["kl_nats"], report.measures["greedy_match"]
    assert kl.ours is not None
    assert kl.transformers is not None
    assert kl.difference is not None
    assert match.ours is not None
    assert kl.ours.mean > 1 > 1e-6 > kl.transformers.mean
    assert kl.difference.low > 0
    assert match.ours.mean < 0.5
    hidden = report.measures["hidden_mae"]
    assert hidden.ours is None
    assert hidden.difference is None
    assert hidden.transformers is not None
    assert report.hidden_note
    assert any(report.hidden_note in line for line in lines(report))


@pytest.mark.parametrize("side", ["ours", "transformers"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_said(
    sides: Sides, monkeypatch: pytest.MonkeyPatch, side: str, bad: float
) -> None:
    """Be it one logit of one step, behind which larger errors come."""
    assert quality(sides, quiet, tokens=20).not_finite == ()
    step, steps = Stepper.step, 0

    class Ours(Session):
        def step(self, token: int) -> Tensor:
            logits = super().step(token).clone()
            logits[5] += bad if self.position == 10 else self.position
            return logits

    def theirs(self: Stepper, token: int) -> tuple[Tensor, Tensor]:
        nonlocal steps
        steps += 1
        logits, hidden = step(self, token)
        logits = logits.clone()
        logits[5] += bad if steps == 10 else steps
        return logits, hidden

    if side == "ours":
        monkeypatch.setattr(module, "Session", Ours)
    else:
        monkeypatch.setattr(Stepper, "step", theirs)
    report = quality(sides, quiet, tokens=20)
    assert report.not_finite == (side,)
    assert report.passed == (side == "transformers")
    assert not math.isfinite(getattr(report.logits_max, side))
    assert lines(report)[-1].startswith(f"NOT FINITE: {side}; ")


def test_what_of_it_is_not_finite_is_said(sides: Sides) -> None:
    """Each measure of each side counts. Ours as rounded is said, and passes."""
    report = quality(sides, quiet, tokens=20)
    bad = Estimate(math.inf, math.nan, math.nan)
    for name, measure in report.measures.items():
        for side in ("ours", "rounded", "transformers"):
            spoiled = dataclasses.replace(measure, **{side: bad})
            other = dataclasses.replace(report, measures={**report.measures, name: spoiled})
            assert other.not_finite == (side,)
            assert other.passed == (side != "ours")
            assert to_json(other)["not_finite"] == [side]
            assert lines(other)[-1].startswith(
                "NOT FINITE: ours, rounded;" if side == "rounded" else f"NOT FINITE: {side};"
            )


def test_two_infinities_have_no_difference() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for theirs in ([math.inf, 2.0], [2.0, math.inf]):
            made = module._comparison([math.inf, 1.0], theirs, None)
            assert made.difference is not None and math.isnan(made.difference.mean)


def test_columns_by_hand() -> None:
    truth = torch.tensor([[3.0, 1.0, 0.0], [0.0, 2.0, 1.0]], dtype=torch.float64)
    columns = compare(truth, torch.tensor([[3.0, 1.5, 0.0], [0.0, 1.0, 4.0]]))
    assert columns["greedy_match"] == columns["top_1"] == [1.0, 0.0]
    assert columns["top_5"] == columns["top_10"] == [1.0, 1.0]
    assert columns["logits_mae"] == pytest.approx([0.5 / 3, 4 / 3])
    assert columns["logits_max"] == [0.5, 3.0]


def test_interrupted_it_keeps_whole_positions(sides: Sides, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Stepper.step
    steps = 0

    def stop(self: Stepper, token: int) -> tuple[Tensor, Tensor]:
        nonlocal steps
        steps += 1
        if steps == 71:
            raise KeyboardInterrupt
        return step(self, token)

    monkeypatch.setattr(Stepper, "step", stop)
    report = quality(sides, quiet, tokens=TOKENS)
    assert (report.interrupted, report.positions, report.asked_tokens) == (True, 70, TOKENS)
    assert report.measures["hidden_mae"].ours is not None
    steps = 70
    with pytest.raises(KeyboardInterrupt):
        quality(sides, quiet, tokens=TOKENS)


def test_random_weights_and_bad_options(sides: Sides, tmp_path: Path) -> None:
    assert quality(sides, quiet).positions == 128  # the model's limit
    file = tmp_path / "text.txt"
    file.write_text("text")
    with pytest.raises(ArgumentError, match="--text needs a tokenizer"):
        quality(sides, quiet, text_file=file)
    with pytest.raises(ArgumentError, match="tokens is 129; it must be an int from 1 to 128"):
        quality(sides, quiet, tokens=129)
    with pytest.raises(ArgumentError, match="either MODEL or --random-weights SHAPE; neither was given"):
        load_sides(None)
    shape = load_sides(None, random_weights="pythia-14m", device="cpu")
    report = quality(shape, quiet, tokens=3, random_text=True)
    assert report.facts.transformers_weights == "the engine's own tensors"
    assert report.logits_max.ours < 1e-4
