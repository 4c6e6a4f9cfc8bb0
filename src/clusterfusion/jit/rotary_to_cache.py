"""Host twin of `cuda/programs/rotary_to_cache.cu`: the instance a model needs, its arguments, and its prepared launch."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from clusterfusion.architecture import DecoderConfig
from clusterfusion.jit.cluster_norm import ElementType
from clusterfusion.jit.compiler import KernelSource
from clusterfusion.jit.device import device_limits
from clusterfusion.jit.launch import LaunchShape, load_kernel

PROGRAM = "programs/rotary_to_cache.cu"
THREADS = 256
CTAS_A_MULTIPROCESSOR = 8  # as many as it holds

_CPP_TYPES: dict[str, str] = {"float16": "__half", "bfloat16": "__nv_bfloat16"}
_POINTER, _INT64 = ctypes.c_void_p, ctypes.c_int64


class RotaryToCacheArguments(ctypes.Structure):
    """The kernel's struct of the same name, field for field. Strides in elements."""

    __slots__ = ()  # a name that is no field is an error
    _fields_ = (
        *((name, _POINTER) for name in ("q", "k", "v", "k_cache", "v_cache", "cos", "sin")),
        *((name, _INT64) for name in ("q_token_stride", "q_head_stride", "kv_token_stride", "kv_head_stride")),
        *((name, _INT64) for name in ("cache_head_stride", "cache_token_stride")),
        ("tokens", ctypes.c_int32),
    )


def rotary_source(config: DecoderConfig, element_type: ElementType) -> KernelSource:
    return KernelSource(PROGRAM, (instance(config, element_type),))


def instance(config: DecoderConfig, element_type: ElementType) -> str:
    """The C++ name expression of the kernel."""
    shape = (config.num_heads, config.num_kv_heads, config.head_dim, config.rotary.dim)
    return f"clusterfusion::rotary_to_cache<{', '.join((_CPP_TYPES[element_type], *map(str, shape)))}>"


def launch_shape(multiprocessors: int) -> LaunchShape:
    """For any number of tokens."""
    return LaunchShape(clusters=multiprocessors * CTAS_A_MULTIPROCESSOR, threads=THREADS)


def prepare(
    config: DecoderConfig, element_type: ElementType, arguments: RotaryToCacheArguments, device_index: int
) -> Callable[[], None]:
    """A launch to be made as often as wanted, on PyTorch's current stream, with what `arguments` holds then. Addresses are
    multiples of 16 bytes, strides of head_dim.

    Raises DeviceError on a GPU that is not supported, CompileError as load_kernel does.
    """
    kernel = load_kernel(rotary_source(config, element_type), instance(config, element_type), device_index)
    return kernel.prepare(launch_shape(device_limits(device_index).multiprocessors), arguments)
