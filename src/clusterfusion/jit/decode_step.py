"""Host twin of `cuda/programs/decode_step.cu`: the instance a plan needs, its arguments, and its prepared launch."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

from clusterfusion.errors import UnsupportedModelError
from clusterfusion.jit.compiler import KernelSource
from clusterfusion.jit.decoder_block import ElementType, KvCache, LayerTensors, Workspace, block_shape, launch_shape
from clusterfusion.jit.launch import load_kernel
from clusterfusion.jit.tensor_map import TensorMap
from clusterfusion.plan import BlockPlan

PROGRAM = "programs/decode_step.cu"
NO_TOKEN = -1  # in place of a token: the one that the last step chose; as a choice: the logits are not finite
STATE_WORDS = 4  # 32-bit words of the kernel's StepState
CANDIDATE_WORDS = 4  # 32-bit words of a Candidate, one a CTA
NO_FAULT = -1
MOST_ARGUMENT_BYTES = 32764  # of a launch, since CUDA 12.1
_POINTER, _INT32 = ctypes.c_void_p, ctypes.c_int32


@functools.cache
def step_arguments_type(layers: int) -> Any:
    """The kernel's struct StepArguments for so many layers, field for field, as a ctypes Structure."""

    fields: list[tuple[str, Any]] = [
        ("k_map", TensorMap),
        ("v_map", TensorMap),
        ("workspace", Workspace),
        ("cache", KvCache),
        *((name, _POINTER) for name in ("embedding", "norm_weight", "norm_bias", "lm_head")),
        *((name, _POINTER) for name in ("marked", "logits", "state", "candidates", "chosen", "trace")),
        ("temperature", ctypes.c_double),
        ("seed", ctypes.c_uint64),
        ("vocabulary", _INT32),
        ("position", _INT32),
        ("token", _INT32),
        ("first_step", ctypes.c_uint32),
        ("steps", _INT32),
        ("layers", LayerTensors * layers),
    ]
    size = ctypes.sizeof(type("Unpadded", (ctypes.Structure,), {"_fields_": fields}))
    fields.append(("_padding", ctypes.c_byte * (-size % 128)))  # to a multiple of a tensor map's alignment
    return type("StepArguments", (ctypes.Structure,), {"__slots__": (), "_fields_": fields})


def step_source(
    plan: BlockPlan, weight_type: ElementType, *, trace: bool = False, fault_cta: int = NO_FAULT
) -> KernelSource:
    return KernelSource(PROGRAM, (instance(plan, weight_type, trace=trace, fault_cta=fault_cta),))


def instance(plan: BlockPlan, weight_type: ElementType, *, trace: bool = False, fault_cta: int = NO_FAULT) -> str:
    """The C++ name expression of the kernel. `fault_cta`, for tests, is a CTA that stops arriving."""
    shape = block_shape(plan, weight_type, "float32")
    return f"clusterfusion::decode_step<{shape}, {plan.config.num_layers}, {str(trace).lower()}, {fault_cta}>"


def require_room(plan: BlockPlan, weight_type: ElementType, device_index: int) -> None:
    """Raise DeviceError unless the device holds all CTAs of the step together, UnsupportedModelError if one launch cannot take the
    addresses of so many layers. Compiles the kernel, for the steps to come."""
    require_arguments_fit(plan.config.num_layers)
    kernel = load_kernel(step_source(plan, weight_type), instance(plan, weight_type), device_index)
    kernel.require_room(launch_shape(plan, cooperative=True))


def require_arguments_fit(layers: int) -> None:
    """Raise UnsupportedModelError if the arguments of a step of so many layers are more than a launch may have."""

    def fit(count: int) -> bool:
        return ctypes.sizeof(step_arguments_type(count)) <= MOST_ARGUMENT_BYTES

    if not fit(layers):
        most = next(count for count in range(MOST_ARGUMENT_BYTES // ctypes.sizeof(LayerTensors), 0, -1) if fit(count))
        raise UnsupportedModelError(f"num_layers is {layers}; a launch of whole steps takes the addresses of {most}")


def prepare_step(
    plan: BlockPlan,
    weight_type: ElementType,
    arguments: ctypes.Structure,
    device_index: int,
    *,
    trace: bool = False,
    fault_cta: int = NO_FAULT,
) -> Callable[[], None]:
    """A cooperative launch of as many whole steps as the arguments say, to be made as often as wanted, on PyTorch's current stream; each may start
    while the one before it ends. Raises DeviceError and CompileError as `decoder_block.prepare` does."""
    kernel = load_kernel(
        step_source(plan, weight_type, trace=trace, fault_cta=fault_cta),
        instance(plan, weight_type, trace=trace, fault_cta=fault_cta),
        device_index,
    )
    return kernel.prepare(launch_shape(plan, cooperative=True), arguments, overlaps_previous=True)
