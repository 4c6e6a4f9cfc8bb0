"""Figures of a result: ms by context with the floor drawn in, speed-up over each peer, share of the read ceiling.

They are drawn from the JSON values, so that a figure and a file say the same. The same values give the same bytes with the
same matplotlib.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clusterfusion.bench.results import UNITS, Times, times_of
from clusterfusion.errors import ClusterFusionError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# One colour a name in every figure: peers grey and brown, ours from light to dark as more is fused.
COLOURS = {
    "transformers eager": "#d9d9d9",
    "transformers CUDA graph": "#b8a58c",
    "transformers compile": "#8c6d46",
    "reference": "#cfe3ee",
    "split": "#9ecae1",
    "split graph": "#87bcd9",
    "fused": "#4f9bcb",
    "graph": "#2171b5",
    "model": "#08306b",
}
_DARK = ("transformers compile", "fused", "graph", "model")  # white letters are read on these
_OTHER = "#cc79a7"
_DPI = 150
_STYLE = {
    "svg.hashsalt": "clusterfusion",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
}


def require_matplotlib() -> None:
    """Raises ClusterFusionError where it is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ClusterFusionError(
            "plots need matplotlib, which is not installed: pip install matplotlib, or install clusterfusion-plus[plots]"
        )


def draw(result: Mapping[str, Any]) -> dict[str, bytes]:
    """Files by name, PNG and SVG, of every plot that `result`, the JSON values of a benchmark, has something for.

    Raises ClusterFusionError without matplotlib.
    """
    times = times_of(result)
    prefix = f"{times.benchmark}_{file_stem(times.model)}"
    figures = {name: figure_of(times, name) for name in plots_of(times)}
    return {
        f"{prefix}_{name}.{kind}": content_of(figure, kind)
        for name, figure in figures.items()
        for kind in ("png", "svg")
    }


def plots_of(times: Times) -> list[str]:
    """The plots that there is something for: without peers no speed-up, without a read ceiling no share of it."""
    something = {
        "tpot": bool(times.points),
        "speedup": any(point.peers and point.ours for point in times.points),
        "read_share": any(point.floor_ms for point in times.points),
    }
    return [name for name, there in something.items() if there]


def figure_of(times: Times, plot: str) -> Figure:
    """One of the plots that `plots_of` names. Raises ClusterFusionError without matplotlib."""
    return _styled(lambda: {"tpot": by_context, "speedup": speedups, "read_share": read_shares}[plot](times))


def file_stem(model: str) -> str:
    """A model's name as a part of a file's: a folder's or an owner's name is left out."""
    last = model.replace("\\", "/").rstrip("/").rpartition("/")[2]
    return "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in last).strip(".") or "model"


def by_context(times: Times) -> Figure:
    """Milliseconds by context on a logarithmic scale, with the floor."""
    figure, (axes,) = _figure(1, 6.4, 4.0)
    for name in times.names:
        points = [(point.context, point.times[name]) for point in times.points if name in point.times]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, color=_colour(name), label=name)
    floor = [(point.context, point.floor_ms) for point in times.points if point.floor_ms]
    if floor:
        x, y = zip(*floor, strict=True)
        axes.plot(x, y, color="black", linestyle="--", linewidth=1, label="floor: reading the bytes")
        bottom = min(y) * 0.8
        axes.fill_between(x, y, bottom, color="black", alpha=0.08, linewidth=0)
        axes.set_ylim(bottom=bottom)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "25" else "")
    axes.set_xlabel("tokens of context")
    axes.set_ylabel(UNITS[times.benchmark])
    axes.set_title(_title(times))
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def speedups(times: Times) -> Figure:
    """How many times as long each peer takes as each of our modes: a panel a peer, a group of bars a context."""
    peers = list(times.peers())
    figure, panels = _figure(len(peers), 3.2 * len(peers) + 1.2, 3.4)
    for axes, peer in zip(panels, peers, strict=True):
        points = [point for point in times.points if peer in point.peers]
        _bars(
            axes,
            [str(point.context) for point in points],
            {
                name: [point.peers[peer] / point.ours[name] if name in point.ours else None for point in points]
                for name in times.ours()
            },
        )
        axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
        axes.set_title(f"against {peer}")
        axes.set_xlabel("tokens of context")
    panels[0].set_ylabel("times as fast")
    figure.suptitle(_title(times))
    _legend(figure, panels)
    return figure


