"""Makes `.venv` with this package and everything its tests need. Quick when there is nothing to do.

    python3 scripts/setup_env.py [--venv .venv]

Standard library only. The one decision it takes is which build of torch to install: a machine without an NVIDIA GPU
gets a CPU build where pip can find one, because the usual Linux build brings gigabytes of GPU libraries. Set
TORCH_INDEX_URL to have torch, and nothing but torch, looked up in a package index of your choice.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).resolve().parent.parent
OLDEST_PYTHON = (3, 10)
OLDEST_PIP = 23
OLDEST_TORCH = (2, 4)
STAMP = "clusterfusion-setup.json"
HEARTBEAT_S = 20.0

# The tables of pyproject.toml that decide what is installed. Read as text: tomllib is too new for Python 3.10.
DEPENDENCY_TABLES = ("build-system", "project", "project.optional-dependencies", "project.scripts")

_started = time.monotonic()


def say(text: str) -> None:
    print(f"[{time.monotonic() - _started:6.1f} s] {text}", flush=True)


def fail(text: str) -> NoReturn:
    sys.exit(f"setup: {text}")


def python_complaint(version: tuple[int, ...], executable: str) -> str | None:
    """Why this Python will not do, or None."""
    if version[:2] >= OLDEST_PYTHON:
        return None
    seen, needed = ".".join(map(str, version[:2])), ".".join(map(str, OLDEST_PYTHON))
    return (
        f"{executable} is Python {seen}; this package needs {needed} or newer. "
        f"Install one and name it: make PYTHON=python{needed} …"
    )


def venv_complaint(version: tuple[int, ...]) -> str | None:
    """What to install if this Python cannot make virtual environments, or None."""
    if importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip"):
        return None
    name = f"python{version[0]}.{version[1]}"
    return (
        f"{name} lacks the venv or ensurepip module. On Debian or Ubuntu: apt-get install {name}-venv. "
        "Elsewhere: install Python from your system's packages or python.org, which bring both."
    )


def dependency_text(pyproject: str) -> str:
    """The lines of `pyproject` that decide what is installed, without comments and blank lines."""
    kept: list[str] = []
    table = ""
    for line in pyproject.splitlines():
        text = re.sub(r"(^|\s)#.*$", "", line).strip()
        header = re.fullmatch(r"\[\[?([^\[\]\"',]+)\]\]?", text)
        if header:
            table = header.group(1).strip()
        if text and table in DEPENDENCY_TABLES:
            kept.append(text)
    return "\n".join(kept)


def has_nvidia_gpu() -> bool:
    if Path("/proc/driver/nvidia").exists():
        return True
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    listing = subprocess.run([tool, "-L"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
    return listing.returncode == 0 and b"GPU" in listing.stdout


def newest_cpu_build(versions_listing: str) -> str | None:
    """The newest "X.Y.Z+cpu" of at least OLDEST_TORCH in what `pip index versions torch` printed, or None."""
    found = re.findall(r"\b(\d+)\.(\d+)((?:\.\d+)*)\+cpu\b", versions_listing)
    usable = [
        (tuple(map(int, (major, minor, *rest.split(".")[1:]))), f"{major}.{minor}{rest}+cpu")
        for major, minor, rest in found
        if (int(major), int(minor)) >= OLDEST_TORCH
    ]
    return max(usable)[1] if usable else None


def registry_build_is_small(system: str, machine: str) -> bool:
    """Whether the usual build of torch is one for the CPU on this system."""
    return system != "Linux" or machine not in ("x86_64", "aarch64")


def choose_torch(gpu: bool, versions_listing: str, system: str, machine: str) -> tuple[str, str]:
    """The requirement to install, and why.

    A CPU build is recognised by its "+cpu" label in the list of versions, which costs one look at the index. Asking pip
    to resolve a candidate instead (`--dry-run --report`) was tried: where an index serves no separate metadata, pip
    downloads the whole wheel, half a gigabyte, and its GPU libraries, only to say what they require.
    """
    any_build = "torch>=" + ".".join(map(str, OLDEST_TORCH))
    if gpu:
        return any_build, "an NVIDIA GPU is here, so the usual build"
    labelled = newest_cpu_build(versions_listing)
    if labelled:
        return f"torch=={labelled}", "no NVIDIA GPU is here, so the CPU build"
    if registry_build_is_small(system, machine):
        return any_build, f"the usual build for {system} {machine} is one for the CPU"
    return any_build, (
        "no CPU build in the configured package indexes, so the usual one. It may bring GPU libraries: 3 GB to download, "
        "7 GB on disk. To avoid them, stop now and set TORCH_INDEX_URL to PyTorch's index of CPU builds"
    )


def run(what: str, command: list[str], *, env: dict[str, str] | None = None) -> str:
    """Run `command` under a line that says `what`, and a sign of life now and then; its output only if it fails."""
    say(what)
    began = time.monotonic()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=str(ROOT), env=env)
        while True:
            try:
                status = process.wait(timeout=HEARTBEAT_S)
                break
            except subprocess.TimeoutExpired:
                say(f"  … still at it, {time.monotonic() - began:.0f} s")
        output.seek(0)
        text = output.read().decode(errors="replace")
    if status != 0:
        print(text, flush=True)
        fail(f"this failed with status {status}: {' '.join(command)}")
    return text


class Environment:
    """The virtual environment at `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bin = path / ("Scripts" if os.name == "nt" else "bin")
        self.python = self.bin / ("python.exe" if os.name == "nt" else "python")
        self.stamp = path / STAMP

    def read_stamp(self) -> dict[str, str]:
        """What the last complete setup was made for; empty if there was none or its Python is gone."""
        try:
            stamp = json.loads(self.stamp.read_text())
        except (OSError, ValueError):
            return {}
        return stamp if isinstance(stamp, dict) and self.python.exists() else {}

    def pip(self, *arguments: str) -> list[str]:
        return [str(self.python), "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]

    def install(self, what: str, *arguments: str) -> None:
        # --no-compile halves the time: most modules of torch and transformers are never imported.
        run(what, self.pip("install", "--quiet", "--no-compile", *arguments))

    def versions_of_torch(self, index: Sequence[str]) -> str:
        """What `pip index versions torch` prints: every version that suits this Python. Empty if it fails."""
        command = self.pip("index", "versions", "torch", *index)
        listing = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
        return listing.stdout.decode(errors="replace")

    def version_of(self, distribution: str) -> str:
        command = [str(self.python), "-c", f"from importlib.metadata import version; print(version({distribution!r}))"]
        return subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.decode().strip()


def wanted_stamp(root: Path, gpu: bool) -> dict[str, str]:
    """What an environment must have been made for to need nothing. A change of `base` makes it anew."""
    base = [str(root), sys.version, str(gpu), os.environ.get("TORCH_INDEX_URL", "")]
    dependencies = dependency_text((root / "pyproject.toml").read_text(encoding="utf-8"))
    return {
        "base": hashlib.sha256("\0".join(base).encode()).hexdigest(),
        "dependencies": hashlib.sha256(dependencies.encode()).hexdigest(),
        "script": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
    }


def set_up(environment: Environment, wanted: dict[str, str], gpu: bool) -> None:
    have = environment.read_stamp()
    environment.stamp.unlink(missing_ok=True)  # an interrupted setup starts over
    if have.get("base") != wanted["base"]:
        base_python = getattr(sys, "_base_executable", None) or sys.executable
        run(
            f"making {environment.path.name} with Python {platform.python_version()}",
            [base_python, "-m", "venv", "--clear", str(environment.path)],
        )
    if int(environment.version_of("pip").split(".")[0]) < OLDEST_PIP:
        environment.install(f"pip is older than {OLDEST_PIP}: upgrading it", "--upgrade", "pip")

    index_url = os.environ.get("TORCH_INDEX_URL")
    index = ["--index-url", index_url] if index_url else []
    listing = "" if gpu else environment.versions_of_torch(index)
    requirement, reason = choose_torch(gpu, listing, platform.system(), platform.machine())
    environment.install(f"installing {requirement}: {reason}", *index, requirement)

    # The rest must take the torch that is there.
    constraint = environment.path / "torch-constraint.txt"
    constraint.write_text(f"torch=={environment.version_of('torch')}\n")
    environment.install(
        "installing this package (editable) and its development tools", "-c", str(constraint), "-e", ".[dev]"
    )
    # Also compiles the modules of torch that every later run imports.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    run("importing torch", [str(environment.python), "-c", "import torch, clusterfusion"], env=env)
    environment.stamp.write_text(json.dumps(wanted, indent=1) + "\n")


def main() -> None:
    complaint = python_complaint(sys.version_info[:3], sys.executable)
    if complaint:
        fail(complaint)
    parser = argparse.ArgumentParser(description="Make the virtual environment of this checkout.")
    parser.add_argument("--venv", type=Path, default=Path(".venv"), help="where (default: .venv)")
    environment = Environment(ROOT / parser.parse_args().venv)

    gpu = has_nvidia_gpu()
    wanted = wanted_stamp(ROOT, gpu)
    if environment.read_stamp() == wanted:
        return
    complaint = venv_complaint(sys.version_info[:3])
    if complaint:
        fail(complaint)
    set_up(environment, wanted, gpu)
    say(f"ready: {environment.path.name} has torch {environment.version_of('torch')}")


if __name__ == "__main__":
    main()
