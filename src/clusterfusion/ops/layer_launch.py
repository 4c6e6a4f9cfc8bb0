"""What a launch of the decoder-layer program needs beside the plan: scratch memory, an error record, and the arguments."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from clusterfusion.architecture import DecoderConfig
from clusterfusion.errors import DeviceError, UnsupportedModelError
from clusterfusion.jit.decoder_block import (
    ERROR_WORDS,
    ElementType,
    KvCache,
    LayerArguments,
    LayerTensors,
    Workspace,
    cache_map,
    prepare,
)
from clusterfusion.jit.device import architecture_of, device_limits
from clusterfusion.plan import BlockPlan, PlanLimits, plan_block
from clusterfusion.plan.block import Segment, require_dealt_out
from clusterfusion.weights import LayerWeights

ALIGNMENT = 16  # bytes; of whatever bulk copies read
ELEMENT_TYPES: dict[torch.dtype, ElementType] = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
}
_DEPENDENCIES = (
    *("q, k and v", "attention", "the MLP's hidden vector", "the middle residual", "its cluster"),
    *("the residual vector", "the choice of the token"),
)
_BAD_POSITION = len(_DEPENDENCIES) + 1
_CLAIM = 4  # the word of an error record that whoever writes it has set first

# Held while a CUDA graph is captured: entering a capture synchronises the device, which another capture forbids.
CAPTURE_LOCK = threading.Lock()


def plan_for(config: DecoderConfig, device_index: int) -> BlockPlan:
    """The plan of a model's layers on a GPU. Raises UnsupportedModelError or DeviceError saying what rules it out."""
    # What no plan depends on is levelled: a cache that grows does not make a new plan.
    levelled = dataclasses.replace(config, max_position=1, norm_eps=1.0, vocab_size=1, num_layers=1)
    plan = _plan_for(levelled, device_index)
    require_dealt_out(config, plan.limits.name, plan.ctas)
    return dataclasses.replace(plan, config=config)


@functools.lru_cache(maxsize=64)
def _plan_for(config: DecoderConfig, device_index: int) -> BlockPlan:
    limits = device_limits(device_index)
    architecture_of(limits.compute_capability, limits.name)
    facts = (limits.name, limits.multiprocessors, limits.shared_bytes_per_block, limits.compute_capability)
    return plan_block(config, PlanLimits(*facts))


class ErrorRecord:
    """Where launches say that they gave up. In host memory that the GPU writes to: looking costs no synchronisation."""

    @torch.inference_mode(False)
    def __init__(self) -> None:
        self._words = torch.zeros(ERROR_WORDS, dtype=torch.int32, device="cpu", pin_memory=True)

    @property
    def address(self) -> int:
        return self._words.data_ptr()

    def check(self, way_out: str, *, forget: bool = False) -> None:
        """Raise DeviceError if a launch that has ended gave up; the message ends in `way_out`. The record is of the first
        that did; it may stand for later ones too. `forget`: raise only once."""
        which, cta, expected, seen, *_ = self._words.tolist()
        if which and forget:
            for word in (3, 2, 1, 0, _CLAIM):  # the claim last: until then nobody writes a record
                self._words[word] = 0
        if which == _BAD_POSITION:
            raise DeviceError(
                f"an earlier decode step was asked for position {seen} of a cache of {expected} tokens; it did nothing, and "
                f"its output is NaN. {way_out}"
            )
        if which:
            raise DeviceError(
                f"an earlier decode step gave up waiting for {_DEPENDENCIES[which - 1]} (CTA {cta}, epoch, version or count {expected}, "
                f"seen or missing {seen:#x}); results since then are wrong. {way_out}"
            )


