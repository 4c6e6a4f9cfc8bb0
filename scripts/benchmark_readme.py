"""The README's plot, and its figures as a table: what they are drawn from, and what they say."""

from __future__ import annotations

from collections.abc import Sequence

from benchmark_files import RESULTS, ResultFile, of_kind
from benchmark_page import COMPILED, FIGURES, NOT_MEASURED, PAGE, device_of, table, times_as_fast

from clusterfusion.bench.results import TIMED, Point

OVERVIEW = FIGURES / "overview.svg"
OVERVIEW_CONTEXT = 1024
OVERVIEW_MODELS = ("pythia-2.8b", "pythia-6.9b", "llama-3.1-8b")


def overview_choice(results: Sequence[ResultFile]) -> tuple[list[ResultFile], int] | None:
    """What the README's plot is drawn from, and at which context: whole decoding if there is any, else layers; at most
    three models, at a context that all have: where most of them have peers, and nearest to 1024 among those. None without
    results."""
    for kind in TIMED:
        first: dict[str, ResultFile] = {}
        for file in of_kind(results, kind):
            if any(point.floor_ms for point in file.times.points):
                first.setdefault(file.model, file)
        wanted = [model for model in OVERVIEW_MODELS if model in first]
        chosen = [first[model] for model in (wanted or list(first)[:3])]
        contexts = [{point.context: point for point in file.times.points if point.floor_ms} for file in chosen]
        if common := set.intersection(*map(set, contexts)) if contexts else set():
            peers = {context: sum(bool(points[context].peers) for points in contexts) for context in common}
            return chosen, min(common, key=lambda context: (-peers[context], abs(context - OVERVIEW_CONTEXT), context))
    return None


def readme_block(results: Sequence[ResultFile]) -> str:
    """The plot, and the numbers of all models."""
    choice = overview_choice(results)
    if choice is None:
        return f"Speed is {NOT_MEASURED}: there is no result in [{RESULTS}]({RESULTS}).\n"
    files, context = choice
    layers = files[0].kind == "layer"
    what = "One step of the decoder layers alone" if layers else "Time per output token of whole generate loops"
    missing = " Whole decoding is not on record yet." if layers else ""
    weights = " of models with random weights" if all(file.random_weights for file in files) else ""
    said = [f"![{what}, as a share of the read ceiling]({OVERVIEW})", ""]
    said.append(
        f"{what} after {context} tokens{weights}, batch 1. A full bar would be as fast as the GPU reads the step's weights, "
        f"keys and values, which nothing that reads them from memory can beat: the floor.{missing}"
    )
    said += ["", _figures_table([file for file in of_kind(results, files[0].kind) if _point(file, context)], context)]
    said.append(f"Method, commands, all results and what they do not show: [{PAGE}]({PAGE}).")
    return "\n".join(said) + "\n"


def _point(file: ResultFile, context: int) -> Point | None:
    """At that context, or else at the shortest one that the file has; None without times of ours and a floor."""
    points = [point for point in file.times.points if point.ours and point.floor_ms]
    return min(points, key=lambda point: (point.context != context, point.context), default=None)


def _figures_table(files: Sequence[ResultFile], context: int) -> str:
    """A row for each: our fastest form, the floor and torch.compile."""
    rows, modes = [], []
    for file in files:
        point = _point(file, context)
        assert point is not None and point.floor_ms is not None
        mode, ours = min(point.ours.items(), key=lambda item: item[1])
        modes.append(f"`{mode}`")
        compiled = point.peers.get(COMPILED)
        rows.append(
            [
                f"{file.model}, {file.times.dtype}",
                str(point.context),
                f"{file.data['read_ceiling']['bytes_per_s'] / 1e12:.2f}",
                f"{point.floor_ms:.3f}",
                f"{ours:.3f} ({ours / point.floor_ms:.2f})",
                "–" if compiled is None else f"{compiled:.3f}",
                times_as_fast(compiled, ours),
                f"[{file.origin['source_digest'][:8]}]({file.path})",
            ]
        )
    heads = ["ms a token", "after", "GPU reads, TB/s", "floor", "ours (x floor)", COMPILED, "ours is", "sources"]
    devices = ", ".join(dict.fromkeys(map(device_of, files)))
    rested = any(point.peers for file in files if (point := _point(file, context)))
    cool = (
        " Where peers are measured, the slow ones let the GPU cool between our runs; the page has longer contexts without them."
        * rested
    )
    return (
        f"{table(heads, rows)}\nOurs in mode {', '.join(dict.fromkeys(modes))}; {devices}. Each number is from the file behind the digest of the "
        f"sources that it was measured with, which may be older than this commit.{cool}\n"
    )
