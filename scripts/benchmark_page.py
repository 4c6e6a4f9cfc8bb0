"""docs/benchmarks.md in words: every number from a result file, and what no file holds said so."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmark_files import COMPILED, EAGER, MODELS, RESULTS, ResultFile, named, of_kind
from benchmark_text import HEAD, LIMITS, METHOD, TWICE
from benchmark_twice import change, measured_twice
from seed_commands import SEED_COMMANDS

from clusterfusion.bench.divergence import RULE
from clusterfusion.bench.plots import plots_of
from clusterfusion.bench.quality_report import ROUNDED, ROUNDED_NOTE
from clusterfusion.bench.results import TIMED, Point, Times

PAGE = Path("docs/benchmarks.md")
FIGURES = RESULTS / "figures"
NOT_MEASURED = "not measured yet"
EVALUATED = ("verify", "quality", "perplexity")
ABLATION = ("split", "fused", "graph", "model")
EAGERS_SHARE = f" (share of {EAGER}'s)"


def page(results: Sequence[ResultFile], others: Sequence[Path]) -> str:
    """The whole page."""
    parts = [
        HEAD,
        "## What is on record\n",
        _matrix(results),
        METHOD,
        "## Decoding, from the prompt to the last token\n",
        *_section(
            of_kind(results, "full", "decode"),
            f"{NOT_MEASURED.capitalize()}: there is no result of `bench full` or `bench decode` here.\n",
            _decoding,
        ),
        *_twice(results),
        "## The decoder layers alone\n",
        *_section(
            of_kind(results, "layer"),
            f"{NOT_MEASURED.capitalize()}: there is no result of `bench layer` here.\n",
            _layers,
        ),
        "## Prompts\n",
        *_section(of_kind(results, "prefill"), f"`bench prefill` is {NOT_MEASURED}.\n", _prompts),
        "## What this GPU reads\n",
        *_section(of_kind(results, "roofline"), _ceilings_instead(results), _roofline),
        "## Is the output right?\n",
        _output(results),
        LIMITS,
        "## The seed's commands\n",
        _seed(results),
    ]
    if others:
        names = ", ".join(f"[{path.name}]({_link(path)})" for path in others)
        parts.append(f"## Other files\n\nNot drawn from here: {names}.\n")
    return "\n".join(parts)


def figure_name(file: ResultFile, plot: str) -> Path:
    return FIGURES / f"{file.path.stem}_{plot}.svg"


def _section(files: Sequence[ResultFile], without: str, one: Callable[[ResultFile], str]) -> Iterator[str]:
    for file in files:
        with named(file.path, file.kind):
            yield one(file)
    if not files:
        yield without


def _matrix(results: Sequence[ResultFile]) -> str:
    kinds = (*TIMED, "prefill", *EVALUATED)
    models = list(dict.fromkeys([*MODELS, *sorted(file.model for file in results if file.model)]))
    rows = []
    for model in models:
        cells = [
            ", ".join(
                f"[{file.path.name}]({_link(file.path)})" for file in of_kind(results, kind) if file.model == model
            )
            for kind in kinds
        ]
        rows.append([model, *(cell or NOT_MEASURED for cell in cells)])
    heads = ["model", *(kind if kind in EVALUATED else f"bench {kind}" for kind in kinds)]
    return table(heads, rows, text_columns=len(heads))


def _origin(file: ResultFile) -> str:
    origin, versions = file.origin, file.origin["versions"]
    said = ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "transformers") if versions.get(name))
    return (
        f"[{file.path.name}]({_link(file.path)}), {origin['date'][:10]}, {device_of(file)}; {said}  \n"
        f"sources `{origin['source_digest']}`  \n`{origin['command']}`\n"
    )


def device_of(file: ResultFile) -> str:
    device = file.origin["device"]
    driver = device.get("driver")
    return f"{device['name']}" + (f" (driver {driver})" if driver else "")


def _decoding(file: ResultFile) -> str:
    data = file.data
    weights = "random weights" if file.random_weights else "a checkpoint"
    parts = [
        f"### {file.model}, {data['model']['dtype']}, {weights}: `bench {file.kind}`\n",
        _origin(file),
        _ceiling(file),
        *_images(file),
        f"Milliseconds per output token, median of {_runs(file)} of {data['new_tokens']} tokens (x floor):\n",
        _times_table(file.times),
        _spread(file),
        _ablation(file.times),
        f"Milliseconds to the first token{EAGERS_SHARE * (EAGER in file.times.names)}:\n",
        _first_tokens(file),
        _memory(file),
        _same_tokens(file),
        _clocks(file),
    ]
    if data.get("perplexity"):
        parts += ["Perplexity:\n", _losses(data["perplexity"])]
    elif file.kind == "full":
        parts.append(f"No perplexity: {data['no_perplexity']}.\n")
    missing = [f"mode {name}: {why}" for name, why in data["left_out"].items()] + list(data["missing"])
    missing += _errors(data["contexts"], "context", "peers")
    parts.append(_not_in_it(file, missing))
    differences = [said for point in data["contexts"] for said in point["differences"]]
    if differences:
        parts.append("**Tokens differ that must not:** " + "; ".join(differences) + ".\n")
    return "\n".join(part for part in parts if part)


def _not_in_it(file: ResultFile, missing: Sequence[str] = ()) -> str:
    """What a result lacks, as a paragraph; nothing for one that is whole."""
    missing = [*missing, *["the run was interrupted"] * bool(file.data.get("interrupted"))]
    if left := file.left:
        missing.append(f"what was to be measured at {', '.join(map(str, left))}")
    return f"Not in it: {'; '.join(missing)}.\n" if missing else ""


def _errors(points: Sequence[dict[str, Any]], at: str, loops: str) -> list[str]:
    """Whatever ended a loop, and where."""
    return [
        f"{name} at {at} {point[at]}: {loop['error']}"
        for point in points
        for name, loop in point[loops].items()
        if loop.get("error")
    ]


def _clocks(file: ResultFile) -> str:
    """The SMs' clock and the GPU's power beside each time, where they were looked at."""
    made = _by_context(file, _field("clocks", lambda clocks: f"{clocks['sm_mhz']:.0f}, {clocks['watts']:.0f} W"))
    watts = file.origin["device"].get("power_limit_watts")
    limit = "" if watts is None else f"; its limit is {watts:.0f} W"
    return (
        made and f"The SMs' clock in MHz and the GPU's power in these runs, prompts included, medians{limit}:\n\n{made}"
    )


def _spread(file: ResultFile) -> str:
    made = _by_context(
        file, lambda loop: f"{loop['p10_ms']:.3f} … {loop['p90_ms']:.3f}" if loop.get("p10_ms") else None
    )
    return made and f"10th and 90th percentile of the runs:\n\n{made}"


def _twice(results: Sequence[ResultFile]) -> list[str]:
    """Where two files hold the same loops, how far their ratios are apart."""

    def cells(ratios: tuple[float, float] | None) -> list[str]:
        if ratios is None:
            return ["–", "–", "–"]
        return [*(f"{ratio:.3f}" for ratio in ratios), f"{100 * change(ratios):+.1f}%"]

    rows = []
    for twice in measured_twice(results):
        full = twice.files[0]
        links = " and ".join(
            f"[{file.kind} {file.origin['source_digest'][:8]}]({_link(file.path)}) ({file.origin['date'][:10]})"
            for file in twice.files
        )
        label = f"{full.model}, {full.times.dtype}{', random weights' * full.random_weights}: {links}"
        rows.append([label, str(twice.points[0].context), *cells(twice.over_floor), *cells(twice.over_compiled)])
    if not rows:
        return []
    heads = ["model", "context", "ours / floor", "again", "change", f"{COMPILED} / ours", "again", "change"]
    return ["## Measured twice\n", TWICE, table(heads, rows)]


def _layers(file: ResultFile) -> str:
    model = file.data["model"]
    parts = [
        f"### {file.model}, {model['dtype']}, {model['layers']} layers, random weights: `bench layer`\n",
        _origin(file),
        _ceiling(file),
        *_images(file),
        "Milliseconds a step of all layers (x floor):\n",
        _times_table(file.times),
        _ablation(file.times),
        _not_in_it(file, _errors(file.data["contexts"], "context", "peers")),
    ]
    return "\n".join(part for part in parts if part)


def _prompts(file: ResultFile) -> str:
    prompts = file.data["prompts"]

    def cell(loop: dict[str, Any]) -> str:
        if loop.get("median_ms") is None:
            return "–"
        ratio = loop["ratio_to_transformers"]
        spread = f" [{loop['p10_ms']:.2f}, {loop['p90_ms']:.2f}]"
        return f"{loop['median_ms']:.2f}{spread}" + (f" ({ratio:.2f})" if ratio is not None else "")

    names = list(dict.fromkeys(name for each in prompts for name in each["loops"]))
    rows = [[name, *(cell(each["loops"].get(name, {})) for each in prompts)] for name in names]
    parts = [
        f"### {file.model}, {file.data['model']['dtype']}{', random weights' * file.random_weights}: `bench prefill`\n",
        _origin(file),
        f"Milliseconds to the first token [10th, 90th percentile] (share of transformers'), medians of {file.data['runs']} runs; {file.data['scope']}.\n",
        table(["prompt", *(str(each["prompt"]) for each in prompts)], rows),
        _not_in_it(file, _errors(prompts, "prompt", "loops")),
    ]
    return "\n".join(part for part in parts if part)


def _ceiling(file: ResultFile) -> str:
    read = file.data["read_ceiling"]
    if read is None:
        return "No read ceiling, and so no floor.\n"
    return f"Read ceiling in the same run: {read['bytes_per_s'] / 1e12:.3f} TB/s.\n"


def _images(file: ResultFile) -> list[str]:
    names = {"tpot": "time by context", "speedup": "speed-up over peers", "read_share": "share of the read ceiling"}
    return [f"![{file.model}: {names[plot]}]({_link(figure_name(file, plot))})\n" for plot in plots_of(file.times)]


def _times_table(times: Times) -> str:
    rows = [["floor", *("" if point.floor_ms is None else f"{point.floor_ms:.3f}" for point in times.points)]]
    for name in times.names:
        rows.append([name, *(_ms(point, name) for point in times.points)])
    return table(["context", *(str(point.context) for point in times.points)], rows)


def _ms(point: Point, name: str) -> str:
    ms = point.times.get(name)
    if ms is None:
        return "–"
    return f"{ms:.3f}" + (f" ({ms / point.floor_ms:.2f})" if point.floor_ms else "")


def _ablation(times: Times) -> str:
    """What each step of fusing gains over the one before, and the last one over torch.compile."""
    forms = [name for name in ABLATION if name in times.names]
    pairs = [*itertools.pairwise(forms)]
    rows = []
    for before, after in pairs:
        gains = [times_as_fast(point.ours.get(before), point.ours.get(after)) for point in times.points]
        rows.append([f"{before} → {after}", *gains])
    if len(pairs) > 1:
        gains = [times_as_fast(point.ours.get(forms[0]), point.ours.get(forms[-1])) for point in times.points]
        rows.append([f"{forms[0]} → {forms[-1]}", *gains])
    if forms and COMPILED in times.names:
        gains = [times_as_fast(point.peers.get(COMPILED), point.ours.get(forms[-1])) for point in times.points]
        rows.append([f"{COMPILED} → {forms[-1]}", *gains])
    if not rows:
        return ""
    head = ["context", *(str(point.context) for point in times.points)]
    return "Times as fast, step by step:\n\n" + table(head, rows)


def times_as_fast(before: float | None, after: float | None) -> str:
    return "–" if before is None or after is None else f"{before / after:.2f}x"


def _first_tokens(file: ResultFile) -> str:
    def cell(loops: dict[str, Any], name: str) -> str:
        ms, eager = (loops.get(key, {}).get("first_token_ms") for key in (name, EAGER))
        if ms is None:
            return "–"
        return f"{ms:.1f}" + (f" ({ms / eager:.2f})" if eager and name != EAGER else "")

    rows = [[name, *(cell(loops, name) for loops in _loops(file))] for name in file.times.names]
    return table(["context", *(str(point["context"]) for point in file.data["contexts"])], rows)


def _runs(file: ResultFile) -> str:
    """How many, and of whom fewer."""
    asked = file.data["runs"]
    fewer = {}
    for loops in _loops(file):
        for name, loop in loops.items():
            if 0 < loop.get("samples", 0) < asked:
                fewer[name] = loop["samples"]
    said = "; ".join(f"{name}, {count}" for name, count in fewer.items())
    return f"{asked} runs" + (f" ({said})" if said else "")


def _memory(file: ResultFile) -> str:
    made = _by_context(file, _field("peak_bytes", lambda size: f"{size / 1e9:.2f}"))
    return made and (
        "Peak memory in GB, weights included; our sessions have room for the longest context at each of them, transformers' "
        f"caches for their own:\n\n{made}"
    )


def _same_tokens(file: ResultFile) -> str:
    """Of peers alone: ours must not differ, and it is said where they do."""
    made = _by_context(file, _field("same_tokens", str), [*file.times.peers()])
    return made and (
        "Tokens of peers before the first that is not ours, after which they decode another text (rounding decides near-ties, of "
        f"which random weights have many; `clusterfusion verify` looks closely at such differences from transformers eager, on prompts of its own):\n\n{made}"
    )


def _loops(file: ResultFile) -> list[dict[str, dict[str, Any]]]:
    """What was measured of every loop by name, context by context."""
    return [{**point["peers"], **point["modes"]} for point in file.data["contexts"]]


def _field(name: str, shown: Callable[[Any], str]) -> Callable[[dict[str, Any]], str | None]:
    return lambda loop: None if loop.get(name) is None else shown(loop[name])


def _by_context(
    file: ResultFile, shown: Callable[[dict[str, Any]], str | None], names: Sequence[str] | None = None
) -> str:
    """A table of what `shown` says of each loop, or of those of `names`; nothing where it says nothing of any."""
    names = file.times.names if names is None else names
    cells = [[name, *(shown(loops.get(name, {})) for loops in _loops(file))] for name in names]
    if all(cell is None for row in cells for cell in row[1:]):
        return ""
    rows = [[cell or "–" for cell in row] for row in cells]
    return table(["context", *(str(point["context"]) for point in file.data["contexts"])], rows)


def _losses(scored: dict[str, Any]) -> str:
    """Of a file of `perplexity`, or of that part of `bench full`'s."""
    names = {"decode": "ours, token by token", "prefill": "ours, prefill", "transformers": "transformers"}
    rows = [
        [
            names[path],
            *(
                f"{float(loss[name]):{form}}"
                for name, form in (("nats_per_token", ".6f"), ("perplexity", ".5f"), ("bits_per_byte", ".5f"))
            ),
        ]
        for path, loss in scored["losses"].items()
    ]
    made = table(["path", "nats/token", "perplexity", "bits/byte"], rows)
    return f"{made}\n{scored['scored_tokens']} tokens scored: {scored['source']}.{_not_finite(scored)}\n"