def read_shares(times: Times) -> Figure:
    """What part of the read ceiling each reaches: the floor over the time, in percent."""
    figure, (axes,) = _figure(1, 6.4, 3.6)
    points = [point for point in times.points if point.floor_ms]
    shares = {
        name: [100 * (point.floor_ms or 0) / point.times[name] if name in point.times else None for point in points]
        for name in times.names
    }
    _bars(axes, [str(point.context) for point in points], shares)
    axes.axhline(100, color="black", linewidth=0.8, linestyle="--")
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("% of the read ceiling")
    axes.set_title(_title(times))
    _legend(figure, [axes])
    return figure


def overview(all_times: Sequence[Times], context: int) -> Figure:
    """What part of the read ceiling each reaches, a panel a model, at one context."""
    return _styled(lambda: _overview(all_times, context))


def _overview(all_times: Sequence[Times], context: int) -> Figure:
    names = [name for name in COLOURS if any(name in times.names for times in all_times)][::-1]
    figure, panels = _figure(len(all_times), 2.9 * len(all_times) + 1.6, 0.32 * len(names) + 1.3, sharey=True)
    for axes, times in zip(panels, all_times, strict=True):
        (point,) = (point for point in times.points if point.context == context)
        for row, name in enumerate(names):
            if name in point.times and point.floor_ms:
                share = 100 * point.floor_ms / point.times[name]
                axes.barh(row, share, color=_colour(name), height=0.75)
                inside = share > 55
                axes.text(
                    share - 1.5 if inside else share + 1.5,
                    row,
                    f"{point.times[name]:.2f} ms",
                    ha="right" if inside else "left",
                    va="center",
                    color="white" if inside and name in _DARK else "black",
                    fontsize=8,
                )
        axes.axvline(100, color="black", linewidth=0.8, linestyle="--")
        axes.set_xlim(0, 104)
        axes.set_xlabel("% of the read ceiling")
        axes.set_title(f"{times.model}, {times.dtype}", fontsize=9)
    panels[0].set_yticks(range(len(names)), names)
    return figure


def content_of(figure: Figure, kind: str) -> bytes:
    """The figure as a "png" or "svg" file, without a date."""
    from matplotlib import rc_context

    file = io.BytesIO()
    with rc_context(_STYLE):
        figure.savefig(file, format=kind, dpi=_DPI, metadata={"Date": None} if kind == "svg" else {"Software": None})
    return file.getvalue()


def drawing_digest() -> str:
    """A sha256 of this file: figures of another one may look otherwise."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def _styled(make: Callable[[], Figure]) -> Figure:
    require_matplotlib()
    from matplotlib import rc_context

    with rc_context(_STYLE):
        return make()


def _figure(panels: int, width: float, height: float, sharey: bool = False) -> tuple[Figure, Sequence[Axes]]:
    """A figure of its own, outside pyplot: no global state and no window."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False, sharey=sharey)[0]


def _bars(axes: Axes, groups: Sequence[str], series: Mapping[str, Sequence[float | None]]) -> None:
    """Vertical bars side by side in each group; None leaves a gap."""
    width = 0.84 / max(len(series), 1)
    for index, (name, values) in enumerate(series.items()):
        shown = [(group, value) for group, value in enumerate(values) if value is not None]
        middles = [group + (index - (len(series) - 1) / 2) * width for group, _ in shown]
        axes.bar(middles, [value for _, value in shown], width, color=_colour(name), label=name)
    axes.set_xticks(range(len(groups)), groups)


def _legend(figure: Figure, panels: Sequence[Axes]) -> None:
    entries: dict[str, Any] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(entries.values(), entries.keys(), loc="outside right upper", frameon=False)


def _colour(name: str) -> str:
    return COLOURS.get(name, _OTHER)


def _title(times: Times) -> str:
    return f"{times.model}, {times.dtype}, batch 1, on {times.device}"