class LayerScratch:
    """Device memory of one layer launch at a time: `plan.scratch_bytes`. Zero, as before a first launch."""

    @torch.inference_mode(False)  # written in place later, in whatever mode the caller is in then
    def __init__(self, plan: BlockPlan, weight_dtype: torch.dtype, device: torch.device) -> None:
        sizes = plan.scratch_sizes
        self.buffer = torch.zeros(sum(sizes.values()), dtype=torch.uint8, device=device)
        self.tensors: dict[str, Tensor] = {}
        start = 0
        for name, size in sizes.items():
            self.tensors[name] = self.buffer[start : start + size]
            start += size
        # What callers may look at.
        self.tensors["middle"] = self.tensors["middle"].view(torch.float32)[: plan.config.hidden_size]
        self.tensors["h"] = self.tensors["h"].view(weight_dtype)[: plan.config.intermediate_size]
        self.tensors["counters"] = self.tensors["counters"].view(torch.int32)


@dataclasses.dataclass(frozen=True)
class RotaryTables:
    """cos and sin, float32, a row a position, `row_stride` elements apart (0: one row, for the current position).

    A row holds an angle for each pair of dimensions. With `second_angles` the second dimensions of the pairs have angles of
    their own: those of pairs (i, i + rotary_dim / 2) start there in the row, those of neighbours lie between the others.
    """

    cos: Tensor
    sin: Tensor
    row_stride: int
    second_angles: int = 0


@dataclasses.dataclass(frozen=True)
class LayerBuffers:
    """Where a launch reads and writes beside weights: all on the GPU, all of the shapes that LayerArguments gives."""

    x: Tensor
    out: Tensor
    k_cache: Tensor  # [kv_heads, max_len, head_dim], any strides between heads and tokens
    v_cache: Tensor
    position: Tensor  # [1], int32
    tables: RotaryTables
    k_new: Tensor | None = None
    v_new: Tensor | None = None


def layer_arguments(
    plan: BlockPlan, weights: LayerWeights, buffers: LayerBuffers, scratch: LayerScratch, error: ErrorRecord
) -> LayerArguments:
    """The kernel's arguments. Raises UnsupportedModelError for tensors that cannot be read where they lie.

    They hold addresses: the caller keeps the tensors alive for as long as it launches.
    """
    dtype = ELEMENT_TYPES[weights.o_weight.dtype]
    k, v = buffers.k_cache, buffers.v_cache
    require_streamable_cache(k, v)
    return LayerArguments(
        k_map=cache_map(plan, dtype, k),
        v_map=cache_map(plan, dtype, v),
        layer=layer_tensors(weights),
        cache=kv_cache(k, v, buffers.k_new, buffers.v_new),
        workspace=workspace(plan, buffers.tables, scratch, error),
        position=buffers.position.data_ptr(),
        x=buffers.x.data_ptr(),
        out=buffers.out.data_ptr(),
        middle=scratch.tensors["middle"].data_ptr(),
    )


def layer_tensors(weights: LayerWeights) -> LayerTensors:
    """The addresses of a layer's weights. Raises UnsupportedModelError for one that cannot be read where it lies."""
    return LayerTensors(
        norm1_weight=address("input_norm_weight", weights.input_norm_weight),
        norm1_bias=address("input_norm_bias", weights.input_norm_bias),
        norm2_weight=address("post_norm_weight", weights.post_norm_weight),
        norm2_bias=address("post_norm_bias", weights.post_norm_bias),
        **_qkv_addresses(weights),
        o_weight=address("o_weight", weights.o_weight),
        o_bias=address("o_bias", weights.o_bias),
        gate_weight=address("gate_weight", weights.gate_weight),
        gate_bias=address("gate_bias", weights.gate_bias),
        up_weight=address("up_weight", weights.up_weight),
        up_bias=address("up_bias", weights.up_bias),
        down_weight=address("down_weight", weights.down_weight),
        down_bias=address("down_bias", weights.down_bias),
    )


