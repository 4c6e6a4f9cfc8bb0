"""`clusterfusion verify`, `quality` and `perplexity` as a user meets them, on the demo model without a GPU."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import Tensor

import clusterfusion
from clusterfusion.bench import perplexity as perplexity_module
from clusterfusion.bench import quality as quality_module
from clusterfusion.bench import verify as verify_module
from clusterfusion.bench.causal_lm import CausalLM
from clusterfusion.cli import app as app_module
from clusterfusion.engine import Session

SOURCE = Path(clusterfusion.__file__).parent.parent


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(SOURCE), "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "60"}
    return subprocess.run(
        [sys.executable, "-m", "clusterfusion", *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
        check=False,
    )


def exit_status(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The status that `clusterfusion` would exit with, run in this process."""
    monkeypatch.setattr(sys, "argv", ["clusterfusion", *arguments])
    with pytest.raises(SystemExit) as caught:
        app_module.main()
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_verify_on_demo(tmp_path: Path) -> None:
    file = tmp_path / "verify.json"
    done = run("verify", "demo", "--prompts", "3", "--tokens", "6", "--json", str(file))
    assert done.returncode == 0, done.stderr
    assert "tokens: 3 of 3 prompts identical to transformers over 6 tokens" in done.stdout
    assert "equal to the bit" in done.stdout
    assert done.stdout.splitlines()[-1] == "PASSED"
    assert "prompt 3 of 3" in done.stderr
    assert "Loading weights" not in done.stderr
    written = json.loads(file.read_text())
    assert (written["evaluation"], written["summary"]["passed"]) == ("verify", True)
    assert written["facts"]["command"].startswith("clusterfusion verify demo --prompts 3")
    assert written["modes"][0]["name"] == "reference"


def test_quality_on_demo(tmp_path: Path) -> None:
    file = tmp_path / "quality.json"
    done = run("quality", "demo", "--tokens", "20", "--dtype", "bfloat16", "--json", str(file))
    assert done.returncode == 0, done.stderr
    assert "KL divergence, nats" in done.stdout
    assert "…" not in done.stdout  # no number is cut
    assert "20 positions: the demo model's held-out excerpt" in done.stdout
    assert json.loads(file.read_text())["measures"]["hidden_mae"]["ours"]["mean"] > 0


def test_perplexity_on_demo(tmp_path: Path) -> None:
    file, text = tmp_path / "perplexity.json", tmp_path / "text.txt"
    text.write_text("It is a truth universally acknowledged, that a single man")
    done = run("perplexity", "demo", "--text", str(text), "--stride", "16", "--window", "32", "--json", str(file))
    assert done.returncode == 0, done.stderr
    assert "ours, decoding token by token" in done.stdout
    written = json.loads(file.read_text())
    assert written["scored_bytes"] == len(text.read_text()) - 1
    assert written["losses"]["decode"]["bits_per_byte"] == pytest.approx(
        written["losses"]["transformers"]["bits_per_byte"], rel=1e-5
    )


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (("verify",), 1, "either MODEL or --random-weights SHAPE; neither was given"),
        (("verify", "demo", "--random-weights", "pythia-14m"), 1, "both were given"),
        (("verify", "demo", "--modes", "warp"), 1, "modes is 'warp'; it must be 'auto' or names from"),
        (("verify", "demo", "--runs", "0"), 1, "runs is 0; it must be an int from 1"),
        (("verify", "demo", "--prompts", "some"), 2, "Invalid value for '--prompts'"),
        (("quality", "demo", "--text", "/no/such/file"), 1, "--text is '/no/such/file', which cannot be read"),
        (("quality", "demo", "--json", "/no/such/folder/x"), 1, "it must name a file in a folder that exists"),
        (("quality", "demo", "--mode", "graph"), 1, "mode is 'graph', which cannot run here"),
        # Without loading a model that does not exist: no model could take them.
        (("verify", "/no/model", "--tokens", "0"), 1, "tokens is 0; it must be at least 1"),
        (("quality", "/no/model", "--tokens", "-4"), 1, "tokens is -4; it must be at least 1"),
        (("perplexity", "/no/model", "--window", "1"), 1, "window is 1; it must be at least 2"),
        (("perplexity", "/no/model", "--stride", "0"), 1, "stride is 0; it must be at least 1"),
        (
            ("perplexity", "/no/model", "--text", "a", "--dataset", "b"),
            1,
            "--text is 'a' and --dataset is 'b'; give one",
        ),
        (
            ("perplexity", "/no/model", "--dataset", ":x"),
            1,
            "--dataset is ':x'; it must be REPOSITORY[:CONFIGURATION[:SPLIT]]",
        ),
        (("perplexity",), 2, "Missing argument 'MODEL'"),
    ],
)
def test_bad_options(arguments: tuple[str, ...], status: int, expected: str) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (status, "")
    assert expected in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that takes nothing")
