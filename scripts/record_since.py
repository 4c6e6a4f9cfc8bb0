"""What a record of the GPU tests may take over from an earlier one: the results of files of tests that are as they were, as is
everything else that they could run."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

KINDS = {"failed", "passed", "skipped"}
FIELDS = {"date": str, "device": dict, "versions": dict, "files": dict, "counts": dict, "sources": dict, "digest": str}
TESTS = re.compile(r"tests/gpu/(\w+/)*test_\w+\.py")


def read_record(path: Path) -> dict[str, Any]:
    """An earlier record. Raises ValueError, in one line, for what is none."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"it cannot be read ({error})") from error
    if not isinstance(record, dict):
        raise ValueError("it is no record, but another kind of JSON")
    for field, kind in FIELDS.items():
        if not isinstance(record.get(field), kind):
            raise ValueError(f"it has no {field}, or another kind of value there than a record has")
    taken_over = record.setdefault("taken_over", {})
    if not isinstance(taken_over, dict) or not taken_over.keys() <= record["files"].keys():
        raise ValueError("what it has taken over is not among its files")
    for file, counts in record["files"].items():
        right = isinstance(counts, dict) and counts.keys() == KINDS and all(type(n) is int for n in counts.values())
        if not right or not TESTS.fullmatch(file):
            raise ValueError(f"{file} in it is no file of GPU tests with counts")
    return record


def why_nothing_holds(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Why none of an earlier record's results can be taken over; None if some may. `now` has the same fields."""
    for field in ("device", "versions"):
        if earlier[field] != now[field]:
            return f"another {field}: {earlier[field]} there, {now[field]} here"
    others = sorted(path for path in _changed(earlier["sources"], now["sources"]) if not TESTS.fullmatch(path))
    if others:
        return f"changed since: {', '.join(others)}"
    if earlier.get("besides") != now["besides"]:
        return "what else GPU tests run, or are run by, is not what it was, or the record does not say what that was"
    return None


def what_holds(
    earlier: Mapping[str, Any], sources: Mapping[str, str], root: Path, failed: Collection[str] = ()
) -> list[str]:
    """The earlier record's files of tests that are as they were and name none that is not, in any way and at any remove; without those
    in which a test has `failed` since. `sources`: of now, sha256 by path."""
    spoiled = _changed(earlier["sources"], sources) | set(failed)
    texts = {path: (root / path).read_text(encoding="utf-8") for path in sources if path.startswith("tests/")}
    while names := "|".join(re.escape(Path(path).stem) for path in spoiled):
        found = {path for path, text in texts.items() if re.search(rf"\b({names})\b", text)}
        if found <= spoiled:
            break
        spoiled |= found
    if any(not TESTS.fullmatch(path) for path in spoiled):
        return []
    return sorted(earlier["files"].keys() & texts.keys() - spoiled)


def _changed(before: Mapping[str, str], after: Mapping[str, str]) -> set[str]:
    return {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
