"""`clusterfusion bench` as a user meets it where there is no GPU, and its printed report from fabricated times."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import clusterfusion
from clusterfusion.bench.environment import Origin
from clusterfusion.bench.options import layer_options
from clusterfusion.bench.read_ceiling import ReadSpeeds
from clusterfusion.bench.report import ContextTimes, LayerReport, PeerNote
from clusterfusion.bench.samples import Summary
from clusterfusion.cli.bench import _print

SOURCE = Path(clusterfusion.__file__).parent.parent


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(SOURCE), "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "100"}
    return subprocess.run(
        [sys.executable, "-m", "clusterfusion", "bench", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
    )


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


def test_help_lists_the_options() -> None:
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
