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
    made = {"passed": 3, "failed": 0, "skipped": 0} | counts
    return {
        "counts": made,
        "files": {"tests/gpu/test_step.py": made},
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


def test_counts_must_be_those_of_the_files(tree: Path) -> None:
    record = record_for(tree) | {"counts": {"passed": 4, "failed": 0, "skipped": 0}}
    found = gpu_record.complaints(record, gpu_record.source_digests(tree))
    assert found == ["its counts are not those of the files it lists"]


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


# -- what is taken over from an earlier record -------------------------------------------------------------------------

ONE = {"passed": 1, "failed": 0, "skipped": 0}


@pytest.fixture
def files(tree: Path) -> Path:
    """tests/gpu/test_step.py, and three of which one names the next."""
    write(tree / "tests/gpu/test_base.py", "def helper(): ...\n")
    write(tree / "tests/gpu/test_user.py", "from gpu import (\n    test_base,\n)\n")
    write(tree / "tests/gpu/deep/test_last.py", "import importlib\nimportlib.import_module('gpu.test_user')\n")
    write(tree / "tests/tiny_models.py", "one\n")
    write(tree / "pyproject.toml", "one\n")
    write(tree / "tests/conftest.py", "one\n")
    write(tree / "src/clusterfusion/bench/verify.py", "one\n")
    return tree


def paths(*names: str) -> list[str]:
    return [f"tests/gpu/{name}.py" for name in names]


def earlier_record(tree: Path) -> dict[str, Any]:
    found = {path: dict(ONE) for path in paths("deep/test_last", "test_base", "test_step", "test_user")}
    counts = {"passed": 4, "failed": 0, "skipped": 0}
    besides = gpu_record.digest(gpu_record.source_digests(tree, gpu_record.BESIDES))
    facts = {"date": "2026-11-30", "device": {"name": "a GPU"}, "versions": {}, "besides": besides}
    return record_for(tree) | {"files": found, "counts": counts} | facts


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch, files: Path) -> Callable[..., dict[str, Any]]:
    """Makes an earlier record, changes something, and makes another since that one; "left_out" beside it is what pytest was not to run."""

    def make(
        change: Callable[[], object] = lambda: None, earlier: Any = None, ran: dict[str, dict[str, int]] | None = None,
        status: int = 0, journal: Path | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        write(files / "earlier.json", json.dumps(earlier_record(files) if earlier is None else earlier))
        change()
        seen: list[str] = []

        def run(
            processes: int, journal: Path | None, left_out: list[str]
        ) -> tuple[int, dict[str, dict[str, int]], float]:
            seen[:] = left_out
            now = [path for path in gpu_record.source_digests(files) if path.startswith("tests/gpu/test_")]
            return status, {path: dict(ONE) for path in now if path not in left_out} if ran is None else ran, 1.0

        pretend(monkeypatch, files, None, 0, {})
        monkeypatch.setattr(gpu_record, "run_tests", run)
        monkeypatch.setattr(gpu_record, "ROOT", files)
        output = files / "record.json"
        output.unlink(missing_ok=True)
        options = ["--output", str(output), "--since", str(files / "earlier.json")]
        options += ["--journal", str(journal)] * (journal is not None)
        monkeypatch.setattr("sys.argv", ["gpu_record.py", *options])
        gpu_record.main()
        made: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
        return made | {"left_out": seen}

    return make


EVERY = ("deep/test_last", "test_base", "test_step", "test_user")


@pytest.mark.parametrize(
    ("changed", "kept"),
    [
        ("tests/gpu/test_step.py", ("deep/test_last", "test_base", "test_user")),
        ("tests/gpu/test_base.py", ("test_step",)),
        ("tests/gpu/test_user.py", ("test_base", "test_step")),
        ("tests/gpu/deep/test_last.py", ("test_base", "test_step", "test_user")),
        ("tests/gpu/test_new.py", EVERY),
        ("tests/gpu/conftest.py", ()),
        ("tests/tiny_models.py", ()),
        ("src/clusterfusion/ops.py", ()),
        ("src/clusterfusion/bench/verify.py", ()),
        ("tests/conftest.py", ()),
        ("pyproject.toml", ()),
        ("tests/bench/records.py", ()),
        ("README.md", EVERY),
    ],
)
def test_what_holds_still(
    files: Path, record: Callable[..., Any], capsys: pytest.CaptureFixture[str], changed: str, kept: tuple[str, ...]
) -> None:
    made = record(lambda: write(files / changed, "two\n"))
    assert made["left_out"] == sorted(made["taken_over"]) == paths(*kept)
    assert set(made["taken_over"].values()) <= {"2026-11-30"}
    assert gpu_record.complaints(made, gpu_record.source_digests(files)) == []
    said = capsys.readouterr().out
    assert ("taken over from" in said) and ("nothing (" in said) == (not kept)
    if changed in ("tests/gpu/conftest.py", "tests/tiny_models.py", "src/clusterfusion/ops.py"):
        assert f"nothing (changed since: {changed})" in said


@pytest.mark.parametrize("gone", ["tests/gpu/test_base.py", "src/clusterfusion/ops.py"])
def test_what_is_gone_is_a_change(files: Path, record: Callable[..., Any], gone: str) -> None:
    made = record((files / gone).unlink)
    assert made["left_out"] == (paths("test_step") if "test_base" in gone else [])


@pytest.mark.parametrize("field", ["device", "versions"])
def test_of_another_machine_nothing_is_taken_over(files: Path, record: Callable[..., Any], field: str) -> None:
    assert record(earlier=earlier_record(files) | {field: {"name": "another"}})["left_out"] == []


def test_a_file_named_by_what_all_tests_share_spoils_all(files: Path, record: Callable[..., Any]) -> None:
    write(files / "tests/tiny_models.py", "import gpu.test_step\n")
    assert record(lambda: write(files / "tests/gpu/test_step.py", "two\n"))["left_out"] == []


def test_everything_may_be_taken_over_and_keeps_its_date(files: Path, record: Callable[..., Any]) -> None:
    earlier = earlier_record(files) | {"taken_over": {"tests/gpu/test_user.py": "2026-11-29"}}
    made = record(earlier=earlier, ran={}, status=gpu_record.NO_TESTS_LEFT)
    assert made["counts"] == {"passed": 4, "failed": 0, "skipped": 0}
    assert made["taken_over"].pop("tests/gpu/test_user.py") == "2026-11-29"
    assert set(made["taken_over"].values()) == {"2026-11-30"} and len(made["taken_over"]) == 3


def test_what_failed_in_the_journal_is_run_again(files: Path, record: Callable[..., Any]) -> None:
    journal = files / "journal"
    ran_on = {
        "digest": gpu_record.digest(gpu_record.source_digests(files)),
        "device": {"name": "a GPU"},
        "versions": {},
    }
    run_journal.begin(journal, ran_on)
    ends = {"test_step.py::a": "failed", "test_base.py::b": "passed", "test_user.py::c": "skipped"}
    with journal.open("a", encoding="utf-8") as lines:
        for test, end in ends.items():
            lines.write(json.dumps({"test": f"tests/gpu/{test}", "outcome": end}) + "\n")
    made = record(journal=journal)
    assert made["left_out"] == paths("deep/test_last", "test_base", "test_user")
    assert made["counts"]["passed"] == 4, "one passed earlier, in a file that is taken over: it counts once"


def test_tests_that_run_in_two_files_cannot_be_taken_over(record: Callable[..., Any]) -> None:
    with pytest.raises(SystemExit, match="tests of tests/gpu/test_base.py run in other files too; run without --since"):
        record(ran={"tests/gpu/test_base.py": dict(ONE)})


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda record: record.pop("date"), "it has no date"),
        (lambda record: record.update(files=[]), "it has no files"),
        (lambda record: record.update(taken_over=None), "what it has taken over is not among its files"),
        (lambda record: record["files"]["tests/gpu/test_base.py"].pop("skipped"), "test_base.py in it is no file of GPU tests"),
        (lambda record: record["files"].update({"src/ops.py": dict(ONE)}), "src/ops.py in it is no file of GPU tests"),
        (lambda record: record["counts"].update(passed=9999), "its counts are not those of the files it lists"),
        (lambda record: record.update(digest="0" * 64), "its digest is not that of the sources it lists"),
    ],
)  # fmt: skip
def test_what_is_no_record_is_said_before_anything_runs(
    files: Path, record: Callable[..., Any], spoil: Callable[[dict[str, Any]], object], expected: str
) -> None:
    earlier = earlier_record(files)
    spoil(earlier)
    with pytest.raises(SystemExit, match=expected):
        record(earlier=earlier)
    with pytest.raises(SystemExit, match="another kind of JSON"):
        record(earlier=[])
    with pytest.raises(SystemExit, match="it cannot be read"):
        record((files / "earlier.json").unlink)


def test_pytest_leaves_out_what_is_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    gpu_record.run_tests(1, None, paths("test_a", "deep/test_b"))
    assert commands[0][-2:] == ["--ignore=tests/gpu/test_a.py", "--ignore=tests/gpu/deep/test_b.py"]


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
