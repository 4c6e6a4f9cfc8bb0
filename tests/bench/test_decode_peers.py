"""transformers' loops on a CPU: each decodes the reference's tokens; what needs a GPU runs with stand-ins."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from clusterfusion.architecture import DecoderConfig
from clusterfusion.bench.decode import peers
from clusterfusion.bench.decode.loops import EngineLoop
from clusterfusion.bench.decode.peers import CAPTURED, COMPILED, EAGER, PeerLoops
from clusterfusion.bench.texts import random_tokens
from clusterfusion.engine import load
from clusterfusion.engine.modes import ModeChoice
from clusterfusion.errors import ClusterFusionError
from clusterfusion.named_shapes import named_shape

NEW_TOKENS = 20
GPT_NEOX = dataclasses.replace(named_shape("pythia-14m"), num_layers=2, vocab_size=64)
LLAMA = dataclasses.replace(
    named_shape("llama-3.2-1b"),
    num_layers=2,
    vocab_size=64,
    hidden_size=64,
    intermediate_size=96,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    tied_embeddings=False,
    rotary=dataclasses.replace(named_shape("llama-3.2-1b").rotary, nominal_dim=16),
)


class StandInGraph:
    def __init__(self, run: Callable[[], object]) -> None:
        self.replay = run


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile without a backend, but with its tracer; captures that replay by running."""
    compile_ = torch.compile

    def traced(function: Any, *, mode: str, fullgraph: bool, dynamic: bool) -> Any:
        assert (mode, fullgraph, dynamic) == ("reduce-overhead", True, False)
        return compile_(function, backend="eager", fullgraph=True, dynamic=False)

    def capture(run: Callable[[], object], prepare: Callable[[], None], device: torch.device) -> tuple[Any, object]:
        for _ in range(3):
            prepare()
            run()
        return StandInGraph(run), None

    monkeypatch.setattr(torch, "compile", traced)
    monkeypatch.setattr(peers, "capture", capture)


@pytest.mark.parametrize("config", [GPT_NEOX, LLAMA], ids=["gpt_neox", "llama"])
@pytest.mark.parametrize("name", [EAGER, COMPILED, CAPTURED])
@pytest.mark.usefixtures("without_gpu")
def test_loops_decode_the_references_tokens_every_time(name: str, config: DecoderConfig) -> None:
    engine = load(random_weights=config, device="cpu", dtype="float32")
    for layer in engine.weights.layers:  # as they come, layers add little to the embedding, and all tokens are alike
        for matrix in (
            layer.q_weight,
            layer.k_weight,
            layer.v_weight,
            layer.o_weight,
            layer.up_weight,
            layer.down_weight,
        ):
            matrix.mul_(8)
    ids = random_tokens(64, 13, seed=1)
    expected = EngineLoop(engine, ModeChoice("reference", ""), 40, ids, NEW_TOKENS).decode().token_ids
    assert len(set(expected)) > 2, "a model that says one thing would hide a wrong cache"
    loop = PeerLoops(engine.weights).make(name, ids, NEW_TOKENS)
    for _ in range(2):
        made = loop.decode()
        assert made.token_ids == expected
        assert made.first_token_ms > 0 and made.ms_per_token > 0
    if name != EAGER:
        assert loop.cache.layers[0].keys.shape[2] == 48, "13 + 20, and no more than a mask needs"  # type: ignore[attr-defined]
    torch._dynamo.reset()


def test_compiled_code_is_compiled_and_recorded_when_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few tokens there are; after that no guard is asked."""
    calls: list[Any] = []
    stances: list[Any] = [None]

    def counted(function: Any, **options: Any) -> Any:
        return lambda: calls.append(stances[-1]) or function()

    class Stance:
        def __init__(self, **options: bool) -> None:
            self.options = options

        def __enter__(self) -> None:
            stances.append(self.options)

        def __exit__(self, *exception: object) -> None:
            stances.pop()

    monkeypatch.setattr(torch, "compile", counted)
    monkeypatch.setattr(torch.compiler, "set_stance", Stance)
    engine = load(random_weights=GPT_NEOX, device="cpu", dtype="float32")
    loop = PeerLoops(engine.weights).make(COMPILED, [1, 2, 3], 2)
    assert calls == [None] * 4
    loop.decode()
    assert calls == [None] * 4 + [{"skip_guard_eval_unsafe": True}]
    assert isinstance(loop, peers.CompiledLoop)
    for written in (loop.token, loop.made, loop._slot):  # else there would be no CUDA graphs
        assert hasattr(written, "_dynamo_static_input_type")


def test_an_older_pytorch_compiles_nothing_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.compiler, "set_stance")
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled"))
    engine = load(random_weights=GPT_NEOX, device="cpu", dtype="float32")
    with pytest.raises(AttributeError, match="set_stance"):
        PeerLoops(engine.weights).make(COMPILED, [1, 2, 3], 2)


def test_a_missing_transformers_is_every_peers_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(weights: Any) -> None:
        raise ImportError("No module named 'transformers'")

    monkeypatch.setattr(peers.CausalLM, "shared", missing)
    made = PeerLoops(load(random_weights=GPT_NEOX, device="cpu").weights)
    for name in (EAGER, COMPILED, CAPTURED):
        with pytest.raises(ClusterFusionError, match="ImportError: No module named 'transformers'"):
            made.make(name, [1], 4)
