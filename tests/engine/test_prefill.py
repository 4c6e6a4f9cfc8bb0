"""The engine's prefill against the reference on a CPU: every model of the grid, in pieces, in chunks, in low precision, and as
sessions use it. Its kernels are held to the same in tests/gpu/test_prefill.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from test_reference import FEW, GRID, build, new_cache, transformers_logits
from tiny_models import random_token_ids, relative_error, tiny_model, weights_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from clusterfusion import reference
from clusterfusion.engine import prefill as prefill_module
from clusterfusion.engine.prefill import CHUNK_TOKENS, Prefill
from clusterfusion.engine.session import Session
from clusterfusion.errors import ArgumentError, ContextLengthError
from clusterfusion.weights import DecoderWeights

TOKENS = 29
ROOM = TOKENS + 6
TOLERANCE = 1e-5  # float32 against float32, sums in another order; 2 layers measure up to 1.4e-6

few = pytest.mark.parametrize("name", FEW)
families = pytest.mark.parametrize("family", ["gpt_neox", "llama"])


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """These matrices are too small to share."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def ids_for(weights: DecoderWeights, seed: int = 1) -> Tensor:
    return random_token_ids(weights.config.vocab_size, TOKENS, seed=seed)


@pytest.mark.parametrize("name", GRID)
def test_agrees_with_the_reference_and_with_transformers(name: str) -> None:
    model, weights = build(name)
    ids = ids_for(weights)
    wanted_cache, cache = new_cache(weights, ROOM), new_cache(weights, ROOM)
    wanted = reference.forward(weights, ids, wanted_cache, 0, last_only=False)
    got = Prefill(weights, cache).run(ids, 0, last_only=False)
    assert got.dtype == torch.float32
    assert relative_error(got, wanted) < TOLERANCE
    assert relative_error(got, transformers_logits(model, ids)) < TOLERANCE
    assert relative_error(cache.k, wanted_cache.k) < TOLERANCE
    assert relative_error(cache.v, wanted_cache.v) < TOLERANCE


@few
@pytest.mark.parametrize("chunk_tokens", [1, 7, TOKENS - 1, CHUNK_TOKENS])
@pytest.mark.parametrize("pieces", [(TOKENS,), (1, 28), (13, 16), (20, 1, 5, 3)], ids=str)
def test_pieces_and_chunks_change_nothing(name: str, chunk_tokens: int, pieces: tuple[int, ...]) -> None:
    _, weights = build(name)
    ids = ids_for(weights)
    wanted_cache = new_cache(weights, ROOM)
    wanted = reference.forward(weights, ids, wanted_cache, 0, last_only=False)
    for last_only in (False, True):
        cache = new_cache(weights, ROOM)
        prefill = Prefill(weights, cache, chunk_tokens)
        rows, position = [], 0
        for piece in ids.split(list(pieces)):
            rows.append(prefill.run(piece, position, last_only=last_only))
            position += len(piece)
        if last_only:
            ends = torch.tensor(pieces).cumsum(0) - 1
            assert relative_error(torch.stack(rows), wanted[ends]) < TOLERANCE
        else:
            assert relative_error(torch.cat(rows), wanted) < TOLERANCE
        assert relative_error(cache.k, wanted_cache.k) < TOLERANCE
        assert relative_error(cache.v, wanted_cache.v) < TOLERANCE


@few
@pytest.mark.parametrize("poison", [float("nan"), 1e30])
def test_entries_from_the_position_on_are_never_read_and_only_new_ones_written(name: str, poison: float) -> None:
    _, weights = build(name)
    ids = ids_for(weights)
    clean, poisoned = new_cache(weights, ROOM), new_cache(weights, ROOM)
    poisoned.k.fill_(poison)
    poisoned.v.fill_(poison)
    for one, other in ((0, 20), (20, TOKENS)):
        runs = [Prefill(weights, cache, 16).run(ids[one:other], one) for cache in (clean, poisoned)]
        assert torch.equal(*runs)
    for tensor, plain in ((poisoned.k, clean.k), (poisoned.v, clean.v)):
        assert torch.equal(tensor[:, :, :TOKENS], plain[:, :, :TOKENS])
        untouched = tensor[:, :, TOKENS:]
        assert (untouched.isnan() if poison != poison else untouched == poison).all()


@few
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_is_at_least_as_accurate_as_transformers(name: str, dtype: torch.dtype) -> None:
    family, options = GRID[name]
    model = tiny_model(family, **options).to(dtype)
    weights = weights_of(model)
    ids = ids_for(weights, seed=10)
    cache, true_cache = new_cache(weights, ROOM), new_cache(weights, ROOM, torch.float64)
    truth = reference.forward(weights, ids, true_cache, 0, dtype=torch.float64, last_only=False)
    got = Prefill(weights, cache).run(ids, 0, last_only=False)
    assert got.dtype == torch.float32 and cache.k.dtype == dtype
    with torch.no_grad():
        out = model(ids[None], use_cache=True)
    layers = (out.cache if "cache" in out else out.past_key_values).layers
    assert 0 < error(got, truth) <= 1.1 * error(out.logits[0], truth)
    for true, ours, theirs in (
        (true_cache.k, cache.k, torch.stack([layer.keys[0] for layer in layers])),
        (true_cache.v, cache.v, torch.stack([layer.values[0] for layer in layers])),
    ):
        assert 0 < error(ours[:, :, :TOKENS], true[:, :, :TOKENS]) <= 1.1 * error(theirs, true[:, :, :TOKENS])


