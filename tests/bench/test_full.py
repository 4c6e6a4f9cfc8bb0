"""`bench full` on a CPU: its options, whole runs of the demo model, and what is left out and why."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from clusterfusion.bench.decode import measure as decode_measure
from clusterfusion.bench.decode.options import decode_options
from clusterfusion.bench.full import measure, options
from clusterfusion.bench.full.measure import measure_full
from clusterfusion.bench.full.options import TextOptions, text_options, text_options_for
from clusterfusion.bench.full.report import FullReport, lines, markdown, report_tables, to_json
from clusterfusion.engine import Engine, load
from clusterfusion.errors import ArgumentError, ClusterFusionError
from clusterfusion.named_shapes import named_shape

DEFAULT_TEXT = TextOptions(None)
SMALL = dataclasses.replace(named_shape("pythia-14m"), num_layers=2, vocab_size=64)


@pytest.fixture(scope="module")
def demo() -> Engine:
    return load("demo", device="cpu")


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "CPU_TEXT_TOKENS", 24)


def run(engine: Engine, text: TextOptions = DEFAULT_TEXT, **more: Any) -> FullReport:
    asked = decode_options(2048, on_gpu=False, contexts="4,7", new_tokens=3, peers=False)
    return measure_full(engine, asked, text, lambda line: None, "the command", **more)


def test_a_run_is_that_of_decode_and_a_text(demo: Engine) -> None:
    parts: list[FullReport] = []
    shares: list[float] = []
    report = run(demo, on_part=parts.append, on_share=shares.append)
    assert [(len(part.decode.contexts), part.perplexity is not None) for part in parts] == [
        (1, False),
        (2, False),
        (2, True),
    ]
    assert parts[0].no_perplexity == "not measured yet"
    assert shares == sorted(shares) and shares[-1] == 1.0 and 2 / 3 in shares
    said = json.loads(json.dumps(to_json(report), allow_nan=False))
    assert (said["benchmark"], said["no_perplexity"], said["interrupted"]) == ("full", None, False)
    assert {"device", "versions", "source_digest", "date", "scope", "missing"} <= said.keys()
    assert len(said["contexts"]) == 2
    scored = said["perplexity"]
    assert (scored["mode"], scored["scored_tokens"]) == ("reference", 23)
    decode, theirs = (scored["losses"][path]["perplexity"] for path in ("decode", "transformers"))
    assert decode == pytest.approx(theirs, rel=1e-5) and 1 < decode < 30
    assert len(report_tables(report)) == 2
    assert any(line.startswith("perplexity: ours, decoding token by token") for line in lines(report))
    assert "- perplexity: ours" in markdown(report) and "`the command`" in markdown(report)


def test_it_passes_where_tokens_are_the_same_and_our_cost_is_finite(demo: Engine) -> None:
    report = run(demo)
    assert report.passed and report.perplexity is not None
    bad = dataclasses.replace(report.perplexity.losses["prefill"], perplexity=math.nan)
    for path, passed in (("decode", False), ("prefill", False), ("transformers", True)):
        scored = dataclasses.replace(report.perplexity, losses={**report.perplexity.losses, path: bad})
        assert dataclasses.replace(report, perplexity=scored).passed == passed
    context = dataclasses.replace(report.decode.contexts[0], differences=("graph and split differ",))
    differing = dataclasses.replace(report.decode, contexts=(context,))
    assert not dataclasses.replace(report, decode=differing).passed
    assert not dataclasses.replace(report, decode=differing, perplexity=None).passed


def test_without_a_text_the_report_says_why(demo: Engine) -> None:
    shares: list[float] = []
    report = run(demo, text_options("pythia-14m"), on_share=shares.append)
    assert shares[-1] == 1.0
    assert report.perplexity is None
    assert lines(report)[-1] == "perplexity left out: random weights know no text"
    assert to_json(report)["perplexity"] is None
    assert len(report_tables(report)) == 1


def test_a_text_that_fails_after_all_ends_nothing(demo: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise ClusterFusionError("the text is gone")

    monkeypatch.setattr(measure, "perplexity", fail)
    report = run(demo)
    assert len(report.decode.contexts) == 2
    assert report.no_perplexity == "ClusterFusionError: the text is gone"


@pytest.mark.parametrize("at", ["context", "text"])
def test_an_interrupt_keeps_what_is_done(demo: Engine, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    whole = decode_measure._Run._context

    def interrupt(*arguments: Any, **options: Any) -> Any:
        if at == "context" and arguments[1] != 7:
            return whole(*arguments)
        raise KeyboardInterrupt

    if at == "context":
        monkeypatch.setattr(decode_measure._Run, "_context", interrupt)
    else:
        monkeypatch.setattr(measure, "perplexity", interrupt)
    report = run(demo)
    assert len(report.decode.contexts) == (1 if at == "context" else 2)
    assert report.interrupted and to_json(report)["interrupted"]
    assert report.no_perplexity == "interrupted"


def test_texts_are_checked_before_a_model_is_loaded(tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_text("some text")
    assert text_options(None, file) == TextOptions(file)
    assert text_options(None) == TextOptions(None)
    assert text_options("pythia-14m").left_out == "random weights know no text"
    assert text_options(None, wanted=False).left_out == "not asked for"
    with pytest.raises(ArgumentError, match="random weights know no text; leave it out"):
        text_options("pythia-14m", file)
    with pytest.raises(ArgumentError, match="no perplexity is wanted"):
        text_options(None, file, wanted=False)
    with pytest.raises(ArgumentError, match="cannot be read"):
        text_options(None, tmp_path / "none")


def test_a_model_may_lack_what_a_text_needs(demo: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = load(random_weights=SMALL, device="cpu")
    assert text_options_for(demo, TextOptions(None)) == TextOptions(None)
    assert text_options_for(small, TextOptions(None)).left_out == "random weights has no tokenizer"
    with pytest.raises(ArgumentError, match="--text needs a tokenizer"):
        text_options_for(small, TextOptions(tmp_path))
    monkeypatch.setattr(options, "has_datasets", lambda: False)
    monkeypatch.setattr(demo, "name", "owner/name")
    assert "--text FILE" in (text_options_for(demo, TextOptions(None)).left_out or "")


def test_a_mode_that_is_named_and_cannot_run_is_an_error(demo: Engine) -> None:
    asked = decode_options(2048, on_gpu=False, new_tokens=3, modes="graph,model", peers=False)
    with pytest.raises(ArgumentError, match="modes is 'graph,model', and none of them can run here: the kernels need"):
        measure_full(demo, asked, TextOptions(None), lambda line: None)
