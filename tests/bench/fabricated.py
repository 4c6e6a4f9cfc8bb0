"""A decode report with made-up times, for what is drawn and written of one."""

from __future__ import annotations

from typing import Any

from clusterfusion.bench.clocks import Clocks
from clusterfusion.bench.costs import kv_bytes
from clusterfusion.bench.decode.options import decode_options
from clusterfusion.bench.decode.report import ContextTimes, DecodeReport, LoopTimes, ModelFacts, to_json
from clusterfusion.bench.environment import Origin
from clusterfusion.named_shapes import named_shape

CONFIG = named_shape("pythia-2.8b")
RANDOM_MODEL = "pythia-2.8b (random weights)"
READ_BYTES = 4_000_000_000
CEILING = 5e12
MS_A_TOKEN = kv_bytes(CONFIG, 1) / CEILING * 1e3  # that reading one cached token takes


def loop(ms: float) -> LoopTimes:
    """Whose runs were over before anybody looked at the clock, unless they are long."""
    clocks = Clocks(1590.0, 1400.0, 1980.0, 698.0, 40) if ms >= 2 else None
    return LoopTimes(
        (ms * 0.99, ms, ms * 1.02, ms, ms), (30.0, 31.0, 29.0, 30.0, 30.0), 128, 6_000_000_000, clocks=clocks
    )


def at(context: int) -> ContextTimes:
    """`model` pays for a cached token 1.5 times what reading it takes, `graph` nothing."""
    peers = {
        "transformers eager": loop(25.0),
        "transformers compile": LoopTimes((), (), error="Unsupported: [no] triton"),
    }
    if context == 1024:
        peers["transformers compile"] = loop(4.0)
    read_ms = {"bulk copies": (0.8,) * 100, "loads": (1.0,) * 100}
    modes = {"model": loop(1.4 + 1.5 * MS_A_TOKEN * context), "graph": loop(2.0)}
    return ContextTimes(context, modes, peers, read_ms, ())


def report(*contexts: int) -> DecodeReport:
    return DecodeReport(
        options=decode_options(2048, on_gpu=True, contexts="16,512,1024", modes="model,graph,fused"),
        origin=Origin(
            "2026-11-24", "clusterfusion bench decode", {"name": "NVIDIA Fabricated"}, {"torch": "2"}, "0" * 64
        ),
        model=ModelFacts(RANDOM_MODEL, CONFIG, "float16", 2, False),
        left_out={"fused": "there is no fuse"},
        missing=(),
        read_bytes=READ_BYTES,
        contexts=tuple(at(context) for context in contexts),
    )


def decoded(benchmark: str = "decode", name: str = RANDOM_MODEL, **more: Any) -> dict[str, Any]:
    """The report as `bench decode` or `bench full` writes it, of a model of that name, with other values for some fields."""
    made = to_json(report(16, 512, 1024))
    return made | {"benchmark": benchmark, "model": made["model"] | {"name": name}} | more