def error(got: Tensor, truth: Tensor) -> float:
    return (got.double() - truth).abs().mean().item()


@families
def test_float64_is_float64(family: str) -> None:
    weights = weights_of(tiny_model(family).double())
    ids = ids_for(weights)
    got = Prefill(weights, new_cache(weights, ROOM), 8).run(ids, 0)
    assert got.dtype == torch.float64
    assert relative_error(got, reference.forward(weights, ids, new_cache(weights, ROOM), 0)) < 1e-13


@families
def test_gradients_are_recorded_for_nobody_and_inference_mode_leaves_no_mark(family: str) -> None:
    weights = weights_of(tiny_model(family))
    prefill = Prefill(weights, new_cache(weights, ROOM))
    with torch.inference_mode():
        got = prefill.run(ids_for(weights), 0)
    assert not got.requires_grad and not got.is_inference()


class Launches(TorchDispatchMode):
    """Notes every operation that reaches a device, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if not func.is_view and "unsafe_view" not in str(func):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("family", "options", "launches"),
    [("gpt_neox", {}, 8), ("gpt_neox", {"use_parallel_residual": False}, 9), ("llama", {}, 13)],
)
def test_launches_a_layer(
    family: str, options: dict[str, bool], launches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many a layer more takes, with our own two operations counted as the launches that they are on a GPU."""
    seen = []
    # Attention that is one operation, as on a GPU; what it computes does not matter here.
    monkeypatch.setattr(
        prefill_module, "_attend", lambda q, k, v, mask: q.transpose(1, 2).reshape(q.shape[2], -1).mul(1)
    )
    monkeypatch.setattr(Prefill, "_mask", lambda *_: None)
    for layers in (2, 3):
        weights = weights_of(tiny_model(family, num_hidden_layers=layers, **options))
        prefill = Prefill(weights, new_cache(weights, ROOM))
        own: list[str] = []
        monkeypatch.setattr(prefill, "_norms", lambda *a, own=own, **k: own.append("norms"))
        monkeypatch.setattr(prefill._rotary, "bind", lambda *a, own=own: lambda layer: own.append("rotary"))
        with Launches() as counted:
            prefill.run(ids_for(weights), 0, last_only=False)
        names = [name for name in counted.names if "clone" not in name]  # of the stand-in for attention
        seen.append(len(names) + len(own))
    assert seen[1] - seen[0] == launches


# --- in sessions


@pytest.fixture(params=["gpt_neox", "llama"])
def session(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Session:
    """A session in a mode of kernels, whose prompts do not need a GPU; steps do, and are the reference's here."""
    weights = weights_of(tiny_model(request.param))
    made = Session(weights, 24, "split")

    class Steps:
        def __init__(self, of: Session) -> None:
            self.of = of

        def step(self, token: int, position: int) -> Tensor:
            return reference.forward(weights, torch.tensor([token]), self.of.cache, position)

        def check_error(self) -> None:
            pass

    monkeypatch.setattr(Session, "_own_decoder", lambda of: Steps(of))
    return made


def plain(session: Session, ids: list[int]) -> Tensor:
    """Logits [T, vocab] by the reference alone."""
    weights = session._weights
    return reference.forward(weights, torch.tensor(ids), new_cache(weights, len(ids)), 0, last_only=False)


IDS = [5, 17, 3, 88, 20, 41, 7]


def test_a_session_takes_prompts_after_steps_and_steps_after_prompts(session: Session) -> None:
    wanted = plain(session, IDS)
    assert relative_error(session.prefill(IDS[:3]), wanted[2]) < TOLERANCE
    assert relative_error(session.step(IDS[3]), wanted[3]) < TOLERANCE
    assert relative_error(session.prefill(IDS[4:6]), wanted[5]) < TOLERANCE
    assert relative_error(session.prefill(IDS[6:]), wanted[6]) < TOLERANCE, "a prompt of one token is a step"
    assert session.position == 7


def test_rewind_and_fork(session: Session) -> None:
    wanted = plain(session, IDS)
    session.prefill([*IDS[:4], 1, 2, 3])
    session.rewind(4)
    twin = session.fork()
    session.prefill([9, 9, 9])
    assert relative_error(twin.prefill(IDS[4:]), wanted[6]) < TOLERANCE
    session.rewind(4)
    assert relative_error(session.prefill(IDS[4:]), wanted[6]) < TOLERANCE
    session.reset()
    assert relative_error(session.prefill(IDS), wanted[6]) < TOLERANCE


def test_logits_after_every_token(session: Session) -> None:
    wanted = plain(session, IDS)
    assert relative_error(session.prefill_all(IDS[:4]), wanted[:4]) < TOLERANCE
    assert relative_error(session.prefill_all(IDS[4:5]), wanted[4:5]) < TOLERANCE
    assert relative_error(session.prefill_all(IDS[5:]), wanted[5:]) < TOLERANCE
    assert session.position == 7


def test_what_does_not_fit_changes_nothing(session: Session) -> None:
    session.prefill(IDS)
    before = session.cache.k.clone()
    with pytest.raises(ContextLengthError):
        session.prefill([1] * 18)
    with pytest.raises(ArgumentError):
        session.prefill_all([1, 97])
    assert session.position == 7 and torch.equal(session.cache.k, before)
