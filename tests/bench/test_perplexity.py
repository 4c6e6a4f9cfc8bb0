"""perplexity against a straightforward computation by transformers alone."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from clusterfusion.bench import perplexity as module
from clusterfusion.bench.causal_lm import CausalLM
from clusterfusion.bench.evaluation import Sides, load_sides
from clusterfusion.bench.perplexity import PATHS, Window, loss, make_windows, perplexity
from clusterfusion.bench.perplexity_report import lines, table, to_json
from clusterfusion.engine import Session
from clusterfusion.engine.loading import demo_folder
from clusterfusion.errors import ArgumentError

TEXT = "It was a fine day — naïve, they said: “so fine a day”. " * 3


@pytest.fixture(params=["gpt_neox", "llama"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    tiny_model(request.param, vocab_size=257).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_folder() / name, tmp_path)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path


@pytest.fixture
def sides(folder: Path) -> Sides:
    return load_sides(str(folder), device="cpu")


def quiet(message: str) -> None:
    pass


def independent_nats(folder: Path, window: int, stride: int) -> list[float]:
    """The cost of every byte of TEXT but the first: for each, the first window that holds it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    ids = [byte + 1 for byte in TEXT.encode()]
    nats = []
    for target in range(1, len(ids)):
        start = 0
        while start + window <= target:
            start += stride
        with torch.no_grad():
            logits = model(torch.tensor([ids[start:target]])).logits[0, -1]
        nats.append(-float(torch.log_softmax(logits, 0)[ids[target]]))
    return nats


@pytest.mark.parametrize(("window", "stride"), [(128, 64), (50, 13), (50, 49)])
def test_it_equals_an_independent_computation(folder: Path, sides: Sides, window: int, stride: int) -> None:
    report = perplexity(sides, quiet, text_file=folder / "text.txt", window=window, stride=stride, command="c")
    nats = independent_nats(folder, window, stride)
    assert report.scored_tokens == report.scored_bytes == len(nats) == len(TEXT.encode()) - 1
    mean = sum(nats) / len(nats)
    for path in PATHS:
        assert report.losses[path].nats_per_token == pytest.approx(mean, rel=1e-6), path
        assert report.losses[path].perplexity == pytest.approx(math.exp(mean), rel=1e-5)
        assert report.losses[path].bits_per_byte == pytest.approx(mean / math.log(2), rel=1e-6)
    assert set(report.differences) == {"decode - transformers", "prefill - transformers", "decode - prefill"}
    assert all(difference.largest_nats < 1e-3 for difference in report.differences.values())
    written = json.loads(json.dumps(to_json(report), allow_nan=False))
    assert written["losses"]["decode"]["perplexity"] == report.losses["decode"].perplexity
    assert table(report).row_count == 6


def test_windows_score_every_token_but_the_first_once() -> None:
    assert make_windows(10, 4, 2) == [Window(0, 4, 1), Window(2, 6, 4), Window(4, 8, 6), Window(6, 10, 8)]
    assert make_windows(3, 4, 2) == [Window(0, 3, 1)]
    assert make_windows(5, 4, 3) == [Window(0, 4, 1), Window(3, 5, 4)]
    for tokens in range(2, 40):
        for window in range(2, 9):
            for stride in range(1, window):
                made = make_windows(tokens, window, stride)
                assert [t for w in made for t in range(w.first, w.end)] == list(range(1, tokens))
                assert all(w.first > w.start and w.end - w.start <= window for w in made)


def test_loss_by_hand() -> None:
    made = loss(torch.tensor([math.log(2), math.log(8)], dtype=torch.float64), 8)
    assert (made.nats_per_token, made.perplexity, made.bits_per_byte) == pytest.approx((math.log(4), 4.0, 0.5))
    assert math.isnan(loss(torch.ones(1), 0).bits_per_byte)


def test_a_loss_that_is_no_number_stays_one() -> None:
    assert math.isnan(loss(torch.tensor([math.nan]), 1).perplexity)
    assert loss(torch.tensor([710.0]), 1).perplexity == math.inf
    assert loss(torch.tensor([709.0]), 1).perplexity == pytest.approx(math.exp(709))


