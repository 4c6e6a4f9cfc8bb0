"""`clusterfusion bench full` as a user meets it without a GPU, in this process."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clusterfusion.bench import perplexity
from clusterfusion.bench.full import measure
from clusterfusion.cli import main
from clusterfusion.cli.progress import ProgressBar
from clusterfusion.engine import Session


@pytest.fixture(autouse=True)
def small_and_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(measure, "CPU_TEXT_TOKENS", 16)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["clusterfusion", "bench", "full", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_without_a_model_it_runs_the_demo_and_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    file, page, folder = tmp_path / "result.json", tmp_path / "page.md", tmp_path / "plots"
    options = ("--contexts", "4", "--new-tokens", "3")
    assert run(monkeypatch, *options, "--json", str(file), "--markdown", str(page), "--plots", str(folder)) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("demo, float32, batch 1")
    assert "missing: the read ceiling, and so the floor: PyTorch sees no NVIDIA GPU here" in captured.out
    assert "missing: transformers compile and transformers CUDA graph, which need an NVIDIA GPU" in captured.out
    assert "perplexity: ours, decoding token by token" in captured.out
    assert "\x1b" not in captured.err, "no bar without a terminal"
    said = json.loads(file.read_text())
    assert said["command"].startswith("clusterfusion bench full --contexts 4")
    assert said["perplexity"]["scored_tokens"] == 15
    assert "| 4 | reference |" in page.read_text()
    names = {path.name for path in folder.iterdir()}
    assert names == {f"full_demo_{name}.{kind}" for name in ("tpot", "speedup") for kind in ("png", "svg")}
    assert {path.name for path in tmp_path.iterdir()} == {"result.json", "page.md", "plots"}


def test_a_perplexity_that_is_not_finite_has_a_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Overflowing(Session):
        def step(self, token: int) -> Tensor:
            return super().step(token) * math.inf

    monkeypatch.setattr(perplexity, "Session", Overflowing)
    assert run(monkeypatch, "--contexts", "4", "--new-tokens", "2", "--no-peers") == 3
    assert "NOT FINITE: ours, decoding token by token; " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--random-weights", "pythia-2.8b"), "bench full of pythia-2.8b needs an NVIDIA GPU"),
        (("--random-weights", "pythia-3b"), "named shape 'pythia-3b' is unknown"),
        (("demo", "--random-weights", "pythia-14m"), "bench full needs either MODEL or --random-weights SHAPE; both"),
        (("no/such-folder/here",), "no/such-folder/here"),
        (("demo", "--contexts", "2048", "--new-tokens", "8"), "so it must be from 1 to 2040"),
        (("demo", "--text", "/no/such/file"), "--text is '/no/such/file', which cannot be read"),
        (("demo", "--modes", "graph"), "modes is 'graph', and none of them can run here"),
        (("demo", "--plots", "/no/such/folder"), "--plots is '/no/such/folder', where nothing can be written"),
        (("demo", "--plots", "/proc/folder"), "--plots is '/proc/folder', where nothing can be written"),
        (("demo", "--text", "text-and-json", "--json", "text-and-json"), "which --text is too; each needs a file"),
        (("demo", "--json", "one", "--plots", "one"), "--plots is 'one', which --json is too"),
        (("demo", "--json", "/no/such/folder/x"), "it must name a file in a folder that exists"),
    ],
)
def test_bad_input_is_one_line(
    arguments: tuple[str, ...],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, *arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("clusterfusion: ") and captured.err.count("\n") == 1
    assert expected in captured.err


def test_plots_need_matplotlib(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run(monkeypatch, "demo", "--plots", ".") == 1
    assert capsys.readouterr().err.startswith("clusterfusion: plots need matplotlib, which is not installed")


def test_running_out_of_memory_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nMore lines.")

    monkeypatch.setattr(measure, "measure_decode", full)
    assert run(monkeypatch, "demo") == 1
    said = capsys.readouterr().err
    assert said == (
        "clusterfusion: out of memory: CUDA out of memory. Tried to allocate 9 GiB. More lines.; take a smaller model, a "
        "shorter context, or fewer modes and peers\n"
    )


def test_on_a_terminal_there_is_a_bar_below_the_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with ProgressBar() as progress:
        progress("a line with [brackets]")
        progress.share(0.5)
    said = capsys.readouterr().err
    assert "a line with [brackets]" in said and "50%" in said
