"""The record of the GPU tests is for the sources as they are, and can tell when it is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_record
import pytest
import run_journal

JUNIT = """<?xml version="1.0"?><testsuites><testsuite>
<testcase classname="tests.gpu.test_a" name="test_good" file="tests/gpu/test_a.py"/>
<testcase classname="tests.gpu.test_a" name="test_bad" file="tests/gpu/test_a.py"><failure message="x"/></testcase>
<testcase classname="tests.gpu.test_a" name="test_off" file="tests/gpu/test_a.py"><skipped message="x"/></testcase>
<testcase classname="tests.gpu.test_b" name="test_good" file="tests/gpu/test_b.py"/>
<testcase classname="tests.gpu.test_b" name="test_left" file="tests/gpu/test_b.py"/>
<testcase classname="tests.gpu.test_b" name="test_left" file="tests/gpu/test_b.py"><error message="x"/></testcase>
<testcase classname="" name="tests.gpu.test_c"><error message="collection failure"/></testcase>
</testsuite></testsuites>"""


# Parts of the package that do not decide what runs on the GPU.
OFF_GPU = {"__init__.py", "__main__.py", "bench", "cli", "named_shapes.py", "random_weights.py"}


PENDING = Path("tests/gpu_record_pending.json")


def acknowledged(root: Path, digest: str) -> str | None:
    """Why there is no record of the sources with this very digest, if someone has said so; None for any others."""
    path = root / PENDING
    pending = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return pending["reason"] if pending.get("digest") == digest else None


def test_a_missing_record_is_acknowledged_for_one_state_of_the_sources_only(tmp_path: Path) -> None:
    assert acknowledged(tmp_path, "abc") is None
    (tmp_path / PENDING).parent.mkdir()
    (tmp_path / PENDING).write_text(json.dumps({"digest": "abc", "reason": "no GPU was at hand"}), encoding="utf-8")
    assert acknowledged(tmp_path, "abc") == "no GPU was at hand"
    assert acknowledged(tmp_path, "abd") is None


def test_record_is_for_these_sources() -> None:
    path = gpu_record.ROOT / gpu_record.RECORD
    if not any((gpu_record.ROOT / "tests/gpu").rglob("test_*.py")):
        pytest.skip("there are no GPU tests yet")
    if not path.exists():
        pytest.fail(
            f"there is no GPU evidence: {gpu_record.RECORD} is missing. Make it {gpu_record.MEND}", pytrace=False
        )
    record = json.loads(path.read_text(encoding="utf-8"))
    sources = gpu_record.source_digests(gpu_record.ROOT)
    found = gpu_record.complaints(record, sources)
    if found and (reason := acknowledged(gpu_record.ROOT, gpu_record.digest(sources))):
        pytest.xfail(reason)
    if found:
        listing = "\n".join(f"  {line}" for line in found)
        pytest.fail(
            f"{gpu_record.RECORD} is no evidence for these sources:\n{listing}\nMend it {gpu_record.MEND}",
            pytrace=False,
        )
    if (gpu_record.ROOT / PENDING).exists():
        pytest.fail(f"{gpu_record.RECORD} is for these sources, so {PENDING} has no use: remove it", pytrace=False)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("src/clusterfusion/cuda/deep/step.cu", "src/clusterfusion/ops.py", "tests/gpu/test_step.py"):
        write(tmp_path / name, "one\n")
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def record_for(tree: Path, **counts: int) -> dict[str, Any]:
    sources = gpu_record.source_digests(tree)
    return {
        "counts": {"passed": 3, "failed": 0, "skipped": 0} | counts,
        "sources": sources,
        "digest": gpu_record.digest(sources),
    }


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda root: write(root / "src/clusterfusion/ops.py", "two\n"), ["changed: src/clusterfusion/ops.py"]),
        (lambda root: write(root / "src/clusterfusion/cuda/x.cuh", ""), ["added: src/clusterfusion/cuda/x.cuh"]),
        (lambda root: (root / "tests/gpu/test_step.py").unlink(), ["removed: tests/gpu/test_step.py"]),
        (
            lambda root: (root / "src/clusterfusion/ops.py").rename(root / "src/clusterfusion/weights.py"),
            ["removed: src/clusterfusion/ops.py", "added: src/clusterfusion/weights.py"],
        ),
        (lambda root: write(root / "src/clusterfusion/cuda/__pycache__/a.pyc", "x"), []),
        (lambda root: write(root / "src/clusterfusion/cli/app.py", "x"), []),
        (lambda root: write(root / "tests/gpu/record.json", "{}"), []),
    ],
    ids=["changed", "added", "removed", "renamed", "cache", "other source", "the record itself"],
)
def test_edits_that_count(tree: Path, edit: Callable[[Path], object], expected: list[str]) -> None:
    record = record_for(tree)
    edit(tree)
    current = gpu_record.source_digests(tree)
    assert gpu_record.complaints(record, current) == expected
    assert (gpu_record.digest(current) == record["digest"]) == (not expected)


def test_good_record_has_no_complaints(tree: Path) -> None:
    assert gpu_record.complaints(record_for(tree), gpu_record.source_digests(tree)) == []


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({"failed": 2}, "2 GPU tests failed"),
        ({"passed": 0}, "no GPU test passed (0 were skipped)"),
        ({"passed": 0, "skipped": 7}, "no GPU test passed (7 were skipped)"),
    ],
)
def test_bad_counts_are_no_evidence(tree: Path, counts: dict[str, int], expected: str) -> None:
    assert gpu_record.complaints(record_for(tree, **counts), gpu_record.source_digests(tree)) == [expected]


def test_digest_must_match_its_own_list(tree: Path) -> None:
    record = record_for(tree) | {"digest": "0" * 64}
    found = gpu_record.complaints(record, gpu_record.source_digests(tree))
    assert found == ["its digest is not that of the sources it lists"]


def test_every_glob_reaches_its_file(tmp_path: Path) -> None:
    expected = {pattern.replace("**/*", "deep/file") for pattern in gpu_record.SOURCES}
    for name in expected:
        write(tmp_path / name, name)
    assert set(gpu_record.source_digests(tmp_path)) == expected


def test_every_source_is_recorded_or_known_not_to_matter() -> None:
    covered = gpu_record.source_digests(gpu_record.ROOT)
    package = gpu_record.ROOT / "src/clusterfusion"
    units = {path.relative_to(package).parts[0] for path in package.rglob("*.py")}
    recorded = {Path(name).relative_to("src/clusterfusion").parts[0] for name in covered if name.startswith("src/")}
    unknown = units - recorded - OFF_GPU
    assert not unknown, f"{sorted(unknown)}: add to SOURCES in scripts/gpu_record.py, or to OFF_GPU here"


def test_counts_by_file() -> None:
    files = gpu_record.count_tests(JUNIT)
    assert files == {
        "tests/gpu/test_a.py": {"failed": 1, "passed": 1, "skipped": 1},
        "tests/gpu/test_b.py": {"failed": 1, "passed": 1, "skipped": 0},
        "tests.gpu.test_c": {"failed": 1, "passed": 0, "skipped": 0},
    }
    assert gpu_record.total(files) == {"failed": 3, "passed": 2, "skipped": 1}


@pytest.mark.parametrize(
    ("reason", "status", "files", "expected"),
    [
        ("no CUDA device", 0, {}, "no CUDA device"),
        (None, 5, {}, "no GPU test passed"),
        (None, 1, {"f": {"passed": 4, "failed": 1, "skipped": 0}}, "1 GPU tests failed"),
        (None, 3, {"f": {"passed": 4, "failed": 0, "skipped": 0}}, "status 3"),
    ],
)
def test_script_writes_nothing_without_success(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    reason: str | None,
    status: int,
    files: dict[str, dict[str, int]],
    expected: str,
) -> None:
    pretend(monkeypatch, tmp_path, reason, status, files)
    with pytest.raises(SystemExit, match=expected):
        gpu_record.main()
    assert not (tmp_path / "record.json").exists()


def test_script_writes_a_record_that_stands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend(monkeypatch, tmp_path, None, 0, {"f": {"passed": 4, "failed": 0, "skipped": 1}})
    gpu_record.main()
    text = (tmp_path / "record.json").read_text(encoding="utf-8")
    record = json.loads(text)
    assert record["counts"] == {"passed": 4, "failed": 0, "skipped": 1}
    assert gpu_record.complaints(record, gpu_record.source_digests(gpu_record.ROOT)) == []
    assert text == json.dumps(record, indent=2, sort_keys=True) + "\n"


def pretend(
    monkeypatch: pytest.MonkeyPatch, folder: Path, reason: str | None, status: int, files: dict[str, dict[str, int]]
) -> None:
    """Stand in for the GPU and for pytest's run on it."""
    monkeypatch.setattr(gpu_record, "why_no_gpu", lambda: reason)
    monkeypatch.setattr(gpu_record, "run_tests", lambda processes, journal, left_out: (status, files, 1.0))
    monkeypatch.setattr(gpu_record, "device_facts", lambda: {"name": "a GPU"})
    monkeypatch.setattr(gpu_record, "version_facts", dict)
    monkeypatch.setattr("sys.argv", ["gpu_record.py", "--output", str(folder / "record.json")])


