"""Each of the seed's eight scripts has a command in its place, which runs here on a small model without a GPU."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from seed_commands import SEED_COMMANDS, TINY_LLAMA, SeedCommand
from tiny_models import tiny_llama

from clusterfusion.bench.full import measure
from clusterfusion.cli import main

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {
    "benchmark_full.py",
    "benchmark_decode.py",
    "benchmark_decode_6b9.py",
    "verify_lossless.py",
    "evaluate_decode_quality.py",
    "test_pythia.py",
    "test_pythia_6b9.py",
    "test_llama.py",
}


def test_none_is_left_out() -> None:
    assert {row.script for row in SEED_COMMANDS} == SCRIPTS and len(SEED_COMMANDS) == 8


@pytest.fixture
def on_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(measure, "CPU_TEXT_TOKENS", 16)


def run(command: str, monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("row", SEED_COMMANDS, ids=lambda row: row.script)
def test_the_small_one_runs(
    row: SeedCommand, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if TINY_LLAMA in row.on_cpu:
        tiny_llama().save_pretrained(TINY_LLAMA)
    assert run(row.on_cpu, monkeypatch) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "reference" in said
    if row.kind == "verify":
        assert said.splitlines()[-1] == "PASSED"


@pytest.mark.parametrize("row", SEED_COMMANDS, ids=lambda row: row.script)
def test_both_commands_of_a_row_are_the_same_one(row: SeedCommand) -> None:
    """What stands in the table for a GPU is the command that ran small: the same words, options that exist."""
    words = row.kind.split() if row.kind in ("verify", "quality") else ["bench", row.kind]
    for command in (row.command, row.on_cpu):
        assert shlex.split(command)[: len(words) + 1] == ["clusterfusion", *words]
    assert row.model in row.command
    assert set(re.findall(r"--[a-z-]+", row.command)) <= {"--random-weights", "--modes"}
