"""`verify`, `quality` and `perplexity` of the demo model through mode model, beside transformers in the same dtype."""

from __future__ import annotations

import math

import pytest

from clusterfusion.bench.evaluation import Sides, load_sides
from clusterfusion.bench.perplexity import perplexity
from clusterfusion.bench.quality import quality
from clusterfusion.bench.verify import verify

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def sides() -> Sides:
    return load_sides("demo", mode="model")


def quiet(_: str) -> None:
    pass


def test_decoding_is_lossless_in_every_mode(sides: Sides) -> None:
    report = verify(sides, quiet, modes="model,graph,fused,split", prompts=6, tokens=24, runs=2)
    assert report.passed
    assert [choice.name for choice in report.modes] == ["model", "graph", "fused", "split"]
    assert len(report.prompts) == 6 and not report.bit_differences
    assert all(0 < prompt.largest_difference < 0.1 for prompt in report.prompts)  # not compared with itself


def test_the_logits_are_nearer_to_float64_than_those_of_transformers(sides: Sides) -> None:
    report = quality(sides, quiet, tokens=128)
    assert report.positions == 128 and report.hidden_note is None
    means = {}
    for name, measure in report.measures.items():
        assert measure.ours is not None and measure.transformers is not None, name
        means[name] = (measure.ours.mean, measure.transformers.mean)
    assert means["greedy_match"][0] >= 0.99 and means["top_5"][0] >= 0.99
    for name in ("logits_mae", "kl_nats", "hidden_mae"):
        assert 0 < means[name][0] <= means[name][1], name
    assert report.logits_max.ours <= 1.25 * report.logits_max.transformers
    assert means["kl_nats"][0] < 1e-6


def test_a_text_costs_what_it_costs_transformers(sides: Sides) -> None:
    report = perplexity(sides, quiet, window=256, max_tokens=600)
    losses = {path: of.nats_per_token for path, of in report.losses.items()}
    assert set(losses) == {"decode", "prefill", "transformers"}
    assert 0.9 < losses["transformers"] < 1.4  # a trained model: one that knows nothing has ln 257, about 5.5
    for path in ("decode", "prefill"):
        assert math.isclose(losses[path], losses["transformers"], rel_tol=1e-3), path
