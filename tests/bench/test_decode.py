"""The run of `bench decode` on a CPU: options, whole runs of the reference mode, and the order and checks with stand-ins
for what needs a GPU."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from clusterfusion.bench import clocks
from clusterfusion.bench.clocks import ClockSampler
from clusterfusion.bench.decode import measure
from clusterfusion.bench.decode.loops import Decoded, EngineLoop, choose_modes
from clusterfusion.bench.decode.measure import READS_A_ROUND, measure_decode, same_tokens
from clusterfusion.bench.decode.options import DEFAULT_CONTEXTS, check_source, decode_options
from clusterfusion.bench.decode.report import DecodeReport, to_json
from clusterfusion.bench.samples import Candidate
from clusterfusion.engine import Engine, load
from clusterfusion.engine.modes import ModeChoice
from clusterfusion.errors import ArgumentError, DeviceError
from clusterfusion.jit.read_ceiling import VARIANTS
from clusterfusion.named_shapes import named_shape

CONFIG = dataclasses.replace(named_shape("pythia-14m"), num_layers=2, vocab_size=64, eos_token_ids=tuple(range(64)))
TOKENS = (3, 1, 4, 1, 5, 9)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return load(random_weights=CONFIG, device="cpu", dtype="float32")


# --- options


def test_what_is_left_out_fits_the_model_and_the_machine() -> None:
    gpu = decode_options(2048, on_gpu=True)
    assert (gpu.contexts, gpu.new_tokens, gpu.runs) == (DEFAULT_CONTEXTS, 128, 5)
    assert gpu.modes == ("model", "graph", "fused", "split")
    assert gpu.peer_contexts == gpu.contexts
    assert gpu.room == 2048
    assert decode_options(600, on_gpu=True).contexts == (16, 128, 472), (
        "what is too long becomes the longest there is room for"
    )
    short = decode_options(10, on_gpu=True)
    assert (short.contexts, short.new_tokens) == ((5,), 5)
    cpu = decode_options(2048, on_gpu=False, peers=False)
    assert (cpu.contexts, cpu.new_tokens, cpu.peer_contexts) == ((16,), 8, ())
    assert decode_options(2048, on_gpu=True, contexts="1920, 1", peer_contexts="1").peer_contexts == (1,)
    assert decode_options(None, on_gpu=True, contexts="100000").contexts == (100000,)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"contexts": "16,1921"},
            "contexts is 1921, which makes 2049 tokens with the 128 new ones; the model has 2048",
        ),
        ({"contexts": "0"}, "contexts is 0; it must be an int from 1"),
        ({"contexts": "many"}, "contexts is 'many'; it must be numbers of tokens"),
        ({"contexts": "7,7"}, "none twice"),
        ({"new_tokens": 1}, "new_tokens is 1; it must be an int from 2 to 2047"),
        ({"new_tokens": 2048}, "new_tokens is 2048; it must be an int from 2 to 2047"),
        ({"runs": 4}, "runs is 4; it must be an int from 5"),
        ({"modes": "model,fast"}, "modes is 'model,fast'; it must be names from 'reference', 'split'"),
        ({"modes": ""}, "modes is ''; it must be names from"),
        (
            {"peer_contexts": "17"},
            "peer_contexts is '17', where 17 is not a context that is measured; it must be some of 16",
        ),
        ({"peer_contexts": "x"}, "peer_contexts is 'x'; it must be numbers of tokens"),
        ({"peer_contexts": "16", "peers": False}, "peer_contexts is '16', but transformers is left out"),
    ],
)
def test_bad_options_are_named_with_value_and_need(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        decode_options(2048, on_gpu=True, **options)
    assert expected in str(caught.value)


def test_sources() -> None:
    assert check_source("demo", None, on_gpu=False) is None
    assert check_source(None, "pythia-14m", on_gpu=False) == 2048
    assert check_source(None, "pythia-6.9b", on_gpu=True) == 2048
    with pytest.raises(ArgumentError, match="MODEL or --random-weights SHAPE; neither was given"):
        check_source(None, None, on_gpu=True)
    with pytest.raises(ArgumentError, match="both were given"):
        check_source("demo", "pythia-14m", on_gpu=True)
    with pytest.raises(
        DeviceError, match=r"bench decode of pythia-2\.8b needs an NVIDIA GPU.*demo, or a shape of at most 200"
    ):
        check_source(None, "pythia-2.8b", on_gpu=False)


# --- our loops


def test_modes_that_cannot_run_are_left_out_with_the_reason(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, left_out = choose_modes(("model", "graph"), engine)
    assert [mode.name for mode in chosen] == ["reference"]
    assert set(left_out) == {"model", "graph"} and "an NVIDIA GPU" in left_out["graph"]
    monkeypatch.setattr("clusterfusion.bench.decode.loops.why_not", lambda name, *_: "no" if name == "model" else None)
    chosen, left_out = choose_modes(("model", "graph", "split"), engine)
    assert ([mode.name for mode in chosen], left_out) == (["graph", "split"], {"model": "no"})


def test_every_run_makes_all_its_tokens_on_shared_weights_in_one_session(engine: Engine) -> None:
    """Every token of this model would end a sequence."""
    loop = EngineLoop(engine, ModeChoice("reference", ""), 12, [1, 2, 3], 6)
    first, second = loop.decode(), loop.decode()
    assert len(first.token_ids) == 6
    assert first.token_ids == second.token_ids
    assert first.ms_per_token > 0 and first.first_token_ms > 0
    own = loop._engine
    assert own.weights is engine.weights
    assert len(own._idle) == 1 and own._idle[0].max_seq_len == 12
    assert engine._idle == []


# --- whole runs


def test_a_run_on_a_cpu_says_what_is_missing(engine: Engine) -> None:
    options = decode_options(2048, on_gpu=False, contexts="3,9", new_tokens=4, peer_contexts="9")
    so_far: list[int] = []
    lines: list[str] = []
    report = measure_decode(engine, options, lines.append, "the command", lambda r: so_far.append(len(r.contexts)))
    assert so_far == [1, 2], "a report after every context"
    said = json.loads(json.dumps(to_json(report), allow_nan=False))
    assert said["command"] == "the command"
    assert {"device", "versions", "source_digest", "date", "scope"} <= said.keys()
    assert said["read_ceiling"] is None
    assert set(said["left_out"]) == {"model", "graph", "fused", "split"}
    assert any("read ceiling" in what for what in said["missing"])
    assert any("transformers compile and transformers CUDA graph" in what for what in said["missing"])
    short, long = said["contexts"]
    assert short["peers"] == {} and set(long["peers"]) == {"transformers eager"}
    for context in (short, long):
        reference = context["modes"]["reference"]
        assert len(reference["runs"]) == reference["samples"] == 5
        assert reference["same_tokens"] == 4
        assert reference["ratio_to_floor"] is None and reference["peak_bytes"] is None
        assert context["floor_ms"] is None and context["differences"] == []
    eager = long["peers"]["transformers eager"]
    assert (eager["samples"], eager["same_tokens"], eager["error"]) == (3, 4, None)
    assert long["modes"]["reference"]["speedup_over"].keys() == {"transformers eager"}
    assert said["slopes"]["reference"]["ms_a_cached_token"] is not None


class StandInCeiling:
    num_bytes = 4_000_000
    lead: Callable[[], None] = staticmethod(lambda: None)

    def candidates(self, samples: int) -> list[Candidate]:
        return [Candidate(variant, lambda: None, lambda: None, samples) for variant in VARIANTS]


class StandInLoop:
    """Decodes TOKENS in a time that says which mode it is; `broken` modes turn the third token in their later runs."""

    visits: list[str]
    other_tokens: dict[str, Sequence[int]]
    unsteady: tuple[str, ...]

    def __init__(self, engine: Any, mode: ModeChoice, room: int, ids: Sequence[int], new_tokens: int) -> None:
        self.name, self.runs = mode.name, 0

    def decode(self) -> Decoded:
        self.visits.append(self.name)
        self.runs += 1
        tokens = list(self.other_tokens.get(self.name, TOKENS))
        if self.name in self.unsteady and self.runs == 4:
            tokens[2] = 7
        return Decoded(tuple(tokens), 5.0, {"graph": 2.0, "fused": 3.0, "split": 4.0}.get(self.name, 9.0))


class StandInPeers:
    """One peer that works, one that cannot be made, one that fails in its second timed run."""

    def __init__(self, weights: Any) -> None:
        pass

    def make(self, name: str, ids: Sequence[int], new_tokens: int) -> Any:
        if name == "transformers compile":
            raise RuntimeError("no compiler\nhere")
        loop = StandInLoop(None, ModeChoice(name, ""), 0, ids, new_tokens)
        if name == "transformers CUDA graph":
            plain = loop.decode

            def decode() -> Decoded:
                if loop.runs == 2:
                    raise RuntimeError("cross")
                return plain()

            loop.decode = decode  # type: ignore[method-assign]
        return loop


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    visits: list[str] = []
    StandInLoop.visits, StandInLoop.other_tokens, StandInLoop.unsteady = visits, {}, ()
    times = {"bulk copies": 1.0, "loads": 1.25}

    def timer(lead: Any) -> Callable[[Candidate, int], list[float]]:
        def sample(of: Candidate, count: int) -> list[float]:
            visits.append(of.name)
            return [times[of.name]] * count

        return sample

    monkeypatch.setattr(measure._Run, "_make_ceiling", lambda self: StandInCeiling())
    monkeypatch.setattr(measure, "DeviceTimer", timer)
    monkeypatch.setattr(measure, "EngineLoop", StandInLoop)
    monkeypatch.setattr(measure, "PeerLoops", StandInPeers)
    monkeypatch.setattr(
        measure, "choose_modes", lambda names, engine: (tuple(ModeChoice(name, "") for name in names), {})
    )
    return visits


def run(engine: Engine, **options: Any) -> DecodeReport:
    asked: dict[str, Any] = {"contexts": "8", "new_tokens": 6, "modes": "graph,fused,split", "peers": False}
    return measure_decode(engine, decode_options(2048, on_gpu=True, **(asked | options)), lambda line: None)


def test_every_round_visits_every_loop_and_both_ceilings(engine: Engine, stand_ins: list[str]) -> None:
    report = run(engine, runs=6)
    rounds = stand_ins[3:]  # one warm-up each before
    assert stand_ins[:3] == ["graph", "fused", "split"]
    assert rounds == ["bulk copies", "loads", "graph", "fused", "split"] * 6
    [times] = report.contexts
    assert {name: loop.ms_per_token for name, loop in times.modes.items()} == {
        "graph": (2.0,) * 6,
        "fused": (3.0,) * 6,
        "split": (4.0,) * 6,
    }
    assert {name: len(taken) for name, taken in times.read_ms.items()} == dict.fromkeys(VARIANTS, 6 * READS_A_ROUND)
    assert report.read is not None and report.read.ceiling == pytest.approx(4e9)
    assert report.differences == []


def test_clocks_are_of_a_loops_own_runs(engine: Engine, stand_ins: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def sampler(device: torch.device) -> ClockSampler:
        assert device == engine.device
        return ClockSampler(torch.device("cuda", 0), lambda: (1980.0, 700.0))

    def decode(self: StandInLoop, plain: Callable[[StandInLoop], Decoded] = StandInLoop.decode) -> Decoded:
        if self.name == "graph" and self.runs == 3:
            time.sleep(0.5)  # the only run that lasts until somebody looks, but by chance
        return plain(self)

    monkeypatch.setattr(clocks, "PERIOD_S", 0.01)
    monkeypatch.setattr(measure, "ClockSampler", sampler)
    monkeypatch.setattr(StandInLoop, "decode", decode)
    [times] = run(engine, modes="graph,split").contexts
    seen = times.modes["graph"].clocks
    assert seen is not None and (seen.sm_mhz, seen.watts) == (1980.0, 700.0)
    others = times.modes["split"].clocks
    assert others is None or others.samples < seen.samples


def test_failing_peers_are_in_the_report(engine: Engine, stand_ins: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("transformers eager", "transformers compile", "transformers CUDA graph")
    make = measure._Run.__init__

    def with_all_peers(self: Any, *arguments: Any) -> None:
        make(self, *arguments)
        self.peer_names = names

    monkeypatch.setattr(measure._Run, "__init__", with_all_peers)
    StandInLoop.other_tokens = {"transformers eager": (3, 1, 4, 2, 5, 9)}
    [times] = run(engine, peers=True).contexts
    assert stand_ins.index("transformers CUDA graph") < stand_ins.index("graph"), "peers are prepared first"
    eager, compiled, captured = (times.peers[name] for name in names)
    assert (len(eager.ms_per_token), eager.same_tokens, eager.error) == (3, 3, None)
    assert (compiled.ms_per_token, compiled.error) == ((), "RuntimeError: no compiler")
    assert (captured.ms_per_token, captured.error) == ((), "RuntimeError: cross")
    assert len(times.modes["split"].ms_per_token) == 5
    assert times.differences == ()


def test_modes_whose_tokens_differ_are_a_failure(engine: Engine, stand_ins: list[str]) -> None:
    StandInLoop.other_tokens = {"split": (3, 1, 4, 2, 5, 9), "reference": (0,) * 6}
    report = run(engine, modes="graph,fused,split,reference")
    assert report.differences == ["context 8: split and graph differ from new token 3 on"]
    assert [loop.same_tokens for loop in report.contexts[0].modes.values()] == [6, 6, 3, 0]


def test_runs_whose_tokens_differ_are_a_failure(engine: Engine, stand_ins: list[str]) -> None:
    StandInLoop.unsteady = ("fused",)
    assert run(engine).differences == ["context 8: two runs of fused differ from new token 2 on"]


def test_an_interrupt_keeps_whole_contexts(
    engine: Engine, stand_ins: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measure._Run._context

    def interrupted_at_9(self: Any, context: int) -> Any:
        if context == 9:
            raise KeyboardInterrupt
        return whole(self, context)

    monkeypatch.setattr(measure._Run, "_context", interrupted_at_9)
    report = run(engine, contexts="8,9,10")
    assert [times.context for times in report.contexts] == [8]
    assert report.interrupted and to_json(report)["interrupted"]
    with pytest.raises(KeyboardInterrupt):
        run(engine, contexts="9,10")


def test_tokens_before_the_first_difference() -> None:
    assert same_tokens((1, 2, 3), (1, 2, 3)) == 3
    assert same_tokens((1, 2, 3), (1, 5, 3)) == 1
    assert same_tokens((1, 2, 3), (1, 2)) == 2
    assert same_tokens((), (1,)) == 0


def test_gpu_memory_is_asked_for_before_it_is_taken(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def require(what: str, needed: int, device: torch.device) -> None:
        asked.append(needed)
        raise DeviceError("full")

    monkeypatch.setattr(measure, "require_memory", require)
    with pytest.raises(DeviceError, match="full"):
        measure_decode(engine, decode_options(2048, on_gpu=False, new_tokens=4, peers=False), lambda line: None)
    assert asked == [(16 + 4) * CONFIG.kv_elements_per_token * 4]
