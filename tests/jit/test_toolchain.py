"""What is said when a part of the compiler is missing, and where its headers are looked for."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import clusterfusion
from clusterfusion.errors import DeviceError
from clusterfusion.jit import toolchain
from clusterfusion.jit.compiler import KernelSource, compile_program

_WITHOUT_ONE_PACKAGE = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if (name + ".").startswith(sys.argv[1] + "."):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocker())
import clusterfusion
from clusterfusion.jit.compiler import KernelSource, compile_program
try:
    compile_program(KernelSource("programs/cluster_norm.cu", ("none",)), "sm_90a")
except clusterfusion.DeviceError as error:
    print(error)
"""


@pytest.mark.parametrize("package", ["cuda.core", "cuda.bindings"])
def test_either_package_missing_is_a_device_error_with_the_way_out(package: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_ONE_PACKAGE, package],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(Path(clusterfusion.__file__).parent.parent), "PATH": ""},
    )
    assert done.returncode == 0, done.stderr
    assert f"({package}" in done.stdout
    assert toolchain.INSTALL_HINT in done.stdout


@pytest.fixture
def fresh_toolchain() -> Iterator[None]:
    toolchain.find_toolchain.cache_clear()
    yield
    toolchain.find_toolchain.cache_clear()


@pytest.mark.usefixtures("fresh_toolchain")
def test_an_nvrtc_that_cannot_be_loaded_is_a_device_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from cuda.bindings import nvrtc

    def refuse() -> None:
        raise RuntimeError("libnvrtc.so.13: not found")

    monkeypatch.setattr(nvrtc, "nvrtcVersion", refuse)
    with pytest.raises(DeviceError, match=r"NVRTC library cannot be loaded \(libnvrtc.so.13: not found\): pip install"):
        compile_program(KernelSource("programs/cluster_norm.cu", ("none",)), "sm_90a")


@pytest.mark.usefixtures("fresh_toolchain")
def test_headers_of_a_toolkit_are_found_where_pip_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for header, text in {
        "cccl/cuda/ptx": "",
        "cccl/cuda/std/__cccl/version.h": "#define CCCL_VERSION 3002001\n",
        "cuda_fp16.h": "",
        "cuda_runtime_api.h": "#define CUDART_VERSION  13020\n",
    }.items():
        (tmp_path / "include" / header).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "include" / header).write_text(text)
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda _: None)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    found = toolchain.find_toolchain()
    assert found.include_paths == (tmp_path / "include" / "cccl", tmp_path / "include")
    assert "cccl 3002001, cuda headers 13020" in found.identity
