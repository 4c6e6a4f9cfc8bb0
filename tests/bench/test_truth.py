"""The float64 truth is the reference's, and a hidden state is handed out only where it gives the session's bits."""

from __future__ import annotations

import pytest
import torch
from tiny_models import random_token_ids, tiny_model

import clusterfusion
from clusterfusion import reference
from clusterfusion.bench.truth import HiddenProbe, Truth, hidden_states, logits_of, true_logits
from clusterfusion.engine import Engine


@pytest.fixture(params=["gpt_neox", "llama"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return clusterfusion.load(tiny_model(request.param))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hidden_states_are_the_references(engine: Engine, dtype: torch.dtype) -> None:
    weights, ids = engine.weights, random_token_ids(97, 11)
    caches = [reference.KVCache.allocate(engine.config, 11, dtype, "cpu") for _ in range(2)]
    expected = reference.forward(weights, ids, caches[0], 0, dtype=dtype, last_only=False)
    got = logits_of(weights, hidden_states(weights, ids, caches[1], 0, dtype), dtype)
    assert torch.equal(got, expected)
    assert torch.equal(caches[0].k, caches[1].k)


def test_truth_in_pieces_is_the_truth_in_one(engine: Engine) -> None:
    ids = random_token_ids(97, 11).tolist()
    truth = Truth(engine.weights, 11)
    hidden, logits = (torch.cat(pieces) for pieces in zip(truth.push(ids[:4]), truth.push(ids[4:]), strict=True))
    assert hidden.dtype == logits.dtype == torch.float64
    assert hidden.shape == (11, 32)
    for end in (1, 4, 11):
        torch.testing.assert_close(logits[end - 1], true_logits(engine.weights, ids[:end]), rtol=1e-12, atol=1e-12)


def test_the_probe_follows_a_session(engine: Engine) -> None:
    ids = random_token_ids(97, 9).tolist()
    truth = Truth(engine.weights, 9).push(ids)[0]
    session, probe = engine.session(), HiddenProbe(engine, 9)
    for position, token in enumerate(ids):
        hidden = probe.step(token, session.step(token))
        assert hidden is not None
        torch.testing.assert_close(hidden.double(), truth[position], rtol=1e-4, atol=1e-5)
    assert probe.reason is None


def test_other_bits_end_the_probe(engine: Engine) -> None:
    session, probe = engine.session(), HiddenProbe(engine, 9)
    assert probe.step(3, session.step(3)) is not None
    logits = session.step(4)
    logits[5] = torch.nextafter(logits[5], torch.tensor(torch.inf))
    assert probe.step(4, logits) is None
    assert probe.reason == "the layers run by themselves do not give the bits of mode reference (token 1)"
    assert probe.step(5, session.step(5)) is None
