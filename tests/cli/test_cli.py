"""The command line as a user meets it: a process, its output, its exit status."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from cli import interruptible
from tiny_models import tiny_model

import clusterfusion
from clusterfusion import cli

PROMPT = "The morning was fine, and Elizabeth"
SOURCE = Path(clusterfusion.__file__).parent.parent


def environment() -> dict[str, str]:
    # No GPU: these tests are about the command line, and must give the same text everywhere.
    return os.environ | {"PYTHONPATH": str(SOURCE), "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "100"}


def run(
    *arguments: str, stdin: str | bytes = b"", timeout: float = 120, **variables: str
) -> subprocess.CompletedProcess[str]:
    data = stdin.encode() if isinstance(stdin, str) else stdin
    done = subprocess.run(
        [sys.executable, "-m", "clusterfusion", *arguments],
        input=data,
        capture_output=True,
        timeout=timeout,
        env=environment() | variables,
        check=False,
    )
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def one_line(error: str) -> str:
    assert error.startswith("clusterfusion: "), error
    assert error.count("\n") == 1, error
    assert "Traceback" not in error
    return error


@pytest.fixture(scope="module")
def demo() -> str:
    return clusterfusion.load("demo", device="cpu").generate(PROMPT, 24).text


def test_generate_prints_text_then_timing(demo: str) -> None:
    done = run("generate", "demo", PROMPT, "-n", "24")
    assert (done.returncode, done.stdout) == (0, demo + "\n")
    assert "time to first token" in done.stderr
    assert "ms a token" in done.stderr
    assert "tokens/s" in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_prompt_comes_from_an_option_a_file_or_stdin(tmp_path: Path, demo: str) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT)
    options = ("-n", "24")
    assert run("generate", "demo", "--prompt", PROMPT, *options).stdout == demo + "\n"
    assert run("generate", "demo", "--file", str(file), *options).stdout == demo + "\n"
    assert run("generate", "demo", "--file", "-", *options, stdin=PROMPT).stdout == demo + "\n"
    assert run("generate", "demo", *options, stdin=PROMPT).stdout == demo + "\n"


def test_json(demo: str) -> None:
    done = run("generate", "demo", PROMPT, "-n", "24", "--json")
    assert done.stderr == ""
    said = json.loads(done.stdout)
    assert said["text"] == demo
    assert said["new_tokens"] == len(said["token_ids"]) == 24
    assert said["prompt_tokens"] == len(PROMPT)
    assert (said["mode"], said["dtype"], said["device"], said["finish_reason"]) == (
        "reference",
        "float32",
        "cpu",
        "length",
    )
    assert said["time_to_first_token_ms"] > 0
    assert said["tokens_per_s"] == pytest.approx(1e3 / said["ms_per_token"])


def test_sampling_options_reach_the_sampler() -> None:
    options = ("generate", "demo", PROMPT, "-n", "24", "-t", "0.9", "--top-k", "40", "--top-p", "0.95", "--json")
    first, again, other = (json.loads(run(*options, "--seed", seed).stdout) for seed in ("1", "1", "2"))
    assert first["text"] == again["text"] != other["text"]
    stopped = json.loads(run("generate", "demo", PROMPT, "--stop", " ", "--stop", "zzz", "--json").stdout)
    assert (stopped["finish_reason"], " " in stopped["text"]) == ("stop", False)


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_a_saved_checkpoint_folder(tmp_path: Path, family: str) -> None:
    """What save_pretrained writes, with the demo's tokenizer beside it, against transformers' own generate."""
    import shutil

    import torch
    from transformers import AutoTokenizer

    model = tiny_model(family, vocab_size=257, eos_token_id=None)
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SOURCE / "clusterfusion" / "demo_model" / name, tmp_path)
    said = json.loads(run("generate", str(tmp_path), "Hello", "-n", "30", "--json").stdout)
    ids = AutoTokenizer.from_pretrained(tmp_path)("Hello", return_tensors="pt")["input_ids"]
    wanted = model.generate(ids, max_new_tokens=30, do_sample=False, attention_mask=torch.ones_like(ids))
    assert said["token_ids"] == wanted[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("generate", "no-such-model", "x"), "neither a folder here nor a hub id"),
        (("generate", "pythia-2.8b", "x"), "name of a shape"),
        (("generate", "demo", "x", "--prompt", "y"), "given 2 times (PROMPT, --prompt)"),
        (("generate", "demo", "--file", "/no/such/file"), "--file /no/such/file cannot be read: No such file"),
        (("generate", "demo", "x", "--mode", "warp"), "mode is 'warp'"),
        (("generate", "demo", "x", "-n", "0"), "max_new_tokens is 0"),
        (("generate", "demo", "x", "-n", "9999"), "1 tokens and max_new_tokens 9999 do not fit the context of 2048"),
        (("generate", "demo", "x", "--top-p", "0"), "top_p is 0"),
        (("generate", "demo", "x", "--device", "cuda"), "PyTorch sees no GPU here"),
        (("generate", "demo", "x", "--dtype", "int4"), "dtype is 'int4'"),
        (("generate", "demo", "x" * 3000), "a prompt of 3000 tokens"),
    ],
)
def test_errors_are_one_line_and_exit_1(arguments: tuple[str, ...], complaint: str) -> None:
    done = run(*arguments)
    assert done.returncode == 1
    assert complaint in one_line(done.stderr)
    assert done.stdout == ""


def test_prompt_that_is_not_utf8() -> None:
    done = run("generate", "demo", stdin=b"ab\xff")
    assert done.returncode == 1
    assert "not UTF-8 (byte 2)" in one_line(done.stderr)


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="a device that never ends")
def test_a_prompt_that_does_not_end() -> None:
    done = run("generate", "demo", "--file", "/dev/zero")
    assert done.returncode == 1
    assert "the prompt in --file /dev/zero holds more than 256 MiB" in one_line(done.stderr)


def test_ctrl_c_during_imports_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Interrupted(types.ModuleType):
        def __getattr__(self, name: str) -> None:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "clusterfusion.cli.app", Interrupted("app"))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "clusterfusion: interrupted\n"


@pytest.mark.parametrize(
    "arguments", [("--debug", "generate", "nowhere", "x"), ("generate", "nowhere", "x", "--debug")]
)
def test_debug_shows_the_trace(arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "CheckpointError" in done.stderr


@pytest.mark.parametrize("arguments", [("frobnicate",), ("generate",), ("generate", "demo", "x", "-n", "many")])
def test_usage_errors_exit_2(arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_ctrl_c_ends_cleanly() -> None:
    process = interruptible.start("generate", "demo", PROMPT, "-n", "1900", env=environment())
    assert process.stdout is not None
    assert process.stdout.read(5), "no text came"
    process.send_signal(signal.SIGINT)
    rest, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert rest.endswith(b"\n")
    assert b"Traceback" not in error
    assert b"interrupted" in error


def test_a_reader_that_goes_away_is_no_error() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "clusterfusion", "generate", "demo", PROMPT, "-n", "1900"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    assert process.stdout is not None
    process.stdout.read(5)
    process.stdout.close()
    assert process.stderr is not None
    error = process.stderr.read().decode()
    process.wait(timeout=60)
    assert "Traceback" not in error
    assert process.returncode == 1


def test_text_that_the_encoding_of_stdout_lacks() -> None:
    options = ("generate", "demo", PROMPT, "-n", "24", "-t", "50", "--seed", "1")
    text = json.loads(run(*options, "--json").stdout)["text"]
    assert not text.isascii(), "proves nothing; take another seed"
    done = run(*options, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout) == (0, text.encode("ascii", errors="replace").decode() + "\n")


@pytest.mark.parametrize("closed", ["1", "2"])
def test_a_process_without_stdout_or_stderr_generates(closed: str, demo: str) -> None:
    command = f'exec "$0" -m clusterfusion generate demo "$1" -n 24 {closed}>&-'
    done = subprocess.run(
        ["/bin/sh", "-c", command, sys.executable, PROMPT], capture_output=True, env=environment(), check=False
    )
    assert done.returncode == 0
    assert done.stdout.decode() == ("" if closed == "1" else demo + "\n")
    assert (b"tokens/s" in done.stderr) == (closed == "1")


def test_the_prompt_cannot_come_from_a_closed_stdin() -> None:
    done = subprocess.run(
        ["/bin/sh", "-c", 'exec "$0" -m clusterfusion generate demo -f - <&-', sys.executable],
        capture_output=True,
        env=environment(),
        check=False,
    )
    assert done.returncode == 1
    assert "there is no prompt" in one_line(done.stderr.decode())


def test_models_lists_every_named_shape() -> None:
    done = run("models")
    listed = [line.split()[0] for line in done.stdout.splitlines() if line.strip()]
    assert [name for name in clusterfusion.NAMED_SHAPES if name not in listed] == []
    rows = json.loads(run("models", "--json").stdout)
    pythia = next(row for row in rows if row["name"] == "pythia-2.8b")
    assert pythia["num_parameters"] == 2_775_208_960
    assert pythia["kv_bytes_per_token"] == 2 * 32 * 2560 * 2


def test_info_says_what_is_here() -> None:
    done = run("info")
    assert done.returncode == 0
    for word in ("clusterfusion", "torch", "cache", "reference", "fused", "GPU"):
        assert word in done.stdout
    said = json.loads(run("info", "--json").stdout)
    assert said["versions"]["clusterfusion"] == clusterfusion.__version__
    assert said["gpus"] == []
    assert list(said["modes"]) == ["reference", "split", "fused", "graph", "model"]
    assert said["modes"]["reference"]["needs"] == "any device"


def test_version_and_help() -> None:
    assert run("--version").stdout == f"clusterfusion {clusterfusion.__version__}\n"
    start = time.perf_counter()
    help_text = run("--help").stdout
    assert time.perf_counter() - start < 5, "help waits for PyTorch"
    for command in ("generate", "info", "models"):
        assert command in help_text
        assert run(command, "--help").returncode == 0
