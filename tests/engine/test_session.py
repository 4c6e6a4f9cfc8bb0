"""Sessions: prefill, step, fork, rewind, reset, and that a refused call changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import random_token_ids, relative_error, tiny_gpt_neox, tiny_llama

import clusterfusion
from clusterfusion.engine import Engine, Session
from clusterfusion.engine.sampling import Sampler, SamplingOptions
from clusterfusion.errors import ArgumentError, ContextLengthError, DeviceError

IDS = [5, 17, 3, 88, 20, 41]


@pytest.fixture(params=["gpt_neox", "llama"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return clusterfusion.load(tiny_gpt_neox() if request.param == "gpt_neox" else tiny_llama(), max_seq_len=24)


def test_prefill_and_step_return_the_models_logits(engine: Engine) -> None:
    model = tiny_gpt_neox() if engine.config.family == "gpt_neox" else tiny_llama()
    with torch.no_grad():
        wanted = model(torch.tensor([IDS])).logits[0]
    session = engine.session()
    got = session.prefill(IDS[:4])
    assert got.shape == (97,)
    assert got.dtype == torch.float32
    assert relative_error(got, wanted[3]) < 1e-5
    assert relative_error(session.step(IDS[4]), wanted[4]) < 1e-5
    assert session.position == 5
    assert relative_error(session.prefill(IDS[5:]), wanted[5]) < 1e-5


@pytest.mark.parametrize("form", [list, tuple, torch.tensor, lambda ids: torch.tensor(ids, dtype=torch.int32)])
def test_prefill_takes_lists_and_tensors(engine: Engine, form: Any) -> None:
    assert torch.equal(engine.session().prefill(form(IDS)), engine.session().prefill(IDS))


def test_fork_goes_its_own_way(engine: Engine) -> None:
    session = engine.session()
    session.prefill(IDS)
    twin = session.fork()
    assert twin.position == session.position
    assert torch.equal(twin.step(9), session.step(9))
    session.prefill([1, 2, 3])
    alone = engine.session()
    alone.prefill(IDS)
    alone.step(9)
    assert torch.equal(twin.step(4), alone.step(4)), "the first session's tokens show in its fork"


def test_rewind_and_reset(engine: Engine) -> None:
    session = engine.session()
    session.prefill(IDS)
    wanted = session.step(9)
    session.prefill([1, 2, 3, 4])
    session.rewind(len(IDS))
    assert session.position == len(IDS)
    assert torch.equal(session.step(9), wanted)
    first = engine.session().prefill(IDS)
    session.reset()
    assert session.position == 0
    assert torch.equal(session.prefill(IDS), first)
    for bad in (-1, len(IDS) + 1, 2.0, True, "3"):
        with pytest.raises(ArgumentError, match="position is"):
            session.rewind(bad)  # type: ignore[arg-type]
    assert session.position == len(IDS)


def unchanged_by(session: Session, error: type[Exception], match: str, call: Any) -> None:
    position = session.position
    k, v = session.cache.k.clone(), session.cache.v.clone()
    with pytest.raises(error, match=match):
        call()
    assert session.position == position
    assert torch.equal(session.cache.k, k)
    assert torch.equal(session.cache.v, v)


def test_past_the_end_of_the_context(engine: Engine) -> None:
    session = engine.session()
    session.prefill(random_token_ids(97, 20))
    unchanged_by(
        session, ContextLengthError, "5 tokens after 20 make 25; .* room for 24", lambda: session.prefill([1] * 5)
    )
    for token in range(4):
        session.step(token)
    unchanged_by(session, ContextLengthError, "1 tokens after 24", lambda: session.step(1))
    session.rewind(23)
    again = session.step(3)
    session.rewind(23)
    assert torch.equal(session.step(3), again)


@pytest.mark.parametrize(
    ("ids", "match"),
    [
        ([], "ids is empty"),
        ([1, 97], r"ids\[1\] is 97; it must be an int from 0 to 96"),
        ([-1], r"ids\[0\] is -1"),
        ([1, 2.0], r"ids\[1\] is 2.0"),
        ([True], r"ids\[0\] is True"),
        ("text", "ids is str"),
        ({1, 2}, "ids is set"),
        (None, "ids is NoneType"),
        (torch.tensor([[1, 2]]), "2-D tensor"),
        (torch.tensor([1.0]), "float32"),
        (torch.tensor([True]), "bool"),
        (torch.tensor([96, 97]), "ids holds 97"),
        (torch.tensor([], dtype=torch.int64), "ids is empty"),
        (torch.tensor(3), "0-D"),
    ],
)
def test_bad_ids_change_nothing(engine: Engine, ids: Any, match: str) -> None:
    session = engine.session()
    session.prefill(IDS)
    unchanged_by(session, ArgumentError, match, lambda: session.prefill(ids))


@pytest.mark.parametrize("token", [97, -1, 1.0, "a", None, True, [1]])
def test_bad_tokens_change_nothing(engine: Engine, token: Any) -> None:
    session = engine.session()
    session.prefill(IDS)
    unchanged_by(session, ArgumentError, "token is|ids", lambda: session.step(token))


def test_step_takes_what_argmax_gives(engine: Engine) -> None:
    session, other = engine.session(), engine.session()
    token = session.prefill(IDS).argmax()
    other.prefill(IDS)
    assert torch.equal(session.step(token), other.step(int(token)))  # type: ignore[arg-type]


def test_a_cache_that_does_not_fit_is_refused(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clusterfusion.engine.memory.free_bytes", lambda device: 1000)
    with pytest.raises(DeviceError, match="K/V cache of 24 tokens needs"):
        engine.session()


class RunsAhead:
    """In place of a StepDecoder: the token at position p is p, chosen one by one."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int, int, float, int]] = []
        self.closed = 0

    def stream(self, token: int, position: int, steps: int, temperature: float, seed: int) -> Any:
        self.asked.append((token, position, steps, temperature, seed))
        try:
            for step in range(steps):
                yield position + step + 1
        finally:
            self.closed += 1


