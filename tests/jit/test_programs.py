"""The programs on the collectives compile for three architectures without a GPU, and use what is stated of an SM."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

import clusterfusion
from clusterfusion.errors import CompileError, DeviceError
from clusterfusion.jit import toolchain
from clusterfusion.jit.cluster_norm import CLUSTER_SIZES, PROGRAM, ElementType, all_shapes, choose_cluster_norm
from clusterfusion.jit.collectives_probe import CollectivesProbe, probe_source
from clusterfusion.jit.compiler import ARCHITECTURES, KernelSource, compile_program
from clusterfusion.jit.sources import CUDA_ROOT

MOST_NORM_REGISTERS = 128  # 65,536 hold the 512 threads of the largest instance
MOST_PROBE_REGISTERS = 96
MOST_STATIC_SHARED_BYTES = 4096  # far under the 99 KB of a block on sm_120
PROBE_LENGTH = 33


def norm_source() -> KernelSource:
    """Both norms, every dtype, cluster size, exchange and (threads, items), each in several combinations."""
    instances = set()
    for norm in ("layer_norm", "rms_norm"):
        for number, size in enumerate(CLUSTER_SIZES):
            for at, (threads, items) in enumerate(all_shapes()):
                x_type = get_args(ElementType)[(number + at) % 3]
                chosen = choose_cluster_norm(
                    norm,  # type: ignore[arg-type]
                    min(threads * items * size, 16384),
                    x_type,
                    get_args(ElementType)[(number + 2 * at) % 3],
                    x_type if at % 2 else "float32",
                    size,
                    ("direct", "tree")[at % 2],  # type: ignore[arg-type]
                    aligned=at != 2,
                )
                instances.add(chosen.instance)
    return KernelSource(PROGRAM, tuple(sorted(instances)))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_norms_compile_without_spills(architecture: str) -> None:
    source = norm_source()
    assert len(source.instances) > 20
    for instance, used in compile_program(source, architecture).resources.items():
        assert used.spill_store_bytes == used.spill_load_bytes == used.stack_bytes == 0, instance
        assert 0 < used.registers <= MOST_NORM_REGISTERS, instance
        assert used.static_shared_bytes <= MOST_STATIC_SHARED_BYTES, instance


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_most_scalars_a_thread_compile_without_spills(architecture: str) -> None:
    """Unaligned rows of 16,384 in one CTA: the instances with the fewest registers to spare."""
    instances = tuple(
        choose_cluster_norm(norm, 16384, x_type, weight_type, x_type, 1, "direct", aligned=False).instance  # type: ignore[arg-type]
        for norm in ("layer_norm", "rms_norm")
        for x_type, weight_type in (("float16", "float16"), ("float32", "float32"), ("bfloat16", "float32"))
    )
    assert all(instance.endswith("512, 32, 1>") for instance in instances)
    for instance, used in compile_program(KernelSource(PROGRAM, instances), architecture).resources.items():
        assert used.spill_store_bytes == used.spill_load_bytes == used.stack_bytes == 0, (instance, used)
        assert 0 < used.registers <= MOST_NORM_REGISTERS, (instance, used)


def test_every_program_is_compiled_by_a_test() -> None:
    """A new program needs its test here, or a file of its own beside this one."""
    here = {"cluster_norm", "collectives_probe"}
    beside = {path.name.removeprefix("test_").removesuffix("_compiles.py") for path in Path(__file__).parent.iterdir()}
    for program in (CUDA_ROOT / "programs").glob("*.cu"):
        assert program.stem in here | beside, f"no test compiles {program.name}"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_collectives_compile_without_spills(architecture: str) -> None:
    probes = [
        CollectivesProbe("float16", PROBE_LENGTH, size, exchange, team, operator)  # type: ignore[arg-type]
        for size in CLUSTER_SIZES
        for exchange in ("direct", "tree")
        for team, operator in (("whole", "sum"), ("partial", "max"), ("whole", None))
    ]
    probes += [CollectivesProbe("float32", PROBE_LENGTH, size, "async", "partial") for size in CLUSTER_SIZES]
    resources = compile_program(probe_source(probes), architecture).resources
    assert len(resources) == len(probes)
    for probe in probes:
        used = resources[probe.instance]
        assert used.spill_store_bytes == used.spill_load_bytes == used.stack_bytes == 0, probe
        assert 0 < used.registers <= MOST_PROBE_REGISTERS, probe
        slots = {1: 1, 2: 2, 4: 4, 8: 8}[probe.cluster_size]
        if probe.exchange == "direct" and probe.operator:
            needed = 2 * slots * PROBE_LENGTH * 4
            assert needed <= used.static_shared_bytes <= needed + 64, "two inboxes of one float vector a rank"


def test_a_spill_and_a_stack_would_be_seen(tmp_path: Path) -> None:
    """The figures asserted above can be other than zero."""
    (tmp_path / "spilling.cu").write_text(
        """
        __global__ void __launch_bounds__(1024) spilling(float* out, int n) {
          float values[200];
          #pragma unroll
          for (int i = 0; i < 200; i++) values[i] = out[i * n];
          __syncthreads();
          #pragma unroll
          for (int i = 0; i < 200; i++) out[i * n] = values[199 - i] + values[i] * values[(i * 7) % 200];
        }
        """
    )
    source = KernelSource("spilling.cu", ("spilling",))
    (used,) = compile_program(source, "sm_90a", root=tmp_path).resources.values()
    assert used.spill_store_bytes > 0
    assert used.spill_load_bytes > 0
    assert used.stack_bytes > 0
    assert used.registers == 64


def test_a_compile_error_shows_the_log_and_the_line(tmp_path: Path) -> None:
    shutil.copytree(CUDA_ROOT, tmp_path / "cuda")
    header = tmp_path / "cuda" / "ops" / "norm.cuh"
    lines = header.read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("struct NormTransform"))
    lines.insert(at, "no_such_type mistake;")
    header.write_text("\n".join(lines))
    chosen = choose_cluster_norm("rms_norm", 256, "float16", "float16", "float16", 2, "direct", aligned=True)
    with pytest.raises(CompileError) as caught:
        compile_program(chosen.source, "sm_90a", root=tmp_path / "cuda")
    message = str(caught.value)
    assert f"{PROGRAM} does not compile for sm_90a" in message
    assert f"{header}:{at + 1}" in message
    assert f"> {at + 1:4d} | no_such_type mistake;" in message
    assert 'identifier "no_such_type" is undefined' in message


def test_a_missing_include_names_who_wants_it(tmp_path: Path) -> None:
    (tmp_path / "a.cu").write_text('// one\n#include "b.cuh"\n')
    from clusterfusion.jit.sources import source_closure

    with pytest.raises(CompileError, match=r"b\.cuh, included by .*a\.cu:2"):
        source_closure("a.cu", tmp_path)


def test_an_unknown_architecture_is_a_compile_error() -> None:
    chosen = choose_cluster_norm("rms_norm", 256, "float16", "float16", "float16", 1, "direct", aligned=True)
    with pytest.raises(CompileError, match="sm_999a"):
        compile_program(chosen.source, "sm_999a")


def test_missing_headers_are_a_device_error_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "include_candidates", lambda: iter([tmp_path / "include"]))
    toolchain.find_toolchain.cache_clear()
    try:
        with pytest.raises(DeviceError, match=r"cuda/ptx.*nvidia-cuda-cccl.*CUDA_HOME"):
            toolchain.find_toolchain()
    finally:
        monkeypatch.undo()
        toolchain.find_toolchain.cache_clear()
    assert toolchain.find_toolchain().include_paths


_WITHOUT_CUDA = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name == "cuda" or name.startswith("cuda."):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocker())
import torch, clusterfusion
import clusterfusion.jit.cache, clusterfusion.jit.launch, clusterfusion.jit.device, clusterfusion.ops
print(clusterfusion.rms_norm(torch.ones(2, 4), torch.ones(4), 1e-6).sum().item())
from clusterfusion.jit.toolchain import find_toolchain
try:
    find_toolchain()
except clusterfusion.DeviceError as error:
    print("DeviceError:", error)
"""


def test_everything_but_compiling_works_without_the_cuda_packages() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_CUDA],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(Path(clusterfusion.__file__).parent.parent), "PATH": ""},
    )
    assert done.returncode == 0, done.stderr
    total, error = done.stdout.strip().split("\n", 1)
    assert float(total) == pytest.approx(8.0)
    assert error.startswith("DeviceError: ")
    assert "pip install" in error
