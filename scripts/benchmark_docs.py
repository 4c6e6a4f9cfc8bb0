"""Draws docs/benchmarks.md, its figures and the README's plot and table from benchmarks/results/h200/*.json.

    python3 scripts/benchmark_docs.py            # needs matplotlib, where figures are stale
    python3 scripts/benchmark_docs.py --check    # writes nothing; says what is stale and fails if anything is

The same files give the same text. A figure holds a digest of the numbers and of the code that it was drawn from, and is drawn
again when one of them changes; bytes may differ between versions of matplotlib.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))  # this checkout's package, wherever another one is installed

from benchmark_files import ResultFile, of_kind, read_results  # noqa: E402
from benchmark_page import FIGURES, PAGE, figure_name, page  # noqa: E402
from benchmark_readme import OVERVIEW, overview_choice, readme_block  # noqa: E402

from clusterfusion.bench import plots  # noqa: E402
from clusterfusion.bench.results import TIMED  # noqa: E402
from clusterfusion.errors import ClusterFusionError  # noqa: E402

README = Path("README.md")
BEGIN, END = "<!-- benchmarks: drawn by scripts/benchmark_docs.py -->\n", "<!-- benchmarks: end -->\n"
MEND = "python3 scripts/benchmark_docs.py"


@dataclasses.dataclass(frozen=True)
class Figure:
    """An SVG that ought to be there. `digest` is of all that decides how it looks; `draw` makes it."""

    digest: str
    draw: Callable[[], bytes]


def texts(results: Sequence[ResultFile], others: Sequence[Path], readme: str) -> dict[Path, str]:
    """Files of text by path, as they ought to be. Raises ValueError where the README has lost its marks."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError(f"{README} must hold these two lines, once each: {BEGIN.strip()} and {END.strip()}")
    before, _, rest = readme.partition(BEGIN)
    after = rest.partition(END)[2]
    return {PAGE: page(results, others), README: f"{before}{BEGIN}{readme_block(results)}{END}{after}"}


def figures(results: Sequence[ResultFile]) -> dict[Path, Figure]:
    """Figures by path, as they ought to be."""
    made: dict[Path, Figure] = {}
    for file in of_kind(results, *TIMED):
        for plot in plots.plots_of(file.times):
            made[figure_name(file, plot)] = Figure(_digest(plot, [file]), _drawer(file, plot))
    choice = overview_choice(results)
    if choice is not None:
        files, context = choice
        made[OVERVIEW] = Figure(
            _digest(f"overview {context}", files),
            lambda: plots.content_of(plots.overview([file.times for file in files], context), "svg"),
        )
    return made


def _drawer(file: ResultFile, plot: str) -> Callable[[], bytes]:
    return lambda: plots.content_of(plots.figure_of(file.times, plot), "svg")


def _digest(what: str, files: Sequence[ResultFile]) -> str:
    numbers: list[Any] = [what, plots.drawing_digest(), *(dataclasses.asdict(file.times) for file in files)]
    return hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()


def _mark(digest: str) -> bytes:
    return f"<!-- drawn from {digest} -->\n".encode()


def stale(root: Path) -> tuple[dict[Path, str], dict[Path, Figure], list[Path]]:
    """What is not as it ought to be under `root`: texts, figures, and figures that nothing asks for."""
    results, others = read_results(root)
    readme = (root / README).read_text(encoding="utf-8")
    old_texts = {
        path: text for path, text in texts(results, others, readme).items() if _read(root / path) != text.encode()
    }
    wanted = figures(results)
    old_figures = {
        path: figure
        for path, figure in wanted.items()
        if not _read(root / path).rstrip().endswith(_mark(figure.digest).rstrip())
    }
    there = {path.relative_to(root) for path in (root / FIGURES).glob("*.svg")}
    return old_texts, old_figures, sorted(there - wanted.keys())


def _read(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def write(root: Path) -> list[Path]:
    """Make everything as it ought to be. Returns what was written or removed."""
    old_texts, old_figures, unwanted = stale(root)
    drawn = {path: figure.draw().rstrip() + b"\n" + _mark(figure.digest) for path, figure in old_figures.items()}
    for path, content in drawn.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    for path, text in old_texts.items():
        (root / path).write_text(text, encoding="utf-8")
    for path in unwanted:
        (root / path).unlink()
    return [*drawn, *old_texts, *unwanted]


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """The exit status: 0 done or nothing stale, 1 stale or impossible."""
    parser = argparse.ArgumentParser(
        description="Draw docs/benchmarks.md and the README's plot and table from the result files."
    )
    parser.add_argument("--check", action="store_true", help="write nothing; fail if anything is stale")
    check = parser.parse_args(arguments).check
    try:
        if not check:
            for path in write(root):
                print(path)
            return 0
        old_texts, old_figures, unwanted = stale(root)
    except (ClusterFusionError, ValueError) as error:
        print(f"benchmark_docs: {error}", file=sys.stderr)
        return 1
    for path in (*old_texts, *old_figures, *unwanted):
        print(f"benchmark_docs: {path} is stale; run: {MEND}", file=sys.stderr)
    return int(bool(old_texts or old_figures or unwanted))


if __name__ == "__main__":
    sys.exit(main())
