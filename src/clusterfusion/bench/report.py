"""The results of `bench layer` as data: what was timed, and from it ratios, JSON and a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from clusterfusion.bench.costs import floor_ms, kv_bytes, layer_weight_bytes, step_bytes, weight_bytes
from clusterfusion.bench.environment import Origin
from clusterfusion.bench.options import LayerOptions
from clusterfusion.bench.read_ceiling import ReadSpeeds
from clusterfusion.bench.samples import Summary

if TYPE_CHECKING:
    from rich.table import Table

FORMAT = 1  # of the JSON; grows when a field changes its meaning or goes away
SCOPE = (
    "one decode step of the decoder layers, batch 1, random weights, no embedding and no LM head; peers run their final "
    "norm, attention mask and rotary tables as well"
)


@dataclasses.dataclass(frozen=True)
class PeerNote:
    """About a peer at one context: how far its result was from ours (relative), and the error that ended it."""

    difference: float | None
    error: str | None


@dataclasses.dataclass(frozen=True)
class ContextTimes:
    """What was timed after `context` cached tokens, by name. None for a peer that failed. `read` is the read ceiling's
    variants, timed in the same rounds."""

    context: int
    ours: Mapping[str, Summary]
    peers: Mapping[str, Summary | None]
    peer_notes: Mapping[str, PeerNote]
    read: Mapping[str, Summary]


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One run. `read` is of all contexts together."""

    options: LayerOptions
    origin: Origin
    read: ReadSpeeds
    contexts: tuple[ContextTimes, ...]
    interrupted: bool = False

    def floor_ms(self, context: int) -> float:
        """Milliseconds that no step after `context` tokens can beat."""
        return floor_ms(step_bytes(self.options.config, context), self.read.ceiling)

    def ratio(self, context: int, summary: Summary) -> float:
        """Median time over the floor."""
        return summary.median_ms / self.floor_ms(context)

    def speed(self, context: int, summary: Summary) -> float:
        """Bytes a second: those a step has to read, over the median time."""
        return step_bytes(self.options.config, context) / summary.median_ms * 1e3


def to_json(report: LayerReport) -> dict[str, Any]:
    """The report as JSON values. Times in ms unless the key says otherwise, sizes in bytes."""
    config = report.options.config
    return {
        "benchmark": "layer",
        "format": FORMAT,
        "scope": SCOPE,
        **dataclasses.asdict(report.origin),
        "model": {
            "shape": report.options.shape,
            "layers": config.num_layers,
            "dtype": report.options.dtype,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_heads": config.num_heads,
            "head_dim": config.head_dim,
            "parallel_residual": config.parallel_residual,
        },
        "asked_contexts": list(report.options.contexts),
        "interrupted": report.interrupted,
        "bytes": {"layer_weights": layer_weight_bytes(config), "weights": weight_bytes(config)},
        "read_ceiling": report.read.to_json(),
        "contexts": [_context_json(report, times) for times in report.contexts],
    }


def _context_json(report: LayerReport, times: ContextTimes) -> dict[str, Any]:
    config = report.options.config

    def entry(summary: Summary) -> dict[str, Any]:
        return dataclasses.asdict(summary) | {
            "us_a_layer": summary.median_ms * 1e3 / config.num_layers,
            "ratio_to_floor": report.ratio(times.context, summary),
            "bytes_per_s": report.speed(times.context, summary),
        }

    peers = {}
    for name, summary in times.peers.items():
        peers[name] = dataclasses.asdict(times.peer_notes[name]) | (entry(summary) if summary is not None else {})
    ours = {name: entry(summary) | {"speedup_over": _speedups(times, summary)} for name, summary in times.ours.items()}
    return {
        "context": times.context,
        "kv_bytes": kv_bytes(config, times.context),
        "bytes": step_bytes(config, times.context),
        "floor_ms": report.floor_ms(times.context),
        "read_variants": {variant: dataclasses.asdict(summary) for variant, summary in times.read.items()},
        "forms": ours,
        "peers": peers,
    }


def _speedups(times: ContextTimes, summary: Summary) -> dict[str, float]:
    return {name: peer.median_ms / summary.median_ms for name, peer in times.peers.items() if peer is not None}


def heading(report: LayerReport) -> list[str]:
    """Lines above the table: what was measured, and the read ceiling in both variants."""
    config, options = report.options.config, report.options
    return [
        f"{options.shape}, {config.num_layers} layers, {options.dtype}, batch 1, on {report.origin.device['name']}",
        str(report.read),
        f"weights of a step {weight_bytes(config) / 1e9:.3f} GB; K/V {kv_bytes(config, 1) / 1e6:.3f} MB a cached token",
    ]


def table(report: LayerReport) -> Table:
    """A row for every form and peer at every context; `x floor` is the ratio to the time the read ceiling allows."""
    from rich.table import Table

    layers = report.options.layers
    peer_names = list(report.contexts[0].peers) if report.contexts else []
    made = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1))
    made.add_column("context", justify="right", no_wrap=True)
    made.add_column("form", no_wrap=True)
    for name in ("ms", "p10", "p90", "µs/layer", "x floor", "GB/s"):
        made.add_column(name, justify="right", no_wrap=True)
    for name in peer_names:
        made.add_column("vs " + name.removeprefix("transformers "), justify="right", no_wrap=True)

    for times in report.contexts:
        floor = report.floor_ms(times.context)
        ceiling = f"{report.read.ceiling / 1e9:.0f}"
        made.add_row(
            str(times.context),
            "floor",
            f"{floor:.3f}",
            "",
            "",
            f"{floor * 1e3 / layers:.1f}",
            "1.000",
            ceiling,
            style="dim",
        )
        rows: dict[str, Summary | None] = {**times.ours, **times.peers}
        for name, summary in rows.items():
            if summary is None:
                made.add_row("", name, "failed")
                continue
            speedups = _speedups(times, summary) if name in times.ours else {}
            made.add_row(
                "",
                name,
                *(f"{ms:.3f}" for ms in (summary.median_ms, summary.p10_ms, summary.p90_ms)),
                f"{summary.median_ms * 1e3 / layers:.1f}",
                f"{report.ratio(times.context, summary):.3f}",
                f"{report.speed(times.context, summary) / 1e9:.0f}",
                *(f"{speedups[peer]:.2f}x" if peer in speedups else "" for peer in peer_names),
            )
    return made


def failures(report: LayerReport) -> list[str]:
    """A line for every peer that failed."""
    return [
        f"{name} failed at context {times.context}: {note.error}"
        for times in report.contexts
        for name, note in times.peer_notes.items()
        if note.error is not None
    ]