def _roofline(file: ResultFile) -> str:
    rows = [
        [f"{read['bytes'] / 1e9:.2f}", name, f"{variant['median_ms']:.4f}", f"{variant['bytes_per_s'] / 1e12:.3f}"]
        for read in file.data["reads"]
        for name, variant in read["variants"].items()
    ]
    return _origin(file) + "\n" + table(["GB", "read by", "ms", "TB/s"], rows)


def _ceilings_instead(results: Sequence[ResultFile]) -> str:
    timed = of_kind(results, *TIMED)
    beside = (
        " Every result of decoding above has the ceiling of its own run."
        if timed and all(f.data["read_ceiling"] for f in timed)
        else ""
    )
    return f"`bench roofline` by itself is {NOT_MEASURED}.{beside}\n"


def _output(results: Sequence[ResultFile]) -> str:
    files = of_kind(results, *EVALUATED)
    if not files:
        return f"`verify`, `quality` and `perplexity`: {NOT_MEASURED}.\n"
    kinds = {"verify": _verified, "quality": _quality, "perplexity": lambda file: _losses(file.data)}
    parts = [f"`verify`: {RULE[0].lower()}{RULE[1:]}\n"] if of_kind(files, "verify") else []
    for file in files:
        parts.append(f"### {file.model}{', random weights' * file.random_weights}: `{file.kind}`\n")
        with named(file.path, file.kind):
            parts += [_origin(file), kinds[file.kind](file), _not_in_it(file)]
    return "\n".join(part for part in parts if part)