@pytest.fixture
def ahead(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> tuple[Session, RunsAhead]:
    session = engine.session()
    session.prefill(IDS[:3])
    decoder = RunsAhead()
    monkeypatch.setattr(session, "_mode", "model")
    monkeypatch.setattr(session, "_own_decoder", lambda: decoder)
    return session, decoder


def test_decoding_ahead_moves_the_position_with_the_tokens(ahead: tuple[Session, RunsAhead]) -> None:
    session, decoder = ahead
    following = session.decode(7, 5, Sampler(SamplingOptions(temperature=0.5, seed=9), []))
    assert [next(following) for _ in range(2)] == [4, 5]
    assert session.position == 5
    following.close()
    assert decoder.closed == 1 and decoder.asked == [(7, 3, 5, 0.5, 9)]
    assert list(session.decode(5, 2, Sampler(SamplingOptions(), []))) == [6, 7]


def test_decoding_ahead_ends_where_the_room_ends(ahead: tuple[Session, RunsAhead]) -> None:
    session, decoder = ahead
    following = session.decode(7, 100, Sampler(SamplingOptions(), []))
    assert [next(following) for _ in range(21)] == list(range(4, 25))
    with pytest.raises(ContextLengthError, match="room for 24"):
        next(following)
    assert session.position == 24 and decoder.asked[0][2] == 21


def test_a_session_that_went_on_by_other_means_is_told(ahead: tuple[Session, RunsAhead]) -> None:
    session, decoder = ahead
    following = session.decode(7, 9, Sampler(SamplingOptions(), []))
    next(following)
    session.rewind(2)
    with pytest.raises(ArgumentError, match="other means"):
        next(following)
    assert decoder.closed == 1 and session.position == 2


def test_what_the_gpu_cannot_choose_is_chosen_here(ahead: tuple[Session, RunsAhead]) -> None:
    session, decoder = ahead
    for options in (SamplingOptions(1.0, top_k=3), SamplingOptions(1e-7), SamplingOptions(repetition_penalty=1.2)):
        assert not options.on_device
    session._mode = "reference"
    assert len(list(session.decode(7, 3, Sampler(SamplingOptions(), [])))) == 3
    assert not decoder.asked
