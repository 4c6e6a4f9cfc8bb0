"""`clusterfusion info`: what is here, and what each mode would need. Everything a bug report should hold."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
from typing import Annotated, Any

import typer

from clusterfusion.errors import ClusterFusionError

_PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "cuda-core",
    "cuda-bindings",
    "nvidia-cuda-nvrtc",
    "nvidia-cuda-cccl",
)


def info(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show versions, GPUs, the kernel cache, and what each mode needs."""
    gathered = gather()
    if as_json:
        typer.echo(json.dumps(gathered))
        return
    for line in _lines(gathered):
        typer.echo(line)


def gather() -> dict[str, Any]:
    """Everything `info` shows, as JSON values."""
    gpus, trouble = _gpus()
    return {
        "versions": _versions(),
        "compiler": _compiler(),
        "gpus": gpus,
        "gpu_trouble": trouble,
        "kernel_cache": _kernel_cache(),
        "modes": _modes(),
    }


def _versions() -> dict[str, str | None]:
    from clusterfusion import __version__

    found: dict[str, str | None] = {
        "clusterfusion": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def _compiler() -> str:
    """NVRTC and its headers, or what is missing."""
    from clusterfusion.jit.toolchain import find_toolchain

    try:
        return find_toolchain().identity
    except ClusterFusionError as error:
        return f"none: {error}"


def _gpus() -> tuple[list[dict[str, Any]], str | None]:
    """Facts of every GPU that PyTorch sees, and why there is none or why one cannot be asked."""
    import torch

    if not torch.cuda.is_available():
        return [], "PyTorch sees no GPU" + ("" if torch.version.cuda else " (it is a build without CUDA)")
    from clusterfusion.jit.device import device_limits

    gpus: list[dict[str, Any]] = []
    trouble = None
    for index in range(torch.cuda.device_count()):
        try:
            limits = device_limits(index)
            free, total = torch.cuda.mem_get_info(index)
            gpus.append(
                dataclasses.asdict(limits)
                | {"memory_bytes": total, "free_bytes": free, "resident_clusters": _resident_clusters(index)}
            )
        except ClusterFusionError as error:
            trouble = f"GPU {index}: {error}"
    return gpus, trouble


def _resident_clusters(index: int) -> dict[str, int]:
    """How many clusters of each size can be resident together with one CTA a multiprocessor, by the driver's word for
    one of our kernels with all the shared memory a block can have. Empty where the GPU has no clusters."""
    from clusterfusion.jit.cluster_norm import CLUSTER_SIZES, choose_cluster_norm
    from clusterfusion.jit.device import device_limits
    from clusterfusion.jit.launch import LaunchShape, load_kernel

    limits = device_limits(index)
    if not limits.cluster_launch:
        return {}
    resident: dict[str, int] = {}
    for size in CLUSTER_SIZES[1:]:
        chosen = choose_cluster_norm("layer_norm", 4096, "float16", "float16", "float16", size, "direct", aligned=True)
        kernel = load_kernel(chosen.source, chosen.instance, index)
        dynamic = limits.shared_bytes_per_block - kernel.resources.static_shared_bytes
        shape = LaunchShape(clusters=1, threads=chosen.threads, cluster_size=size, dynamic_shared_bytes=dynamic)
        resident[str(size)] = kernel.max_active_clusters(shape)
    return resident


def _kernel_cache() -> dict[str, Any]:
    from clusterfusion.jit.cache import default_directory

    folder = default_directory()
    if folder is None:
        return {"folder": None, "entries": 0, "bytes": 0}
    cubins = [path.stat().st_size for path in folder.glob("*/program.cubin")]
    return {"folder": str(folder), "entries": len(cubins), "bytes": sum(cubins)}


def _modes() -> dict[str, dict[str, Any]]:
    from clusterfusion.engine import MODES

    return {name: dataclasses.asdict(mode) for name, mode in MODES.items()}


def _lines(gathered: dict[str, Any]) -> list[str]:
    def section(title: str, rows: dict[str, str]) -> list[str]:
        width = max(map(len, rows))
        return [title, *(f"  {name.ljust(width)}  {value}" for name, value in rows.items()), ""]

    lines = section("versions", {name: version or "not installed" for name, version in gathered["versions"].items()})
    lines += section("kernels", {"compiler": gathered["compiler"], "cache": _describe_cache(gathered["kernel_cache"])})
    for index, gpu in enumerate(gathered["gpus"]):
        lines += section(f"GPU {index}: {gpu['name']}", _describe_gpu(gpu))
    if gathered["gpu_trouble"]:
        lines += section("GPU", {"none": gathered["gpu_trouble"]})
    lines += section(
        "modes",
        {name: f"{mode['launch']}; needs {mode['needs']}" for name, mode in gathered["modes"].items()},
    )
    return lines[:-1]


def _describe_cache(cache: dict[str, Any]) -> str:
    if cache["folder"] is None:
        return "in memory only: there is no home folder"
    return f"{cache['folder']} ({cache['entries']} programs, {cache['bytes'] / 1e6:.1f} MB)"


def _describe_gpu(gpu: dict[str, Any]) -> dict[str, str]:
    clusters = ", ".join(f"{count} of {size} CTAs" for size, count in gpu["resident_clusters"].items())
    return {
        "compute capability": ".".join(map(str, gpu["compute_capability"])),
        "memory": f"{gpu['free_bytes'] / 1e9:.1f} GB free of {gpu['memory_bytes'] / 1e9:.1f}",
        "multiprocessors": str(gpu["multiprocessors"]),
        "shared memory": f"{gpu['shared_bytes_per_block']} bytes a block",
        "L2 cache": f"{gpu['l2_bytes'] / 1e6:.0f} MB",
        "resident clusters": f"{clusters} (one CTA a multiprocessor)" if clusters else "none: no cluster launch",
    }
