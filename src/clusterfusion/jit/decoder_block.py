"""Host twin of `cuda/programs/decoder_block.cu`: the instance a plan needs, its arguments, and its prepared launches."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from clusterfusion.jit.compiler import KernelSource
from clusterfusion.jit.launch import LaunchShape, load_kernel
from clusterfusion.jit.tensor_map import TensorMap, encode_tensor_map
from clusterfusion.plan import BlockPlan
from clusterfusion.plan.block import Segment

if TYPE_CHECKING:
    import torch

PROGRAM = "programs/decoder_block.cu"
ERROR_WORDS = 5  # of the kernel's error record

ElementType = Literal["float16", "bfloat16", "float32"]
_CPP_TYPES: dict[str, str] = {"float16": "__half", "bfloat16": "__nv_bfloat16", "float32": "float"}
_POINTER, _INT64 = ctypes.c_void_p, ctypes.c_int64


class LayerTensors(ctypes.Structure):
    """One layer's weights, as addresses on the device; None is null. Where q, k and v are one matrix, `q_weight` and `q_bias`
    are all of it."""

    __slots__ = ()  # a name that is no field is an error
    _fields_ = tuple(
        (name, _POINTER)
        for name in (
            *("norm1_weight", "norm1_bias", "norm2_weight", "norm2_bias"),
            *("q_weight", "q_bias", "k_weight", "k_bias", "v_weight", "v_bias", "o_weight", "o_bias"),
            *("gate_weight", "gate_bias", "up_weight", "up_bias", "down_weight", "down_bias"),
        )
    )


class KvCache(ctypes.Structure):
    """Where keys and values lie, of one layer or of all. Strides in elements."""

    __slots__ = ()  # a name that is no field is an error
    _fields_ = (
        ("k_cache", _POINTER),
        ("v_cache", _POINTER),
        ("k_new", _POINTER),
        ("v_new", _POINTER),
        ("layer_stride", _INT64),
        ("head_stride", _INT64),
        ("token_stride", _INT64),
        ("max_len", _INT64),
    )


class Workspace(ctypes.Structure):
    """What launches over any layer of a model share."""

    __slots__ = ()  # a name that is no field is an error
    _fields_ = (
        ("cos", _POINTER),
        ("sin", _POINTER),
        ("table_stride", _INT64),
        ("qkv", _POINTER),
        ("partials", _POINTER),
        ("h", _POINTER),
        ("counters", _POINTER),
        ("error", _POINTER),
        ("eps", ctypes.c_float),
        ("second_angles", ctypes.c_int32),
    )


class LayerArguments(ctypes.Structure):
    """The kernel's struct of the same name, field for field, as are the ones above. Addresses are device addresses."""

    __slots__ = ()  # a name that is no field is an error
    _fields_ = (
        ("k_map", TensorMap),
        ("v_map", TensorMap),
        ("layer", LayerTensors),
        ("cache", KvCache),
        ("workspace", Workspace),
        ("position", _POINTER),
        ("x", _POINTER),
        ("out", _POINTER),
        ("middle", _POINTER),
        ("_padding", ctypes.c_byte * 72),  # to a multiple of a tensor map's alignment
    )


def block_source(plan: BlockPlan, weight_type: ElementType, x_type: ElementType) -> KernelSource:
    """The fused instance and those of the split form, compiled together."""
    return KernelSource(PROGRAM, tuple(instance(plan, weight_type, x_type, s) for s in ("whole", *plan.segments)))


def instance(plan: BlockPlan, weight_type: ElementType, x_type: ElementType, segment: Segment) -> str:
    """The C++ name expression of one segment's kernel."""
    return f"clusterfusion::decoder_block<{block_shape(plan, weight_type, x_type)}, clusterfusion::Segment::{segment}>"


def block_shape(plan: BlockPlan, weight_type: ElementType, x_type: ElementType) -> str:
    """The C++ type that carries a plan."""
    c = plan.config
    activation = {"gelu": "gelu_erf", "gelu_tanh": "gelu_tanh", "silu": "silu"}[c.activation]
    sizes = (c.hidden_size, c.intermediate_size, c.num_heads, c.num_kv_heads, c.head_dim, c.rotary.dim)
    partition = (plan.ctas, plan.cluster_size, plan.queries, plan.splits, plan.vector_warps, plan.warps)
    ring = (plan.stages, plan.tile_bytes, plan.stage_tiles, plan.window_stages, plan.early_stages)
    cache = (plan.fifths_before_cached, plan.head_groups, plan.tile_tokens, plan.shared_bytes)
    shape = ", ".join(
        (
            _CPP_TYPES[weight_type],
            _CPP_TYPES[x_type],
            *map(str, sizes),
            f"clusterfusion::Pairing::{'neighbours' if c.rotary.neighbours else 'halves'}",
            f"clusterfusion::Norm::{c.norm}",
            f"clusterfusion::Activation::{activation}",
            *("true" if flag else "false" for flag in (c.gated_mlp, c.fused_qkv, c.parallel_residual, plan.up_first)),
            *map(str, partition + ring + cache),
        )
    )
    return f"clusterfusion::BlockShape<{shape}>"


def launch_shape(plan: BlockPlan, *, cooperative: bool) -> LaunchShape:
    """The grid of every program over a BlockPlan."""
    return LaunchShape(
        clusters=plan.ctas // plan.cluster_size,
        threads=plan.threads,
        cluster_size=plan.cluster_size,
        dynamic_shared_bytes=plan.shared_bytes,
        cooperative=cooperative,
    )


def require_room(plan: BlockPlan, weight_type: ElementType, device_index: int) -> None:
    """Raise DeviceError unless the device holds all CTAs of a fused layer, between float32 residuals, together. Compiles the
    kernel, for the steps to come."""
    name = instance(plan, weight_type, "float32", "whole")
    kernel = load_kernel(block_source(plan, weight_type, "float32"), name, device_index)
    kernel.require_room(launch_shape(plan, cooperative=True))


def prepare(
    plan: BlockPlan,
    weight_type: ElementType,
    x_type: ElementType,
    segment: Segment,
    arguments: LayerArguments,
    device_index: int,
    *,
    overlaps_previous: bool = False,
) -> Callable[[], None]:
    """A launch of one segment, to be made as often as wanted, on PyTorch's current stream. `whole` is cooperative.

    With `overlaps_previous` it may start before the launch ahead of it has ended, if that one does not write position,
    weights or cached tokens. Raises DeviceError when the device cannot hold all CTAs of a cooperative launch, CompileError as load_kernel does.
    """
    kernel = load_kernel(
        block_source(plan, weight_type, x_type), instance(plan, weight_type, x_type, segment), device_index
    )
    shape = launch_shape(plan, cooperative=segment == "whole")
    return kernel.prepare(shape, arguments, overlaps_previous=overlaps_previous)


def cache_map(plan: BlockPlan, weight_type: ElementType, cache: torch.Tensor) -> ctypes.Array[ctypes.c_byte]:
    """The tensor map of a layer's keys or values [kv_heads, max_len, head_dim], of any strides between heads and tokens."""
    heads, max_len, head_dim = cache.shape
    head_stride, token_stride, _ = (stride * cache.element_size() for stride in cache.stride())
    return TensorMap.from_buffer_copy(
        encode_tensor_map(
            weight_type,
            cache.data_ptr(),
            (head_dim, max_len, heads),
            (token_stride, head_stride),
            (head_dim, plan.tile_tokens, 1),
        )
    )
