"""The README's plot, and all models' numbers as a table: what they are drawn from, and what they say."""

from __future__ import annotations

from collections.abc import Sequence

from benchmark_files import COMPILED, RESULTS, ResultFile, of_kind
from benchmark_page import FIGURES, NOT_MEASURED, PAGE, device_of, table, times_as_fast

from clusterfusion.bench.results import TIMED, Point

OVERVIEW = FIGURES / "overview.svg"
OVERVIEW_CONTEXT = 1024
OVERVIEW_MODELS = ("pythia-2.8b", "pythia-6.9b", "llama-3.1-8b")
DECODING, LAYERS = ("full", "decode"), ("layer",)


def overview_choice(results: Sequence[ResultFile]) -> tuple[list[ResultFile], int] | None:
    """What the plot is drawn from, and at which context: at most three models, at a context that all have: where most of
    them have peers, and nearest to 1024 among those. One model alone if they have none in common. None without results."""
    first: dict[str, ResultFile] = {}
    for file in _headline(results):
        first.setdefault(file.model, file)
    chosen = [first[model] for model in OVERVIEW_MODELS if model in first] or list(first.values())[:3]
    for files in (chosen, chosen[:1]):
        contexts = [{point.context: point for point in _points(file)} for file in files]
        if common := set.intersection(*map(set, contexts)) if contexts else set():
            peers = {context: sum(bool(points[context].peers) for points in contexts) for context in common}
            return files, min(common, key=lambda context: (-peers[context], abs(context - OVERVIEW_CONTEXT), context))
    return None


def readme_block(results: Sequence[ResultFile]) -> str:
    """The plot, and a row for every model."""
    choice = overview_choice(results)
    if choice is None:
        what = "result with times of ours and a read ceiling" if of_kind(results, *TIMED) else "result"
        return f"Speed is {NOT_MEASURED}: there is no {what} in [{RESULTS}]({RESULTS}).\n"
    context, files = choice[1], _headline(results)
    layers = files[0].kind in LAYERS
    what = "Time of one step of the decoder layers alone" if layers else "Time per output token of whole generate loops"
    missing = " Whole decoding is not on record yet." if layers else ""
    weights = "random weights, " * all(file.random_weights for file in files)
    said = [
        f"![{what}, as a share of the read ceiling]({OVERVIEW})",
        "",
        f"{what}, {weights}batch 1, with a context of {context} tokens. A full bar would be as fast as the GPU reads the step's "
        f"weights, keys and values, which nothing that reads them from memory can beat: the floor.{missing} In numbers, and of all models:",
        "",
        _table(files),
        f"Method, commands, all results and what they do not show: [{PAGE}]({PAGE}).",
    ]
    return "\n".join(said) + "\n"


def _headline(results: Sequence[ResultFile]) -> list[ResultFile]:
    """One for each model and dtype: rather one with torch.compile in it, rather a whole one, rather a `full` than a `decode`, and rather a
    newer one; layers where there is neither."""

    def rank(file: ResultFile) -> tuple[bool, bool, bool, str]:
        compiled = any(COMPILED in point.peers for point in _points(file))
        return compiled, file.is_whole, file.kind == "full", file.origin["date"]

    for kinds in (DECODING, LAYERS):
        files = filter(_points, sorted(of_kind(results, *kinds), key=rank))
        if best := {(file.model, file.times.dtype): file for file in files}:
            return sorted(best.values(), key=lambda file: file.rank)
    return []


def _unsteady(file: ResultFile, context: int, mode: str) -> str:
    """Between which two ratios to torch.compile the rounds lie, where they differ by more than a twentieth."""
    (at,) = (each for each in file.data["contexts"] if each["context"] == context)
    pairs = zip(
        at["peers"].get(COMPILED, {}).get("runs", ()), at.get("modes", {}).get(mode, {}).get("runs", ()), strict=False
    )
    ratios = [compiled["ms_per_token"] / ours["ms_per_token"] for compiled, ours in pairs]
    if not ratios or max(ratios) < 1.05 * min(ratios):
        return ""
    return f" ({min(ratios):.1f} … {max(ratios):.1f})"


def _points(file: ResultFile) -> list[Point]:
    """Those with times of ours and a floor."""
    return [point for point in file.times.points if point.ours and point.floor_ms]


def _table(files: Sequence[ResultFile]) -> str:
    """A row for each: the floor, our fastest mode and torch.compile, at the shortest context that has this, or other peers, or
    else the shortest."""
    devices = list(dict.fromkeys(map(device_of, files)))
    all_random = all(file.random_weights for file in files)
    rows, modes, cool = [], set(), False
    for file in files:
        point = min(_points(file), key=lambda point: (COMPILED not in point.peers, not point.peers, point.context))
        mode, ours = min(point.ours.items(), key=lambda item: item[1])
        modes.add(mode)
        cool = cool or bool(point.peers)
        compiled = point.peers.get(COMPILED)
        assert point.floor_ms is not None  # of _points
        label = [file.model, file.times.dtype]
        label += ["random weights"] * (file.random_weights and not all_random)
        label += [device_of(file)] * (len(devices) > 1)
        label += ["interrupted"] * (not file.is_whole)
        marks = f", `{mode}`" * (mode != "model")
        marks += ", **tokens differ**" * any(each.get("differences") for each in file.data["contexts"])
        rows.append(
            [
                ", ".join(label),
                str(point.context),
                f"{file.data['read_ceiling']['bytes_per_s'] / 1e12:.2f}",
                f"{point.floor_ms:.3f}",
                f"{ours:.3f} ({ours / point.floor_ms:.2f}){marks}",
                "–" if compiled is None else f"{compiled:.3f}",
                times_as_fast(compiled, ours) + _unsteady(file, point.context, mode),
                f"[{file.origin['source_digest'][:8]}]({file.path})",
            ]
        )
    heads = [
        "model",
        "context",
        "read ceiling, TB/s",
        "floor, ms",
        "ours, ms (x floor)",
        f"{COMPILED}, ms",
        f"times as fast as {COMPILED.removeprefix('transformers ')}",
        "sources",
    ]
    notes = [f"{devices[0]}."] * (len(devices) == 1) + ["Ours: mode `model`, where no other is named."] * (
        "model" in modes
    )
    notes.append(
        "Each row links to its result file under the digest of the sources that were measured, which may be older than this commit."
    )
    if any("…" in row[-2] for row in rows):
        notes.append("Two ratios: between them lie those of single rounds, which differ by more than a twentieth.")
    if cool:
        notes.append(
            "Where peers were measured, slow ones let the GPU cool between our runs; most of the page's other contexts are without them."
        )
    return f"{table(heads, rows)}\n{' '.join(notes)}\n"