def _not_finite(evaluated: dict[str, Any]) -> str:
    """A sentence behind others."""
    sides = evaluated.get("not_finite", ())
    return f" **Not finite:** {', '.join(sides)}." if sides else ""


def _verified(file: ResultFile) -> str:
    said, data = file.data["summary"], file.data
    verdicts = ", ".join(f"{count} {verdict}" for verdict, count in said["divergences"].items())
    modes = ", ".join(mode["name"] for mode in data["modes"])
    found = [each for prompt in data["prompts"] for each in prompt["divergences"]]
    best = ""
    texts = sum(prompt["text"] is not None for prompt in data["prompts"])
    if found:
        of_ours, of_theirs = (
            sum(each["best_token"] == each[side]["token"] for each in found) for side in ("ours", "theirs")
        )
        best = (
            f" Where they part, float64 has our token in {of_ours} and theirs in {of_theirs}, by a margin of at most "
            f"{_largest(found, 'margin')}; our logits are off by at most {_largest(found, 'our_error')} there, theirs by "
            f"{_largest(found, 'their_error')}."
        )
    return (
        f"{'Passed' if said['passed'] else '**Failed**'}: {said['identical_prompts']} of {said['prompts']} prompts (texts: {texts}, the rest "
        f"random tokens) give transformers' {data['tokens']} tokens; differences: {verdicts}. {said['same_tokens']} of {said['compared_tokens']} compared tokens are "
        f"the same; a prompt's are compared up to the first that is not.{best} {said['bit_differences']} differences in bits over "
        f"{data['runs']} runs in each of {modes}.\n"
    )


