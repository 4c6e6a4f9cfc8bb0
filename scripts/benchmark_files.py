"""The result files under benchmarks/results/h200 as `benchmark_docs.py` reads them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from clusterfusion.bench.results import TIMED, Times, times_of

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path("benchmarks/results/h200")
KINDS = (*TIMED, "prefill", "roofline", "verify", "quality", "perplexity")
RANDOM = " (random weights)"
EAGER, COMPILED = "transformers eager", "transformers compile"  # as the files call them
# What is to be on record (in this order), whatever else may be.
MODELS = (
    "pythia-160m",
    "pythia-410m",
    "pythia-1.4b",
    "pythia-2.8b",
    "pythia-6.9b",
    "pythia-12b",
    "llama-3.2-1b",
    "llama-3.1-8b",
    "llama-2-7b",
)


@dataclasses.dataclass(frozen=True)
class ResultFile:
    """One file. `model` is a shape's or checkpoint's name without its owner, "" for a roofline; `origin` holds device,
    versions, source_digest, command and date."""

    path: Path  # from the repository's root
    kind: str
    model: str
    random_weights: bool
    origin: dict[str, Any]
    data: dict[str, Any]

    @property
    def times(self) -> Times:
        return times_of(self.data)

    @property
    def left(self) -> list[int]:
        """Contexts, or prompts, that were asked for and are not in the file, of a run that ended before its time, whether it knew or not."""
        at = "prompt" if self.kind == "prefill" else "context"
        there = {point[at] for point in self.data.get(f"{at}s", ())}
        return [tokens for tokens in self.data.get(f"asked_{at}s", ()) if tokens not in there]

    @property
    def is_whole(self) -> bool:
        return not self.data.get("interrupted") and not self.left

    @property
    def rank(self) -> tuple[int, str, str]:
        """Where it stands among files of its kind."""
        return (MODELS.index(self.model) if self.model in MODELS else len(MODELS), self.model, self.path.name)


def read_results(root: Path = ROOT) -> tuple[list[ResultFile], list[Path]]:
    """Every result under `root`, and the JSON files there that are none that this page knows. Raises ValueError naming a
    file that is no JSON, or lacks what every result says of itself."""
    found, others = [], []
    for path in sorted((root / RESULTS).glob("*.json")):
        name = path.relative_to(root)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{name} is not JSON: {error}") from error
        kind = (data.get("benchmark") or data.get("evaluation")) if isinstance(data, dict) else None
        if kind in KINDS:
            with named(name, kind):
                found.append(_result(name, kind, data))
        else:
            others.append(name)
    return sorted(found, key=lambda file: (KINDS.index(file.kind), file.rank)), others


@contextlib.contextmanager
def named(path: Path, kind: str) -> Iterator[None]:
    """Turns whatever a file's values do to who reads them into a ValueError that names it."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no result of {kind}: {error!r}") from error


def _result(path: Path, kind: str, data: dict[str, Any]) -> ResultFile:
    origin = data.get("facts", data)
    model = data.get("model", {})
    if not all(isinstance(origin[field], str) for field in ("source_digest", "command", "date")):
        raise TypeError("its source_digest, command and date are not all text")
    name = str(origin["model"] if "facts" in data else model.get("shape") or model.get("name", ""))
    return ResultFile(
        path=path,
        kind=kind,
        model=name.removesuffix(RANDOM).rstrip("/").rpartition("/")[2],
        random_weights="shape" in model or name.endswith(RANDOM),
        origin={field: origin[field] for field in ("device", "versions", "source_digest", "command", "date")},
        data=data,
    )


def of_kind(results: Sequence[ResultFile], *kinds: str) -> list[ResultFile]:
    return [file for file in results if file.kind in kinds]
