"""Host twin of `cuda/programs/read_ceiling.cu`: its two instances, and their prepared launches."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Literal, get_args

from clusterfusion.jit.compiler import KernelSource
from clusterfusion.jit.device import device_limits
from clusterfusion.jit.launch import LaunchShape, load_kernel

PROGRAM = "programs/read_ceiling.cu"
ALIGNMENT = 16  # bytes, of the data's address and size

Variant = Literal["bulk copies", "loads"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)

WARPS = 8  # consumers of the ring
STAGE_BYTES = 8192
MAX_STAGES = 24  # 192 KB; from 64 KB on the depth makes no difference to a stream that waits for nobody
_STATIC_SHARED_BYTES = 1024  # barriers and the warps' words, with room
_LOAD_THREADS = 512
_LOAD_CTAS = 2  # a multiprocessor


class ReadArguments(ctypes.Structure):
    """The kernel's struct of the same name, field for field. `words` has room for `ctas(...)` 32-bit words."""

    __slots__ = ()  # a name that is no field is an error
    _fields_ = (("data", ctypes.c_void_p), ("bytes", ctypes.c_int64), ("words", ctypes.c_void_p))


def ring_stages(shared_bytes_per_block: int) -> int:
    """Stages of the ring on a GPU with so much shared memory a block: a multiple of WARPS, at most MAX_STAGES."""
    return min(MAX_STAGES, (shared_bytes_per_block - _STATIC_SHARED_BYTES) // STAGE_BYTES // WARPS * WARPS)


def ctas(variant: Variant, multiprocessors: int) -> int:
    """CTAs of a launch, each of which leaves one word."""
    return multiprocessors * (_LOAD_CTAS if variant == "loads" else 1)


def instance(variant: Variant, stages: int) -> str:
    """The C++ name expression of a variant's kernel; `stages` matters to the ring alone."""
    if variant == "loads":
        return "clusterfusion::read_by_loads"
    return f"clusterfusion::read_by_bulk_copies<{stages}, {WARPS}>"


def read_source(stages: int) -> KernelSource:
    """Both variants, compiled together."""
    return KernelSource(PROGRAM, tuple(instance(variant, stages) for variant in VARIANTS))


def launch_shape(variant: Variant, stages: int, multiprocessors: int) -> LaunchShape:
    if variant == "loads":
        return LaunchShape(clusters=ctas(variant, multiprocessors), threads=_LOAD_THREADS)
    return LaunchShape(
        clusters=ctas(variant, multiprocessors), threads=(WARPS + 1) * 32, dynamic_shared_bytes=stages * STAGE_BYTES
    )


def prepare(variant: Variant, arguments: ReadArguments, device_index: int) -> Callable[[], None]:
    """A launch that reads `arguments.bytes` bytes once, to be made as often as wanted, on PyTorch's current stream.

    Raises DeviceError on a GPU that is not supported, CompileError as load_kernel does.
    """
    limits = device_limits(device_index)
    stages = ring_stages(limits.shared_bytes_per_block)
    kernel = load_kernel(read_source(stages), instance(variant, stages), device_index)
    return kernel.prepare(launch_shape(variant, stages, limits.multiprocessors), arguments)
