"""The seed's LLaMA function over a paged K/V cache: a batch of sequences, one after another."""

from __future__ import annotations

import collections
import ctypes
import dataclasses
import itertools

import torch
from torch import Tensor

from clusterfusion.arguments import as_int, require, require_dense
from clusterfusion.errors import ArgumentError
from clusterfusion.jit.device import is_device_memory
from clusterfusion.ops.attention_half import attention_half
from clusterfusion.ops.layer_checks import checked_eps, require_tensor
from clusterfusion.ops.layer_launch import ALIGNMENT
from clusterfusion.seed_api.checks import device_of
from clusterfusion.seed_api.llama_checks import (
    HEAD_DIM,
    HIDDEN,
    by_heads,
    check_rows,
    check_written,
    checked_weights,
    half_config,
)


@dataclasses.dataclass(frozen=True)
class Sequence:
    """Where a sequence's tokens lie in the cache."""

    cached: list[int]
    new: int


@torch.no_grad()
def llama_decoder_layer_batch_decode_sglang(
    output: Tensor, residual_output: Tensor, input: Tensor, residual: Tensor, weight_qkv: Tensor, weight_o: Tensor,
    paged_kv_indptr: Tensor, paged_kv_indices: Tensor, k_cache_ptrs: Tensor, v_cache_ptrs: Tensor, layer_id: int,
    rms_input_weight: Tensor, eps: float, positions: Tensor, cos_sin: Tensor,
) -> None:  # fmt: skip
    """`llama_decoder_layer_sglang` for a batch of sequences over SGLang's paged cache of one token a page. They run one after
    another, each over a copy of its cached rows, with that function's arithmetic and bits.

    output, residual_output, input, residual: float16 [batch, 4096]. input + residual, rounded to float16, is written to
    residual_output, which may be `residual` itself, and attention's output to output; otherwise the two share no memory with
    each other and the rest. Weights, norm weight and eps as for `llama_decoder_layer_sglang`.
    paged_kv_indptr: int32 [batch + 1], from 0 on; the slots of sequence b are paged_kv_indices[indptr[b] : indptr[b + 1]], int32,
    one or more, none negative. The last is where its new key and value are written; no other place in the batch has that slot.
    k_cache_ptrs, v_cache_ptrs: uint64 [layers], addresses of each layer's float16 [slots, 4096], multiples of 16, of which those
    of layer_id are taken. How many slots there are is not to be seen from an address: an index beyond them is undefined.
    positions: int64 [batch], rows of cos_sin, float32 [max_position, 128]: 64 cosines, then 64 sines, one for each pair of
    dimensions i and i + 64.
    All tensors are contiguous, and on one device, the caches too.

    Slots, positions and addresses are read by the host, which on a GPU waits for them: the call cannot be captured in a CUDA
    graph. Raises ArgumentError naming the argument, before anything is written; DeviceError and CompileError as
    `clusterfusion.decoder_layer` does.
    """
    device = device_of("input", input)
    shape = list(input.shape)
    require("input", f"of shape {shape}", len(shape) == 2 and shape[1] == HIDDEN, f"[batch, {HIDDEN}]")
    batch = shape[0]
    check_rows(device, batch, input=input, residual=residual, output=output, residual_output=residual_output)
    weights = checked_weights(device, weight_qkv, weight_o, rms_input_weight, "output_major")
    config = half_config(checked_eps(eps), "halves")
    rows = _checked_positions(device, batch, positions, cos_sin)
    sequences = _checked_sequences(device, batch, paged_kv_indptr, paged_kv_indices)
    slots = 1 + max((slot for s in sequences for slot in (*s.cached, s.new)), default=-1)
    pointers = _checked_addresses(device, layer_id, k_cache_ptrs, v_cache_ptrs)
    k_cache, v_cache = (_at_address(name, where, slots, device) for name, where in pointers.items())
    k_name, v_name = (
        f"the {cache} at {cache}_ptrs (up to slot {slots - 1}, the largest of paged_kv_indices)"
        for cache in ("k_cache", "v_cache")
    )
    named = {
        "input": input, "residual": residual, "weight_qkv": weight_qkv, "weight_o": weight_o,
        "paged_kv_indptr": paged_kv_indptr, "paged_kv_indices": paged_kv_indices, "k_cache_ptrs": k_cache_ptrs,
        "v_cache_ptrs": v_cache_ptrs, "rms_input_weight": rms_input_weight, "positions": positions, "cos_sin": cos_sin,
    }  # fmt: skip
    check_written(k_name, k_cache, **named, **{v_name: v_cache})
    check_written(v_name, v_cache, **named)
    named |= {k_name: k_cache, v_name: v_cache}
    check_written("output", output, **named, residual_output=residual_output)
    if residual_output.data_ptr() == residual.data_ptr():
        del named["residual"]
    check_written("residual_output", residual_output, **named)

    residual_output.copy_(input + residual)
    for b, (sequence, row) in enumerate(zip(sequences, rows, strict=True)):
        cached = torch.tensor(sequence.cached, dtype=torch.int64, device=device)
        k, v = (cache.index_select(0, cached) for cache in (k_cache, v_cache))
        cos, sin = cos_sin[row : row + 1].split(HEAD_DIM // 2, 1)
        out, k_new, v_new = attention_half(
            config, weights, residual_output[b : b + 1], by_heads(k), by_heads(v), cos, sin
        )
        output[b] = out[0]
        k_cache[sequence.new], v_cache[sequence.new] = k_new.flatten(), v_new.flatten()


def _checked_positions(device: torch.device, batch: int, positions: Tensor, cos_sin: Tensor) -> list[int]:
    needed = f"[max_position, {HEAD_DIM}]"
    require_dense("cos_sin", cos_sin, f"a tensor {needed}")
    shape = list(cos_sin.shape)
    require("cos_sin", f"of shape {shape}", len(shape) == 2 and shape[0] > 0 and shape[1] == HEAD_DIM, needed)
    require_tensor("cos_sin", cos_sin, (shape[0], HEAD_DIM), torch.float32, device)
    require_tensor("positions", positions, (batch,), torch.int64, device)
    rows: list[int] = positions.tolist()
    for b, row in enumerate(rows):
        require("positions", f"{row} at {b}", 0 <= row < shape[0], f"from 0 to {shape[0] - 1}, the last row of cos_sin")
    return rows


def _checked_sequences(device: torch.device, batch: int, indptr: Tensor, indices: Tensor) -> list[Sequence]:
    require_tensor("paged_kv_indptr", indptr, (batch + 1,), torch.int32, device)
    require_dense("paged_kv_indices", indices, "a tensor of one dimension")
    shape = list(indices.shape)
    require("paged_kv_indices", f"of shape {shape}", len(shape) == 1, "of one dimension")
    require_tensor("paged_kv_indices", indices, (shape[0],), torch.int32, device)
    bounds, slots = indptr.tolist(), indices.tolist()
    require("paged_kv_indptr", f"{bounds[0]} at 0", bounds[0] == 0, "0 there")
    for b, (start, end) in enumerate(itertools.pairwise(bounds)):
        needed = f"more than {start} and at most {shape[0]}, the length of paged_kv_indices: no sequence is empty"
        require("paged_kv_indptr", f"{end} at {b + 1}", start < end <= shape[0], needed)
    used = slots[: bounds[-1]]
    for at, slot in enumerate(used):
        require("paged_kv_indices", f"{slot} at {at}", slot >= 0, "a slot, 0 or more")
    counts = collections.Counter(used)
    for end in bounds[1:]:
        new = used[end - 1]
        seen = f"{new} at {end - 1}, where a new token is written, and at another place too"
        require("paged_kv_indices", seen, counts[new] == 1, "a slot of its own")
    return [Sequence(used[start : end - 1], used[end - 1]) for start, end in itertools.pairwise(bounds)]


def _checked_addresses(
    device: torch.device, layer_id: int, k_cache_ptrs: Tensor, v_cache_ptrs: Tensor
) -> dict[str, int]:
    require_dense("k_cache_ptrs", k_cache_ptrs, "a tensor [layers]")
    shape = list(k_cache_ptrs.shape)
    require("k_cache_ptrs", f"of shape {shape}", len(shape) == 1 and shape[0] > 0, "[layers]")
    found = {}
    for name, pointers in (("k_cache_ptrs", k_cache_ptrs), ("v_cache_ptrs", v_cache_ptrs)):
        require_tensor(name, pointers, (shape[0],), torch.uint64, device)
    layer = as_int("layer_id", layer_id, 0, shape[0] - 1)
    for name, pointers in (("k_cache_ptrs", k_cache_ptrs), ("v_cache_ptrs", v_cache_ptrs)):
        where = pointers.tolist()[layer]
        needed = f"the address of a cache, a multiple of {ALIGNMENT}"
        require(name, f"{where:#x} at {layer}", where > 0 and where % ALIGNMENT == 0, needed)
        found[name] = where
    return found


class _DeviceMemory:
    """What PyTorch makes a CUDA tensor of, without a copy."""

    def __init__(self, address: int, rows: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (rows, HIDDEN),
            "typestr": "<f2",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


def _at_address(name: str, address: int, rows: int, device: torch.device) -> Tensor:
    """The first rows of a cache, float16 [rows, 4096], where they lie."""
    if not rows:
        return torch.empty(0, HIDDEN, dtype=torch.float16, device=device)
    if device.type == "cpu":
        memory = (ctypes.c_char * (2 * rows * HIDDEN)).from_address(address)
        return torch.frombuffer(memory, dtype=torch.float16).view(rows, HIDDEN)
    assert device.index is not None
    ends = address, address + 2 * rows * HIDDEN - 1
    if not all(is_device_memory(end, device.index) for end in ends):
        raise ArgumentError(
            f"{name} holds {address:#x}, from which on there are no {rows} slots of memory of {device}; it must be the address of "
            "a cache there"
        )
    return torch.as_tensor(_DeviceMemory(address, rows), device=device)
