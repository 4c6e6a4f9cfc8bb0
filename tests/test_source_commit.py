"""A result's source digest leads to the commit whose package it is of."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import source_commit

from clusterfusion.bench.environment import package_digest


def commit(root: Path, content: str) -> str:
    package = root / source_commit.PACKAGE
    (package / "bench").mkdir(parents=True, exist_ok=True)
    (package / "bench.py").write_text(content)
    (package / "bench" / "b.py").write_text("b")
    (package / ".hidden").write_text("no source")
    who = ["-c", "user.name=A", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    source_commit.git("add", "-f", ".", root=root)
    source_commit.git(*who, "commit", "-qm", content, root=root)
    return source_commit.git("rev-parse", "HEAD", root=root).decode().strip()


def test_the_commit_of_a_digest_is_found(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    first = commit(tmp_path, "one")
    digest = package_digest(tmp_path / source_commit.PACKAGE)
    second = commit(tmp_path, "two")
    assert source_commit.find(digest, tmp_path) == first
    assert source_commit.find(package_digest(tmp_path / source_commit.PACKAGE)[:12], tmp_path) == second
    assert source_commit.find("0" * 64, tmp_path) is None


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ("whole", "no commit in this history has sources of digest 00000000"),
        ("shallow", "of digest 00000000, which is cut short: git fetch --unshallow"),
        ("none", "has no history that git can read"),
    ],
)
def test_where_it_is_not_found_one_line_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, history: str, expected: str
) -> None:
    whole, root = tmp_path / "whole", tmp_path / history
    root.mkdir()
    if history != "none":
        subprocess.run(["git", "init", "-q", str(whole)], check=True)
        commit(whole, "one")
        commit(whole, "two")
    if history == "shallow":
        subprocess.run(["git", "clone", "-q", "--depth", "1", f"file://{whole}", str(root)], check=True)
    monkeypatch.setattr(sys, "argv", ["source_commit.py", "0" * 8])
    with pytest.raises(SystemExit) as caught:
        source_commit.main(root)
    said = str(caught.value.code)
    assert expected in said and "\n" not in said
