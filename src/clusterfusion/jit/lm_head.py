"""Host twin of `cuda/programs/lm_head.cu`: final norm and LM head, the end of a step in split, fused and graph mode."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from clusterfusion.jit.compiler import KernelSource
from clusterfusion.jit.decoder_block import ElementType, Workspace, block_shape, launch_shape
from clusterfusion.jit.launch import load_kernel
from clusterfusion.plan import BlockPlan

PROGRAM = "programs/lm_head.cu"
_POINTER = ctypes.c_void_p


class HeadArguments(ctypes.Structure):
    """The kernel's struct of the same name, field for field. x [hidden] and logits [vocabulary] are float32."""

    __slots__ = ()  # a name that is no field is an error
    _fields_ = (
        ("workspace", Workspace),
        ("norm_weight", _POINTER),
        ("norm_bias", _POINTER),
        ("lm_head", _POINTER),
        ("x", _POINTER),
        ("logits", _POINTER),
        ("vocabulary", ctypes.c_int32),
    )


def head_source(plan: BlockPlan, weight_type: ElementType) -> KernelSource:
    return KernelSource(PROGRAM, (instance(plan, weight_type),))


def instance(plan: BlockPlan, weight_type: ElementType) -> str:
    """The C++ name expression of the kernel."""
    return f"clusterfusion::lm_head<{block_shape(plan, weight_type, 'float32')}>"


def prepare_head(
    plan: BlockPlan, weight_type: ElementType, arguments: HeadArguments, device_index: int
) -> Callable[[], None]:
    """A launch that may start while the one ahead of it on the stream, a decoder layer's, still runs. Raises DeviceError
    and CompileError as `decoder_block.prepare` does."""
    kernel = load_kernel(head_source(plan, weight_type), instance(plan, weight_type), device_index)
    return kernel.prepare(launch_shape(plan, cooperative=False), arguments, overlaps_previous=True)
