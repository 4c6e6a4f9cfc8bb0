"""`clusterfusion bench` as a user meets it where there is no GPU, and its printed report from fabricated times."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cli import interruptible

import clusterfusion
from clusterfusion.bench import layer, prefill
from clusterfusion.bench.decode import measure
from clusterfusion.bench.environment import Origin
from clusterfusion.bench.options import LayerOptions, layer_options
from clusterfusion.bench.read_ceiling import ReadSpeeds
from clusterfusion.bench.report import ContextTimes, LayerReport, PeerNote
from clusterfusion.bench.samples import Summary
from clusterfusion.cli import main
from clusterfusion.cli.bench import _print
from clusterfusion.engine import Engine

SOURCE = Path(clusterfusion.__file__).parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(SOURCE), "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "100"}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "clusterfusion", "bench", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=ENVIRONMENT,
        check=False,
    )


def test_prefill_runs_on_a_cpu_and_writes_both_files(tmp_path: Path) -> None:
    files = tmp_path / "times.json", tmp_path / "times.md"
    done = run(
        "prefill",
        "demo",
        "--prompts",
        "5",
        "--runs",
        "5",
        "--no-peers",
        "--json",
        str(files[0]),
        "--markdown",
        str(files[1]),
    )
    assert done.returncode == 0, done.stderr
    assert "reference" in done.stdout
    assert json.loads(files[0].read_text())["prompts"][0]["prompt"] == 5
    assert "| 5 | reference |" in files[1].read_text()
    refused = run("prefill", "--random-weights", "pythia-2.8b")
    assert refused.returncode == 1 and "bench prefill of pythia-2.8b needs an NVIDIA GPU" in refused.stderr


def test_without_a_gpu_one_line_says_what_is_needed(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    done = run("layer", "--random-weights", "pythia-2.8b", "--json", str(file))
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("clusterfusion: bench layer needs an NVIDIA GPU of compute capability 9.0 or newer")
    assert done.stderr.count("\n") == 1
    assert not file.exists()


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (("--contexts", "16,2048"), 1, "contexts is 2048; it must be an int from 0 to 2047"),
        (("--contexts", "many"), 1, "contexts is 'many'; it must be numbers of tokens"),
        (("--layers", "33"), 1, "layers is 33; it must be an int from 1 to 32"),
        (("--repeats", "3"), 1, "repeats is 3; it must be an int from 100"),
        (("--dtype", "int8"), 1, "dtype is 'int8'; it must be one of"),
        (("--json", "/no/such/folder/x.json"), 1, "it must name a file in a folder that exists"),
        (("--layers", "some"), 2, "Invalid value for '--layers'"),
    ],
)
def test_bad_options(arguments: tuple[str, ...], status: int, expected: str) -> None:
    done = run("layer", "--random-weights", "pythia-2.8b", *arguments)
    assert (done.returncode, done.stdout) == (status, "")
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        ((), 1, "bench decode needs either MODEL or --random-weights SHAPE; neither was given"),
        (("demo", "--random-weights", "pythia-14m"), 1, "SHAPE; both were given"),
        (("--random-weights", "pythia-2.8b"), 1, "bench decode of pythia-2.8b needs an NVIDIA GPU"),
        (("--random-weights", "pythia-3b"), 1, "named shape 'pythia-3b' is unknown"),
        (("demo", "--contexts", "2048", "--new-tokens", "8"), 1, "so it must be from 1 to 2040"),
        (("demo", "--contexts", "many"), 1, "contexts is 'many'; it must be numbers of tokens"),
        (("demo", "--runs", "1"), 1, "runs is 1; it must be an int from 5"),
        (("demo", "--modes", "quick"), 1, "modes is 'quick'; it must be names from"),
        (("demo", "--peer-contexts", "5"), 1, "peer_contexts is '5', where 5 is not a context that is measured"),
        (("demo", "--json", "/no/such/folder/x.json"), 1, "--json is '/no/such/folder/x.json'"),
        (("demo", "--markdown", "/no/such/folder/x.md"), 1, "--markdown is '/no/such/folder/x.md'"),
        (("demo", "--json", "x.out", "--markdown", "./x.out"), 1, "--markdown is 'x.out', which --json is too"),
        (("demo", "--no-peers", "--peer-contexts", "16"), 1, "peer_contexts is '16', but transformers is left out"),
        (("demo", "--dtype", "int8"), 1, "dtype is 'int8'; it must be one of"),
    ],
)
def test_bad_options_of_decode(arguments: tuple[str, ...], status: int, expected: str) -> None:
    done = run("decode", *arguments)
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.startswith("clusterfusion: ") and done.stderr.count("\n") == 1
    assert expected in done.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "bench roofline needs an NVIDIA GPU of compute capability 9.0 or newer"),
        (("--bytes", "0.1"), "bytes is 0.1; it must be a number of gigabytes from 1 to 1000"),
        (("--repeats", "5"), "repeats is 5; it must be an int from 100"),
        (("--json", "/no/such/folder/x.json"), "it must name a file in a folder that exists"),
    ],
)
def test_roofline_without_a_gpu(arguments: tuple[str, ...], expected: str) -> None:
    done = run("roofline", *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("clusterfusion: ") and done.stderr.count("\n") == 1
    assert expected in done.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("demo",), "bench trace needs an NVIDIA GPU of compute capability 9.0 or newer"),
        (("--random-weights", "pythia-2.8b", "--out", "trace.json.gz"), "bench trace needs an NVIDIA GPU"),
        ((), "bench trace needs either MODEL or --random-weights SHAPE; neither was given"),
        (("--random-weights", "pythia-3b"), "named shape 'pythia-3b' is unknown"),
        (("--random-weights", "pythia-2.8b", "--context", "2040"), "it must be from 1 to 2017"),
        (("demo", "--steps", "0"), "steps is 0; it must be an int from 1"),
        (("demo", "--ctas", "0"), "ctas is 0; it must be an int from 1"),
        (("demo", "--out", "/no/such/folder/x.json"), "--out is '/no/such/folder/x.json'"),
    ],
)
def test_trace_without_a_gpu(arguments: tuple[str, ...], expected: str) -> None:
    done = run("trace", *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("clusterfusion: ") and done.stderr.count("\n") == 1
    assert expected in done.stderr
    assert not Path("trace.json.gz").exists()


def test_decode_runs_on_a_cpu(tmp_path: Path) -> None:
    file, markdown = tmp_path / "result.json", tmp_path / "table.md"
    done = run(
        "decode",
        "demo",
        "--contexts",
        "4,9",
        "--new-tokens",
        "3",
        "--no-peers",
        "--json",
        str(file),
        "--markdown",
        str(markdown),
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(file.read_text())
    assert said["command"].startswith("clusterfusion bench decode demo --contexts 4,9")
    assert [len(context["modes"]["reference"]["runs"]) for context in said["contexts"]] == [5, 5]
    assert "missing: the read ceiling, and so the floor" in done.stdout
    assert "mode graph left out: the kernels need an NVIDIA GPU" in done.stdout
    assert "| 4 | reference |" in markdown.read_text()
    assert "with 1 of 2 contexts" in done.stderr


def test_an_interrupt_leaves_a_valid_file(tmp_path: Path) -> None:
    """Ctrl-C after the first of many contexts."""
    file = tmp_path / "result.json"
    contexts = ",".join(map(str, range(1, 2000)))
    asked = ("demo", "--new-tokens", "3", "--no-peers", "--contexts", contexts, "--json", str(file))
    process = interruptible.start("bench", "decode", *asked, env=ENVIRONMENT)
    assert process.stderr is not None
    for line in process.stderr:
        if b"written to" in line:
            break
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    said = json.loads(file.read_text())
    assert said["interrupted"] and 1 <= len(said["contexts"]) < 1999
    assert f"interrupted after {len(said['contexts'])} of 1999 contexts".encode() in out
    assert list(tmp_path.iterdir()) == [file]


def test_modes_that_differ_are_exit_status_3(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = measure._Run.context

    def different(self: measure._Run, context: int) -> object:
        return dataclasses.replace(whole(self, context), differences=("graph and split differ",))

    monkeypatch.setattr(measure._Run, "context", different)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert status(monkeypatch, *"decode demo --contexts 4 --new-tokens 2 --no-peers".split()) == 3
    assert "FAILED: graph and split differ" in capsys.readouterr().out


def status(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    """The status that `clusterfusion bench` would exit with, run in this process."""
    monkeypatch.setattr(sys, "argv", ["clusterfusion", "bench", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def test_an_interrupted_prefill_has_its_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = prefill._measure_prompt

    def stop(engine: Engine, loops: Any, prompt: int, runs: int) -> prefill.PromptTimes:
        if prompt == 6:
            raise KeyboardInterrupt
        return whole(engine, loops, prompt, runs)

    monkeypatch.setattr(prefill, "_measure_prompt", stop)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    file = tmp_path / "times.json"
    asked = ("demo", "--prompts", "5,6", "--runs", "5", "--no-peers", "--json", str(file))
    assert status(monkeypatch, "prefill", *asked) == 130
    said = json.loads(file.read_text())
    assert (said["interrupted"], said["asked_prompts"], len(said["prompts"])) == (True, [5, 6], 1)


def test_interrupted_layers_have_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    times = Summary(1.25, 1.0, 1.5, 100)
    read = {"loads": times}
    context = ContextTimes(16, {"graph": times}, {}, {}, read)

    def stopped(options: LayerOptions, *rest: Any) -> LayerReport:
        origin = Origin("", "", {"name": "GPU"}, {}, "")
        return LayerReport(options, origin, ReadSpeeds(4 << 30, read), (context,), interrupted=True)

    monkeypatch.setattr(layer, "measure_layers", stopped)
    assert status(monkeypatch, "layer", "--random-weights", "pythia-2.8b", "--contexts", "16,512") == 130


def test_help_lists_the_options() -> None:
    done = run("decode", "--help")
    for option in (
        "--random-weights",
        "--contexts",
        "--new-tokens",
        "--runs",
        "--modes",
        "--no-peers",
        "--peer-contexts",
    ):
        assert option in done.stdout
    for option in ("--bytes", "--repeats", "--json"):
        assert option in run("roofline", "--help").stdout
    for option in ("--random-weights", "--context", "--steps", "--ctas", "--out"):
        assert option in run("trace", "--help").stdout
    done = run("layer", "--help")
    assert done.returncode == 0
    for option in ("--random-weights", "--contexts", "--layers", "--dtype", "--repeats", "--no-peers", "--json"):
        assert option in done.stdout
    assert "layer" in run("--help").stdout


def test_the_printed_report_is_whole(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    times = Summary(1.25, 1.0, 1.5, 100)
    read = {"bulk copies": times, "loads": times}
    long_error = "Unsupported: [no] " + "reason " * 30
    context = ContextTimes(
        2047,
        {"graph": times, "fused": times, "split": times},
        {"transformers eager": times, "transformers CUDA graph": times, "transformers compile": None},
        {
            "transformers eager": PeerNote(0.1, None),
            "transformers CUDA graph": PeerNote(0.1, None),
            "transformers compile": PeerNote(None, long_error),
        },
        read,
    )
    options = layer_options("pythia-2.8b", contexts=(2047,))
    _print(LayerReport(options, Origin("", "", {"name": "GPU"}, {}, ""), ReadSpeeds(4 << 30, read), (context,)))
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("read ceiling 3436 GB/s (bulk copies 3436, loads 3436") for line in lines)
    assert f"transformers compile failed at context 2047: {long_error}".rstrip() in [line.rstrip() for line in lines]
    header = next(line for line in lines if line.startswith("context"))
    assert all(name in header for name in ("vs eager", "vs CUDA graph", "vs compile")), header
    assert sum("1.00x" in line for line in lines) == 3