def test_a_report_that_cannot_be_written_is_on_the_screen() -> None:
    done = run("quality", "demo", "--tokens", "2", "--json", "/dev/full")
    assert done.returncode == 1
    assert "KL divergence, nats" in done.stdout
    assert "'/dev/full' cannot be written (No space left" in " ".join(done.stderr.split())


def test_a_text_is_not_written_over(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a text that somebody wrote")
    for command in ("quality", "perplexity"):
        done = run(command, "demo", "--text", str(text), "--json", str(text))
        assert (done.returncode, done.stdout) == (1, "")
        assert "which --text is too; each needs a file of its own" in " ".join(done.stderr.split())
    assert text.read_text() == "a text that somebody wrote"


def test_a_wrong_engine_has_a_status_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Biased(Session):
        def step(self, token: int) -> Tensor:
            logits = super().step(token)
            logits[42] += 100
            return logits

    monkeypatch.setattr(verify_module, "Session", Biased)
    file = tmp_path / "verify.json"
    arguments = ("verify", "demo", "--prompts", "2", "--tokens", "4", "--device", "cpu", "--json", str(file))
    assert exit_status(monkeypatch, *arguments) == 3
    said = capsys.readouterr().out
    assert "FAILED" in said
    assert "Rule. At the first step" in said
    assert json.loads(file.read_text())["summary"]["divergences"]["error"] == 2


@pytest.mark.parametrize("command", ["quality", "perplexity"])
def test_numbers_that_are_not_finite_have_it_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    class Overflowing(Session):
        def step(self, token: int) -> Tensor:
            return super().step(token) * math.inf

    monkeypatch.setattr({"quality": quality_module, "perplexity": perplexity_module}[command], "Session", Overflowing)
    file = tmp_path / "result.json"
    limit = "--tokens" if command == "quality" else "--max-tokens"
    assert exit_status(monkeypatch, command, "demo", limit, "9", "--device", "cpu", "--json", str(file)) == 3
    assert "NOT FINITE: ours" in capsys.readouterr().out
    assert json.loads(file.read_text())["evaluation"] == command


def test_interrupted_it_prints_and_writes_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    greedy = CausalLM.greedy
    calls = 0

    def stop(self: CausalLM, ids: tuple[int, ...], tokens: int) -> tuple[list[int], Tensor]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return greedy(self, ids, tokens)

    monkeypatch.setattr(CausalLM, "greedy", stop)
    file = tmp_path / "verify.json"
    arguments = ("verify", "demo", "--prompts", "5", "--tokens", "4", "--device", "cpu", "--json", str(file))
    assert exit_status(monkeypatch, *arguments) == 130
    captured = capsys.readouterr()
    assert "PASSED so far" in captured.out
    assert "clusterfusion: interrupted" in captured.err
    written = json.loads(file.read_text())
    assert (written["interrupted"], written["asked_prompts"], len(written["prompts"])) == (True, 5, 2)


@pytest.mark.parametrize(
    ("command", "options", "steps"),
    [("quality", ("--tokens", "20"), 4), ("perplexity", ("--max-tokens", "40", "--window", "16", "--stride", "8"), 20)],
)
def test_interrupted_the_others_do_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, options: tuple[str, ...], steps: int
) -> None:
    taken = 0

    class Stopped(Session):
        def step(self, token: int) -> Tensor:
            nonlocal taken
            taken += 1
            if taken > steps:
                raise KeyboardInterrupt
            return super().step(token)

    monkeypatch.setattr({"quality": quality_module, "perplexity": perplexity_module}[command], "Session", Stopped)
    file = tmp_path / "result.json"
    assert exit_status(monkeypatch, command, "demo", *options, "--device", "cpu", "--json", str(file)) == 130
    assert json.loads(file.read_text())["interrupted"]


@pytest.mark.parametrize("command", ["verify", "quality", "perplexity"])
def test_help(command: str) -> None:
    done = run(command, "--help")
    assert done.returncode == 0
    assert "--json" in done.stdout
    assert command in run("--help").stdout
    said = " ".join(done.stdout.split())
    assert ("3 if not" if command == "verify" else "Exit status 3 if our") in said
