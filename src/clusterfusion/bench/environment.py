"""What a result file holds beside its numbers, so that they can be placed and repeated."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import importlib.metadata
import math
import platform
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from clusterfusion import __version__
from clusterfusion.errors import DeviceError
from clusterfusion.jit.device import device_limits

_PACKAGES = (
    *("torch", "transformers", "triton", "cuda-core", "cuda-bindings", "nvidia-cuda-nvrtc", "nvidia-cuda-cccl"),
    "nvidia-ml-py",  # which reads the clocks
)
_PACKAGE_ROOT = Path(__file__).resolve().parent.parent
_UNKNOWN = "unknown"
_DRIVER_S = 15.0  # in which the driver answers, or nobody waits for it


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where numbers come from: what makes a file of them evidence."""

    date: str
    command: str
    device: Mapping[str, Any]
    versions: Mapping[str, str | None]
    source_digest: str


def origin(command: str, device: torch.device) -> Origin:
    """Of numbers that `command` measures now on `device`."""
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return Origin(now, command, facts_of(device), versions(), package_digest())


def require_gpu(what: str) -> torch.device:
    """The current GPU, with its index. Raises DeviceError, which says that `what` needs one, unless the kernels run on
    it."""
    if not torch.cuda.is_available():
        raise DeviceError(
            f"{what} needs an NVIDIA GPU of compute capability 9.0 or newer (Hopper or Blackwell), and PyTorch sees no "
            "GPU here" + ("" if torch.version.cuda else " (it is a build without CUDA)")
        )
    index = torch.cuda.current_device()
    _ = device_limits(index).architecture  # raises for a GPU that is not supported
    return torch.device("cuda", index)


def facts_of(device: torch.device) -> dict[str, Any]:
    """Of a GPU `device_facts`; of a CPU its name and how many threads compute."""
    if device.type == "cuda":
        try:
            return device_facts(device.index or 0)
        except DeviceError:  # without the kernels' toolchain the reference mode still runs
            return {"name": torch.cuda.get_device_name(device)}
    return {"name": platform.processor() or platform.machine() or "CPU", "threads": torch.get_num_threads()}


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
    """Name, compute capability, sizes, driver and power limit of CUDA device `index`. Raises DeviceError without it."""
    limits = device_limits(index)
    return {
        "name": limits.name,
        "compute_capability": ".".join(map(str, limits.compute_capability)),
        "multiprocessors": limits.multiprocessors,
        "l2_bytes": limits.l2_bytes,
        "driver": _ask_driver("driver_version") or _UNKNOWN,
        "power_limit_watts": _power_limit_watts(index),
    }


def _power_limit_watts(index: int) -> float | None:
    """None where the driver does not say."""
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)  # its own order of GPUs may be another one
    said = _ask_driver("power.limit", f"--id=GPU-{uuid}") if uuid is not None else ""
    try:
        watts = float(said)
    except ValueError:
        return None
    return watts if math.isfinite(watts) else None


def _ask_driver(field: str, *options: str) -> str:
    """The first line of what nvidia-smi knows of `field`, without units; "" where it cannot be asked."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    query = [tool, *options, f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(
            query, capture_output=True, text=True, errors="replace", check=True, timeout=_DRIVER_S
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return said.partition("\n")[0].strip()