def _qkv_addresses(weights: LayerWeights) -> dict[str, int | None]:
    if weights.qkv_weight is not None:
        fused = address("qkv_weight", weights.qkv_weight), address("qkv_bias", weights.qkv_bias)
        return dict(zip(("q_weight", "q_bias"), fused, strict=True))
    names = [f"{which}_{kind}" for which in "qkv" for kind in ("weight", "bias")]
    return {name: address(name, getattr(weights, name)) for name in names}


def kv_cache(k: Tensor, v: Tensor, k_new: Tensor | None = None, v_new: Tensor | None = None) -> KvCache:
    """Where keys and values [kv_heads, max_len, head_dim] of a layer, or of all with a dimension in front, lie. Both have the
    same strides."""
    *layers, head_stride, token_stride, _ = k.stride()
    return KvCache(
        k_cache=k.data_ptr(),
        v_cache=v.data_ptr(),
        k_new=None if k_new is None else k_new.data_ptr(),
        v_new=None if v_new is None else v_new.data_ptr(),
        layer_stride=layers[0] if layers else 0,
        head_stride=head_stride,
        token_stride=token_stride,
        max_len=k.shape[-2],
    )


def workspace(plan: BlockPlan, tables: RotaryTables, scratch: LayerScratch, error: ErrorRecord) -> Workspace:
    return Workspace(
        cos=tables.cos.data_ptr(),
        sin=tables.sin.data_ptr(),
        table_stride=tables.row_stride,
        second_angles=tables.second_angles,
        error=error.address,
        eps=plan.config.norm_eps,
        **{name: scratch.tensors[name].data_ptr() for name in ("qkv", "partials", "h", "counters")},
    )


def prepare_layer(
    plan: BlockPlan,
    weight_dtype: torch.dtype,
    x_dtype: torch.dtype,
    segments: tuple[Segment, ...],
    arguments: LayerArguments,
    device_index: int,
    *,
    follows_layer: bool = False,
) -> list[Callable[[], None]]:
    """The launches of `segments`, in order. Each starts while the one before it ends; the first one only with
    `follows_layer`: then what is ahead of it on the stream must be such a launch too."""
    return [
        prepare(
            plan,
            ELEMENT_TYPES[weight_dtype],
            ELEMENT_TYPES[x_dtype],
            segment,
            arguments,
            device_index,
            overlaps_previous=follows_layer or place > 0,
        )
        for place, segment in enumerate(segments)
    ]


def require_streamable_cache(k: Tensor, v: Tensor) -> None:
    """Raise UnsupportedModelError unless a layer's K/V cache can be fetched by tensor copies, keys and values alike."""
    for name, tensor in (("k_cache", k), ("v_cache", v)):
        strides, pointer = tensor.stride(), tensor.data_ptr()
        dense = strides[-1] == 1 and all(stride * tensor.element_size() % ALIGNMENT == 0 for stride in strides[:-1])
        if not dense or strides != k.stride():
            raise UnsupportedModelError(
                f"{name} of strides {strides} cannot be streamed: heads must be dense, all strides multiples of "
                f"{ALIGNMENT} bytes, keys and values alike"
            )
        if pointer % ALIGNMENT:
            raise UnsupportedModelError(
                f"{name} at address {pointer:#x} cannot be streamed: it must start at a multiple of {ALIGNMENT} bytes"
            )


def address(name: str, tensor: Tensor | None) -> int | None:
    """Of a weight tensor, dense and aligned. Raises UnsupportedModelError for one that is not."""
    if tensor is None:
        return None
    pointer = tensor.data_ptr()
    if not tensor.is_contiguous():
        raise UnsupportedModelError(
            f"{name} of shape {list(tensor.shape)} has strides {tensor.stride()}; the kernels read dense rows: "
            "make it contiguous, or use the reference"
        )
    if pointer % ALIGNMENT:
        raise UnsupportedModelError(
            f"{name} of shape {list(tensor.shape)} lies at an address that is no multiple of {ALIGNMENT} bytes; "
            "clone it, or use the reference"
        )
    return pointer