@pytest.fixture
def three_files(tree: Path) -> Path:
    """tests/gpu/test_step.py, and two of which one imports the other."""
    write(tree / "tests/gpu/test_base.py", "def helper(): ...\n")
    write(tree / "tests/gpu/test_user.py", "import os\nfrom gpu.test_base import (\n    helper,\n)\n")
    return tree


def earlier_record(tree: Path) -> dict[str, Any]:
    names = ("test_base", "test_step", "test_user")
    files = {f"tests/gpu/{name}.py": {"passed": 1, "failed": 0, "skipped": 0} for name in names}
    return record_for(tree) | {"files": files, "date": "2026-11-30", "device": {"name": "a GPU"}, "versions": {}}


@pytest.mark.parametrize(
    ("changed", "kept"),
    [
        ("tests/gpu/test_step.py", ["test_base", "test_user"]),
        ("tests/gpu/test_base.py", ["test_step"]),
        ("tests/gpu/test_new.py", ["test_base", "test_step", "test_user"]),
        ("tests/gpu/conftest.py", []),
        ("tests/tiny_models.py", []),
        ("src/clusterfusion/ops.py", []),
    ],
)
def test_what_holds_still_since_a_record(three_files: Path, changed: str, kept: list[str]) -> None:
    earlier = earlier_record(three_files)
    write(three_files / changed, "two\n")
    sources = gpu_record.source_digests(three_files)
    assert gpu_record.still_hold(earlier, sources, three_files) == [f"tests/gpu/{name}.py" for name in kept]
    earlier["counts"]["failed"] = 1
    assert gpu_record.still_hold(earlier, sources, three_files) == []