def _largest(found: Sequence[dict[str, Any]], name: str) -> str:
    """Of what divergences hold under a name, whatever its sign; what is no number of JSON is there as text, and nan is the largest."""
    return f"{max((abs(float(each[name])) for each in found), key=lambda value: (value != value, value)):.1e}"


def _quality(file: ResultFile) -> str:
    def cell(estimate: dict[str, Any] | None) -> str:
        if estimate is None:
            return "–"
        mean, low, high = (f"{float(estimate[name]):.3g}" for name in ("mean", "low", "high"))
        return f"{mean} [{low}, {high}]"

    measures = file.data["measures"]
    sides = ["ours", "rounded", "transformers", "difference"]
    if not any(measure.get("rounded") for measure in measures.values()):
        sides.remove("rounded")
    rows = [[name, *(cell(measure[side]) for side in sides)] for name, measure in measures.items()]
    made = table(["against float64", *(ROUNDED if side == "rounded" else side for side in sides)], rows)
    note = f" {ROUNDED_NOTE}" if "rounded" in sides else ""
    return f"{made}\n{file.data['positions']} positions: {file.data['source']}.{note}{_not_finite(file.data)}\n"


def _seed(results: Sequence[ResultFile]) -> str:
    rows = []
    for row in SEED_COMMANDS:
        on_record = [
            f"[{file.path.name}]({_link(file.path)})" + " (random weights)" * file.random_weights
            for file in of_kind(results, row.kind)
            if file.model == row.model
        ]
        recorded = ", ".join(on_record) or "not recorded yet"
        rows.append([f"`{row.script}`", f"`{row.command}`", row.fails, recorded, f"`{row.on_cpu}`"])
    heads = [
        "the seed's tests/",
        "here",
        "exit status is not 0 if",
        "on record",
        "small, on a CPU, as the tests run it",
    ]
    text = (
        "The project that this one grew from ships eight scripts. Each has a command in its place; "
        "[tests/test_seed_commands.py](../tests/test_seed_commands.py) runs the last column. What `test_pythia.py` and "
        "`test_pythia_6b9.py` call by name, the functions `pythia_2b8_*` and `pythia_6b9_*`, is tested against float64 in "
        "[tests/test_seed_api.py](../tests/test_seed_api.py) and on a GPU in "
        "[tests/gpu/test_seed_api.py](../tests/gpu/test_seed_api.py).\n"
    )
    return text + "\n" + table(heads, rows, text_columns=5)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """Markdown; columns after the first `text_columns` are numbers."""
    align = ["---" if index < text_columns else "---:" for index in range(len(heads))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, align, *rows)) + "\n"


def _link(path: Path) -> str:
    """From the page to a path from the repository's root."""
    return Path(os.path.relpath(path, PAGE.parent)).as_posix()
