"""NVRTC and the headers that the kernels need, wherever this machine has them."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from clusterfusion.errors import DeviceError

INSTALL_HINT = "pip install clusterfusion-plus"

# What proves that a folder has the headers we include: libcu++, and the 16-bit float types.
_LIBCUXX_HEADER = "cuda/ptx"
_FLOAT16_HEADER = "cuda_fp16.h"


@dataclass(frozen=True)
class Toolchain:
    """A compiler and its headers. `identity` holds everything about it that can change what it compiles."""

    nvrtc_version: str
    cccl_version: str
    cuda_header_version: str
    include_paths: tuple[Path, ...]

    @property
    def identity(self) -> str:
        """Part of the cache key. Folders are left out: the same versions elsewhere give the same code."""
        return f"nvrtc {self.nvrtc_version}, cccl {self.cccl_version}, cuda headers {self.cuda_header_version}"


@functools.lru_cache(maxsize=1)
def find_toolchain() -> Toolchain:
    """NVRTC through cuda-core, and the first folders that hold its headers: pip's, CUDA_HOME's, /usr/local/cuda's.

    Raises DeviceError, with what is missing, where it was looked for and how to install it. Needs no GPU.
    """
    libcuxx = _first_with(_LIBCUXX_HEADER, "libcu++ (CCCL) headers", "nvidia-cuda-cccl")
    float16 = _first_with(_FLOAT16_HEADER, "CUDA runtime headers", "nvidia-cuda-runtime")
    return Toolchain(
        nvrtc_version=_nvrtc_version(),
        cccl_version=_macro(libcuxx / "cuda/std/__cccl/version.h", "CCCL_VERSION"),
        cuda_header_version=_macro(float16 / "cuda_runtime_api.h", "CUDART_VERSION"),
        include_paths=(libcuxx, float16) if libcuxx != float16 else (libcuxx,),
    )


def include_candidates() -> Iterator[Path]:
    """Folders in which CUDA headers may lie, best first: headers from pip match an NVRTC from pip."""
    roots: list[Path] = []
    spec = importlib.util.find_spec("nvidia")
    for location in (spec.submodule_search_locations or []) if spec else []:
        roots.append(Path(location) / "cu13")
    roots += [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    roots.append(Path("/usr/local/cuda"))
    for root in roots:
        yield root / "include" / "cccl"
        yield root / "include"


def _first_with(header: str, what: str, package: str) -> Path:
    candidates = list(include_candidates())
    for folder in candidates:
        if (folder / header).is_file():
            return folder
    raise DeviceError(
        f"no {what}: <{header}> is in none of {', '.join(str(folder) for folder in candidates)}. Install the pip "
        f"package {package} (which {INSTALL_HINT} brings), or set CUDA_HOME to a CUDA 13 toolkit"
    )


def _nvrtc_version() -> str:
    try:
        import cuda.core  # noqa: F401 - what compiles; the version is asked of NVRTC itself
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise DeviceError(f"compiling kernels needs cuda-core and cuda-bindings ({error}): {INSTALL_HINT}") from error
    try:
        _, major, minor = nvrtc.nvrtcVersion()
    except Exception as error:  # the loader's own exception types differ between versions
        raise DeviceError(f"the NVRTC library cannot be loaded ({error}): {INSTALL_HINT}") from error
    return f"{major}.{minor}"


def _macro(header: Path, name: str) -> str:
    try:
        match = re.search(rf"^\s*#\s*define\s+{name}\s+(\d+)", header.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        match = None
    return match.group(1) if match else "unknown"
