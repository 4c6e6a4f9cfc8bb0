"""Runs the tests that need a GPU and writes down that they passed, for which sources, on what.

    python3 scripts/gpu_record.py [--output tests/gpu/record.json] [--processes N] [--journal FILE] [--since RECORD]

Continuous integration has no GPU. This record is its evidence: tests/test_gpu_record.py fails as soon as a source that
decides what runs on the GPU differs from the one the record was made with. The record may be made on another machine
and copied back. Nothing is written if a test failed or none passed. With a journal, a run that was interrupted, or in which a test
failed, is taken up again: tests that have passed on the same sources, device and versions are not run again. Since an earlier record of
the same device, versions and package, only files of tests that have changed are run, and the new record says which ones it has taken
over, and from when.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Collection, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import record_since
import run_journal

ROOT = Path(__file__).resolve().parent.parent
RECORD = Path("tests/gpu/record.json")
COMMAND = ("python3", "-m", "pytest", "-m", "gpu")
MEND = "on a machine with an NVIDIA GPU (compute capability 9.0 or newer): make gpu-record"

# Every source that decides what runs on the GPU, as globs from the repository's root. `**` matches folders of any depth.
SOURCES = (
    "src/clusterfusion/architecture.py",
    "src/clusterfusion/arguments.py",
    "src/clusterfusion/checkpoint.py",
    "src/clusterfusion/config_json.py",
    "src/clusterfusion/cuda/**/*",
    "src/clusterfusion/engine/**/*",
    "src/clusterfusion/errors.py",
    "src/clusterfusion/jit/**/*",
    "src/clusterfusion/named_shapes.py",
    "src/clusterfusion/ops.py",
    "src/clusterfusion/ops/**/*",
    "src/clusterfusion/plan/**/*",
    "src/clusterfusion/random_weights.py",
    "src/clusterfusion/reference.py",
    "src/clusterfusion/seed_api/**/*",
    "src/clusterfusion/weights.py",
    "tests/gpu/**/*.py",
    "tests/tiny_models.py",
)

# What else GPU tests run or are run by. A change there leaves a record what it is, but nothing is taken over from it.
BESIDES = ("pyproject.toml", "src/clusterfusion/**/*", "tests/conftest.py", "tests/bench/**/*.py")

OLDEST_CAPABILITY = (9, 0)
NO_TESTS_LEFT = 5  # pytest's exit status
PACKAGES = ("cuda-bindings", "cuda-core", "numpy", "nvidia-cuda-cccl", "pytest", "torch", "transformers")


def source_digests(root: Path, patterns: Sequence[str] = SOURCES) -> dict[str, str]:
    """The sha256 of each file that `patterns` name under `root`, by its path from there. Caches do not count."""
    files = {path for pattern in patterns for path in root.glob(pattern) if path.is_file()}
    names = (path.relative_to(root) for path in files)
    kept = (name for name in names if not any(p == "__pycache__" or p.startswith(".") for p in name.parts))
    return {name.as_posix(): hashlib.sha256((root / name).read_bytes()).hexdigest() for name in sorted(kept)}


def digest(sources: Mapping[str, str]) -> str:
    """One sha256 over the paths and contents that `source_digests` lists."""
    return hashlib.sha256(
        "".join(f"{path}\0{content}\n" for path, content in sorted(sources.items())).encode()
    ).hexdigest()


def changes(recorded: Mapping[str, str], current: Mapping[str, str]) -> list[str]:
    """What became of the recorded sources: "changed: path", "added: path" or "removed: path", sorted by path."""
    verdicts = {
        path: "added" if path not in recorded else "removed" if path not in current else "changed"
        for path in recorded.keys() | current.keys()
        if recorded.get(path) != current.get(path)
    }
    return [f"{verdict}: {path}" for path, verdict in sorted(verdicts.items())]


def complaints(record: Mapping[str, Any], current: Mapping[str, str]) -> list[str]:
    """Why `record` is no evidence for the sources `current`; empty if it is."""
    counts = record["counts"]
    found = []
    if counts["failed"]:
        found.append(f"{counts['failed']} GPU tests failed")
    if not counts["passed"]:
        found.append(f"no GPU test passed ({counts['skipped']} were skipped)")
    if record["digest"] != digest(record["sources"]):
        found.append("its digest is not that of the sources it lists")
    if counts != total(record["files"]):
        found.append("its counts are not those of the files it lists")
    return found + changes(record["sources"], current)


def count_tests(junit_xml: str) -> dict[str, dict[str, int]]:
    """Passed, failed (errors too) and skipped tests by file, from pytest's report in the xunit1 format."""
    files: dict[str, dict[str, set[str]]] = {}
    for case in ElementTree.fromstring(junit_xml).iter("testcase"):
        file = case.get("file") or case.get("classname") or case.get("name") or "?"
        outcomes = files.setdefault(file, {"failed": set(), "skipped": set(), "passed": set()})
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        # A test whose teardown fails is reported twice: once for itself, once for the teardown.
        outcomes[outcome].add(f"{case.get('classname')}::{case.get('name')}")
    for outcomes in files.values():
        outcomes["passed"] -= outcomes["failed"] | outcomes["skipped"]
    return {file: {kind: len(names) for kind, names in sorted(kinds.items())} for file, kinds in sorted(files.items())}


