"""The decisions of scripts/setup_env.py, without a network or a virtual environment."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import setup_env

LISTING = "torch (2.15.0)\nAvailable versions: 2.15.0, 2.14.0, 2.13.0+cpu, 2.13.0, 2.9.1+cpu, 2.3.0\n"


@pytest.mark.parametrize(
    ("gpu", "listing", "system", "machine", "requirement"),
    [
        (True, LISTING, "Linux", "x86_64", "torch>=2.4"),
        (False, LISTING, "Linux", "x86_64", "torch==2.13.0+cpu"),
        (False, "Available versions: 2.15.0, 2.14.0", "Darwin", "arm64", "torch>=2.4"),
        (False, "Available versions: 2.15.0, 2.14.0", "Linux", "x86_64", "torch>=2.4"),
        (False, "", "Linux", "x86_64", "torch>=2.4"),
    ],
    ids=["gpu", "labelled CPU build", "macOS", "only the usual build", "index cannot be listed"],
)
def test_choice_of_torch(gpu: bool, listing: str, system: str, machine: str, requirement: str) -> None:
    chosen, reason = setup_env.choose_torch(gpu, listing, system, machine)
    assert chosen == requirement
    warned = "TORCH_INDEX_URL" in reason and "3 GB" in reason
    assert warned == (not gpu and system == "Linux" and chosen == "torch>=2.4")


@pytest.mark.parametrize(
    ("listing", "expected"),
    [
        ("2.9.1+cpu, 2.13.0+cpu", "2.13.0+cpu"),
        ("2.3.1+cpu", None),
        ("2.13.0+cu130, 2.13.0", None),
        ("12.13.0+cpu", "12.13.0+cpu"),
        ("", None),
    ],
)
def test_newest_cpu_build(listing: str, expected: str | None) -> None:
    assert setup_env.newest_cpu_build(listing) == expected


def test_old_python_is_refused_with_the_way_out() -> None:
    complaint = setup_env.python_complaint((3, 8, 10), "/usr/bin/python3")
    assert complaint is not None
    assert all(part in complaint for part in ("/usr/bin/python3", "3.8", "3.10", "make PYTHON="))
    assert setup_env.python_complaint((3, 10, 0), "python3") is None
    assert setup_env.python_complaint((4, 0, 0), "python3") is None


@pytest.mark.parametrize("missing", ["venv", "ensurepip"])
def test_missing_venv_names_the_package(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else object())
    complaint = setup_env.venv_complaint((3, 11))
    assert complaint is not None
    assert "apt-get install python3.11-venv" in complaint


PYPROJECT = """\
[build-system]
requires = ["setuptools>=77"]
[project]
name = "x"
# a comment
dependencies = [
    "torch>=2.4",  # why
]
[project.optional-dependencies]
dev = ["pytest"]
[tool.ruff]
line-length = 120
"""


@pytest.mark.parametrize(
    ("old", "new", "matters"),
    [
        ("torch>=2.4", "torch>=2.5", True),
        ('"pytest"', '"pytest", "ruff"', True),
        ("setuptools>=77", "setuptools>=78", True),
        ("line-length = 120", "line-length = 100", False),
        ("# a comment", "# another", False),
        ("  # why", "  # because", False),
    ],
)
def test_what_makes_setup_run_again(old: str, new: str, matters: bool) -> None:
    assert old in PYPROJECT
    changed = setup_env.dependency_text(PYPROJECT.replace(old, new)) != setup_env.dependency_text(PYPROJECT)
    assert changed == matters


def test_dependency_text_of_this_project_holds_its_dependencies() -> None:
    text = setup_env.dependency_text((setup_env.ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert all(name in text for name in ("torch>=", "nvidia-cuda-nvrtc", "pytest>=", "setuptools", "clusterfusion.cli"))
    assert "line-length" not in text


def test_stamp_follows_the_gpu_the_index_and_the_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(PYPROJECT)
    monkeypatch.delenv("TORCH_INDEX_URL", raising=False)
    stamp = setup_env.wanted_stamp(tmp_path, gpu=False)
    assert setup_env.wanted_stamp(tmp_path, gpu=False) == stamp
    assert setup_env.wanted_stamp(tmp_path, gpu=True)["base"] != stamp["base"]
    monkeypatch.setenv("TORCH_INDEX_URL", "file:///somewhere")
    assert setup_env.wanted_stamp(tmp_path, gpu=False)["base"] != stamp["base"]


def test_environment_without_its_python_has_no_stamp(tmp_path: Path) -> None:
    environment = setup_env.Environment(tmp_path)
    environment.stamp.write_text('{"base": "x"}')
    assert environment.read_stamp() == {}
    environment.bin.mkdir()
    environment.python.write_text("")
    assert environment.read_stamp() == {"base": "x"}
    environment.stamp.write_text("{")
    assert environment.read_stamp() == {}


def test_failed_step_shows_its_output(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="status 3"):
        setup_env.run("a step", [sys.executable, "-c", "print('the cause'); raise SystemExit(3)"])
    assert "the cause" in capfd.readouterr().out


def test_bare_make_lists_every_target() -> None:
    listing = subprocess.run(["make"], cwd=setup_env.ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("demo", "test", "lint", "format", "gpu-test", "gpu-record", "clean"):
        assert f"make {target} " in listing