def test_a_wrong_decode_path_shows(folder: Path, sides: Sides, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(Session):
        def step(self, token: int) -> Tensor:
            return 2 * super().step(token)

    monkeypatch.setattr(module, "Session", Wrong)
    report = perplexity(sides, quiet, text_file=folder / "text.txt")
    assert report.differences["decode - transformers"].largest_nats > 0.1
    assert report.differences["prefill - transformers"].largest_nats < 1e-3


class Overflowing(Session):
    """Once, in the middle."""

    def step(self, token: int) -> Tensor:
        return super().step(token) * (math.nan if self.position == 20 else 1)


def test_a_cost_that_is_no_number_passes_nothing(folder: Path, sides: Sides, monkeypatch: pytest.MonkeyPatch) -> None:
    file = folder / "text.txt"
    whole = perplexity(sides, quiet, text_file=file)
    assert whole.passed and not whole.not_finite and len(lines(whole)) == 1
    logits = CausalLM.logits
    monkeypatch.setattr(CausalLM, "logits", lambda self, ids: logits(self, ids) * math.inf)
    theirs = perplexity(sides, quiet, text_file=file)
    assert theirs.passed and theirs.not_finite == ("transformers",)
    assert lines(theirs)[1].startswith("NOT FINITE: transformers; it may be that activations overflow")
    monkeypatch.setattr(module, "Session", Overflowing)
    both = perplexity(sides, quiet, text_file=file)
    assert to_json(both)["not_finite"] == ["decode", "transformers"]
    costly = loss(torch.tensor([800.0]), 0)  # finite nats; and of no bytes, of which no bits are known
    assert dataclasses.replace(whole, losses={**whole.losses, "prefill": costly}).not_finite == ("prefill",)
    special = dataclasses.replace(whole.losses["decode"], bits_per_byte=math.nan)
    assert dataclasses.replace(whole, losses={**whole.losses, "decode": special}).passed
    assert not both.passed and both.not_finite == ("decode", "transformers")
    assert lines(both)[1].startswith("NOT FINITE: ours, decoding token by token; ")


def test_interrupted_it_keeps_whole_windows(folder: Path, sides: Sides, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = CausalLM.logits
    calls = 0

    def stop(self: CausalLM, ids: list[int]) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return logits(self, ids)

    monkeypatch.setattr(CausalLM, "logits", stop)
    report = perplexity(sides, quiet, text_file=folder / "text.txt", window=32, stride=16)
    assert (report.interrupted, report.windows, report.scored_tokens) == (True, 2, 32 + 16 - 1)
    assert f"2 of {report.asked_windows} (interrupted)" in lines(report)[0]
    calls = 2
    with pytest.raises(KeyboardInterrupt):
        perplexity(sides, quiet, text_file=folder / "text.txt", window=32, stride=16)


def test_texts_and_bad_options(folder: Path, sides: Sides, monkeypatch: pytest.MonkeyPatch) -> None:
    file = folder / "text.txt"
    monkeypatch.setattr(module, "has_datasets", lambda: False)
    with pytest.raises(ArgumentError, match="--text is left out, and the package datasets"):
        perplexity(sides, quiet)
    with pytest.raises(ArgumentError, match="give one of them"):
        perplexity(sides, quiet, text_file=file, dataset="a/b")
    with pytest.raises(ArgumentError, match="stride is 32; it must be an int from 1 to 31"):
        perplexity(sides, quiet, text_file=file, window=32, stride=32)
    with pytest.raises(ArgumentError, match="window is 129; it must be an int from 2 to 128"):
        perplexity(sides, quiet, text_file=file, window=129)
    with pytest.raises(ArgumentError, match="max_tokens is 1; it must be an int from 2"):
        perplexity(sides, quiet, text_file=file, max_tokens=1)
    file.write_text("x")
    with pytest.raises(ArgumentError, match="makes 1 token; it must make at least two"):
        perplexity(sides, quiet, text_file=file)
    monkeypatch.setattr(module, "has_datasets", lambda: True)
    monkeypatch.setattr(module, "dataset_text", lambda name="wikitext": TEXT)
    assert perplexity(sides, quiet, max_tokens=20).text_tokens == 20
