"""Host twin of `cuda/programs/residual_norms.cu`: the instance a width needs, its arguments, and its prepared launch."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

from clusterfusion.jit.cluster_norm import ElementType, Norm
from clusterfusion.jit.compiler import KernelSource
from clusterfusion.jit.device import device_limits
from clusterfusion.jit.launch import LaunchShape, load_kernel

PROGRAM = "programs/residual_norms.cu"
MOST_DELTAS = 2
MOST_NORMS = 2
MAX_HIDDEN = 16384

_CPP_TYPES: dict[str, str] = {"float16": "__half", "bfloat16": "__nv_bfloat16"}
_ITEMS = (8, 16)  # elements a thread, the first of them with which a CTA of MAX_THREADS holds a row
_MAX_THREADS = 1024
_VECTOR = 8  # 16-bit elements in the widest access of a thread
_WARP = 32
_THREADS_A_MULTIPROCESSOR = 2048
_POINTER, _INT32 = ctypes.c_void_p, ctypes.c_int32


class NormOfRows(ctypes.Structure):
    """The kernel's struct of the same name, as is the one below. `out` is null where there is no such norm."""

    __slots__ = ()  # a name that is no field is an error
    _fields_ = (("weight", _POINTER), ("bias", _POINTER), ("out", _POINTER))


class ResidualNormsArguments(ctypes.Structure):
    __slots__ = ()  # a name that is no field is an error
    _fields_ = (
        ("x", _POINTER),
        ("delta", _POINTER * MOST_DELTAS),
        ("norm", NormOfRows * MOST_NORMS),
        ("rows", _INT32),
        ("fresh", _INT32),
        ("eps", ctypes.c_float),
    )


@dataclass(frozen=True)
class ResidualNorms:
    """One instance of the program. `threads` each hold `items` elements of a row, in vectors of `vector_width`."""

    norm: Norm
    element_type: ElementType
    hidden: int
    threads: int
    items: int
    vector_width: int

    @property
    def instance(self) -> str:
        return (
            f"clusterfusion::residual_norms<{_CPP_TYPES[self.element_type]}, clusterfusion::Norm::{self.norm}, "
            f"{self.hidden}, {self.threads}, {self.items}, {self.vector_width}>"
        )

    @property
    def source(self) -> KernelSource:
        return KernelSource(PROGRAM, (self.instance,))

    def launch_shape(self, multiprocessors: int) -> LaunchShape:
        """For any number of rows: as many CTAs as fit on the GPU together, if registers allow it."""
        return LaunchShape(
            clusters=multiprocessors * max(_THREADS_A_MULTIPROCESSOR // self.threads, 1), threads=self.threads
        )


def choose_residual_norms(norm: Norm, hidden: int, element_type: ElementType) -> ResidualNorms:
    """The instance for rows of `hidden` 16-bit elements, at most MAX_HIDDEN."""
    items = next(items for items in _ITEMS if items * _MAX_THREADS >= hidden)
    threads = -(-hidden // (items * _WARP)) * _WARP
    return ResidualNorms(norm, element_type, hidden, threads, items, 1 if hidden % _VECTOR else _VECTOR)


def prepare(chosen: ResidualNorms, arguments: ResidualNormsArguments, device_index: int) -> Callable[[], None]:
    """A launch to be made as often as wanted, on PyTorch's current stream, with what `arguments` holds then. Addresses are
    multiples of 16 bytes.

    Raises DeviceError on a GPU that is not supported, CompileError as load_kernel does.
    """
    kernel = load_kernel(chosen.source, chosen.instance, device_index)
    return kernel.prepare(chosen.launch_shape(device_limits(device_index).multiprocessors), arguments)