def total(files: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    return {kind: sum(counts[kind] for counts in files.values()) for kind in ("failed", "passed", "skipped")}


@functools.lru_cache(maxsize=1)
def why_no_gpu() -> str | None:
    """Why GPU tests cannot run here, or None if they can."""
    try:
        import torch
    except ImportError as error:
        return f"torch cannot be imported ({error})"
    if not torch.cuda.is_available():
        return "no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST_CAPABILITY:
        seen, needed = (".".join(map(str, pair)) for pair in (capability, OLDEST_CAPABILITY))
        return f"{torch.cuda.get_device_name()} has compute capability {seen}, below {needed}"
    return None


def device_facts() -> dict[str, str]:
    import torch

    driver = "unknown"
    if tool := shutil.which("nvidia-smi"):
        query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.partition("\n")[0] or driver
    return {
        "name": torch.cuda.get_device_name(),
        "compute_capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "driver": driver.strip(),
    }


def version_facts() -> dict[str, str | None]:
    """Versions of everything between the sources and the GPU; None for what is not installed."""
    import torch

    facts: dict[str, str | None] = {"python": platform.python_version(), "cuda_runtime": torch.version.cuda}
    try:
        from cuda.bindings import nvrtc

        facts["nvrtc"] = ".".join(map(str, nvrtc.nvrtcVersion()[1:]))
    except (ImportError, RuntimeError):
        facts["nvrtc"] = None
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = None
    return facts


def with_earlier(files: Mapping[str, Mapping[str, int]], earlier: Iterable[str]) -> dict[str, dict[str, int]]:
    """Counts by file, and the tests that passed in earlier runs, by their node ids."""
    found = {file: dict(counts) for file, counts in files.items()}
    for test in earlier:
        counts = found.setdefault(test.partition("::")[0], {"failed": 0, "passed": 0, "skipped": 0})
        counts["passed"] += 1
    return dict(sorted(found.items()))


def run_tests(
    processes: int, journal: Path | None = None, left_out: Sequence[str] = ()
) -> tuple[int, dict[str, dict[str, int]], float]:
    """pytest's exit status, its counts by file, and the seconds it took."""
    began = time.monotonic()
    environment = dict(os.environ)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-o", "junit_family=xunit1", f"--junitxml={report}"]
        options += [f"--ignore={path}" for path in left_out]
        if processes > 1:  # kernels compile side by side; needs pytest-xdist
            options += ["-n", str(processes)]
        if journal is not None:
            options += ["-p", "run_journal"]
            environment[run_journal.VARIABLE] = str(journal.resolve())
            environment["PYTHONPATH"] = os.pathsep.join(
                filter(None, (str(ROOT / "scripts"), environment.get("PYTHONPATH")))
            )
        command = [sys.executable, *COMMAND[1:], *options]
        status = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
        files = count_tests(report.read_text(encoding="utf-8")) if report.exists() else {}
    return status, files, time.monotonic() - began


def take_over(path: Path, now: Mapping[str, Any], failed: Collection[str]) -> tuple[dict[str, Any], list[str]]:
    """The earlier record and the files of tests whose results are taken over from it; says which, or why none. Exits where `path` holds no
    record that stands."""
    try:
        earlier = record_since.read_record(path)
    except ValueError as error:
        sys.exit(f"gpu_record: --since is {str(path)!r}, which is no record that stands: {error}")
    if found := complaints(earlier, earlier["sources"]):
        sys.exit(f"gpu_record: --since is {str(path)!r}, which is no record that stands: {'; '.join(found)}")
    reason = record_since.why_nothing_holds(earlier, now)
    kept = [] if reason else record_since.what_holds(earlier, now["sources"], ROOT, failed)
    said = ", ".join(kept) or f"nothing ({reason or 'every file of tests changed, or names one that did'})"
    print(f"gpu_record: taken over from {path}: {said}", flush=True)
    return earlier, kept


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the GPU tests and record that they passed.")
    parser.add_argument("--output", type=Path, default=ROOT / RECORD, help=f"the record (default: {RECORD})")
    parser.add_argument("--processes", type=int, default=1, help="how many run tests at once (default: 1)")
    parser.add_argument(
        "--journal", type=Path, help="where to write down each test as it ends, and to look for earlier ones"
    )
    parser.add_argument("--since", type=Path, help="an earlier record, of which is kept what holds still")
    arguments = parser.parse_args()
    output: Path = arguments.output

    if reason := why_no_gpu():
        sys.exit(f"gpu_record: {reason}; a record needs an NVIDIA GPU of compute capability 9.0 or newer")
    sources = source_digests(ROOT)
    now = {
        "device": device_facts(),
        "versions": version_facts(),
        "sources": sources,
        "besides": digest(source_digests(ROOT, BESIDES)),
    }
    journal: Path | None = arguments.journal
    ends: dict[str, str] = {}
    if journal is not None:
        ran_on = {"digest": digest(sources), "device": now["device"], "versions": now["versions"]}
        ends = run_journal.begin(journal, ran_on)
    earlier = [test for test, end in ends.items() if end == "passed"]
    since: dict[str, Any] = {}
    kept: list[str] = []
    if arguments.since:
        failed = {test.partition("::")[0] for test, end in ends.items() if end == "failed"}
        since, kept = take_over(arguments.since, now, failed)
    status, ran, seconds = run_tests(arguments.processes, journal, kept)
    if both := sorted(ran.keys() & set(kept)):
        sys.exit(
            f"gpu_record: no record written: tests of {', '.join(both)} run in other files too; run without --since"
        )
    files = with_earlier(ran, earlier) | {path: since["files"][path] for path in kept}
    if status == NO_TESTS_LEFT and (earlier or kept):
        status = 0
    record = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(COMMAND),
        **now,
        "duration_s": round(seconds, 1),
        "counts": total(files),
        "files": files,
        "taken_over": {path: since["taken_over"].get(path, since["date"]) for path in kept},
        "digest": digest(sources),
    }
    found = complaints(record, source_digests(ROOT))
    if status != 0:
        found.insert(0, f"pytest ended with status {status}")
    if found:
        sys.exit("gpu_record: no record written: " + "; ".join(found))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if journal is not None:
        journal.unlink()
    print(f"gpu_record: {record['counts']} on {record['device']}, written to {output}")


if __name__ == "__main__":
    main()