def test_only_what_has_changed_is_run_again(monkeypatch: pytest.MonkeyPatch, three_files: Path) -> None:
    earlier = earlier_record(three_files) | {"taken_over": {"tests/gpu/test_user.py": "2026-11-29"}}
    write(three_files / "earlier.json", json.dumps(earlier))
    write(three_files / "tests/gpu/test_step.py", "two\n")
    seen: list[Any] = []

    def run(processes: int, journal: Path | None, left_out: list[str]) -> tuple[int, dict[str, dict[str, int]], float]:
        seen[:] = left_out
        return 0, {"tests/gpu/test_step.py": {"passed": 5, "failed": 0, "skipped": 0}}, 1.0

    pretend(monkeypatch, three_files, None, 0, {})
    monkeypatch.setattr(gpu_record, "run_tests", run)
    monkeypatch.setattr(gpu_record, "ROOT", three_files)
    since = ["--since", str(three_files / "earlier.json")]
    monkeypatch.setattr("sys.argv", ["gpu_record.py", "--output", str(three_files / "record.json"), *since])
    gpu_record.main()
    record = json.loads((three_files / "record.json").read_text(encoding="utf-8"))
    assert seen == ["tests/gpu/test_base.py", "tests/gpu/test_user.py"]
    assert record["counts"] == {"passed": 7, "failed": 0, "skipped": 0}
    assert record["taken_over"] == {"tests/gpu/test_base.py": "2026-11-30", "tests/gpu/test_user.py": "2026-11-29"}
    assert gpu_record.complaints(record, gpu_record.source_digests(three_files)) == []
    monkeypatch.setattr(gpu_record, "device_facts", lambda: {"name": "another"})
    gpu_record.main()
    assert seen == [], "of another device nothing is taken over, and all is run"


PROBE = """
import os, pathlib, pytest
@pytest.mark.parametrize("number", range(6))
def test_number(number):
    with open("ran.txt", "a") as file:
        file.write(f"{number} ")
    if number == 3 and os.environ.get("STOP"):
        os._exit(9)  # as when time is up
    assert number != 4 or pathlib.Path("mended").exists()
@pytest.fixture
def leaves_badly():
    yield
    assert pathlib.Path("mended").exists()
def test_with_a_bad_end(leaves_badly):
    pass
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_is_taken_up_again(tmp_path: Path, processes: int) -> None:
    write(tmp_path / "test_probe.py", PROBE)
    journal, ran_on = tmp_path / "journal", {"digest": "a"}

    def go(**environment: str) -> tuple[list[str], list[str]]:
        """What has passed before, and what runs now."""
        earlier = sorted(test for test, end in run_journal.begin(journal, ran_on).items() if end == "passed")
        (tmp_path / "ran.txt").write_text("", encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "run_journal", "test_probe.py"]
        command += ["-n", str(processes)] * (processes > 1)
        path = str(gpu_record.ROOT / "scripts")
        known = os.environ | {run_journal.VARIABLE: str(journal), "PYTHONPATH": path} | environment
        known.pop("PYTEST_XDIST_WORKER", None)
        subprocess.run(command, cwd=tmp_path, env=known, check=False, capture_output=True)
        return earlier, sorted((tmp_path / "ran.txt").read_text(encoding="utf-8").split())

    if processes == 1:  # the processes of xdist are replaced, and the test that stops one is a failed one
        assert go(STOP="1") == ([], list("0123"))
        journal.write_text(journal.read_text(encoding="utf-8") + '{"test": "cut sho', encoding="utf-8")
        assert go()[1] == list("345")
    else:
        assert go() == ([], list("012345"))
    (tmp_path / "mended").touch()
    assert go() == ([f"test_probe.py::test_number[{n}]" for n in "01235"], ["4"])
    passed = run_journal.begin(journal, ran_on)
    assert set(passed.values()) == {"passed"} and len(passed) == 7
    assert run_journal.begin(journal, {"digest": "b"}) == {}


def test_earlier_passes_count_too() -> None:
    files = {"tests/a.py": {"failed": 0, "passed": 2, "skipped": 1}}
    assert gpu_record.with_earlier(files, ["tests/a.py::x[1]", "tests/b.py::y"]) == {
        "tests/a.py": {"failed": 0, "passed": 3, "skipped": 1},
        "tests/b.py": {"failed": 0, "passed": 1, "skipped": 0},
    }
