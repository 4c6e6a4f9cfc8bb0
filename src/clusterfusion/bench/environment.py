"""What a result file holds beside its numbers, so that they can be placed and repeated."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from clusterfusion import __version__
from clusterfusion.jit.device import device_limits

_PACKAGES = ("torch", "transformers", "triton", "cuda-core", "cuda-bindings", "nvidia-cuda-nvrtc", "nvidia-cuda-cccl")
_PACKAGE_ROOT = Path(__file__).resolve().parent.parent
_UNKNOWN = "unknown"


def package_digest(root: Path = _PACKAGE_ROOT) -> str:
    """One sha256 over the paths and contents of every file of this package. Caches and hidden files do not count."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root)
        if path.is_file() and not any(part == "__pycache__" or part.startswith(".") for part in name.parts):
            digest.update(f"{name.as_posix()}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def versions() -> dict[str, str | None]:
    """Of everything between the sources and the GPU; None for what is not installed."""
    found: dict[str, str | None] = {
        "clusterfusion": __version__,
        "python": platform.python_version(),
        "cuda_runtime": torch.version.cuda,
    }
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def device_facts(index: int) -> dict[str, Any]:
    """Name, compute capability, sizes and driver of CUDA device `index`. Raises DeviceError without it."""
    limits = device_limits(index)
    return {
        "name": limits.name,
        "compute_capability": ".".join(map(str, limits.compute_capability)),
        "multiprocessors": limits.multiprocessors,
        "l2_bytes": limits.l2_bytes,
        "driver": _driver_version(),
    }


def _driver_version() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return _UNKNOWN
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return _UNKNOWN
    return said.partition("\n")[0].strip() or _UNKNOWN
