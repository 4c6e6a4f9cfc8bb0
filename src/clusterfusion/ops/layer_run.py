"""One decoder layer at one token, once its arguments are checked: through the reference on the CPU, as kernels on the GPU."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from clusterfusion import reference
from clusterfusion.architecture import DecoderConfig
from clusterfusion.errors import ArgumentError
from clusterfusion.ops.layer_checks import (
    cache_views,
    check_apart,
    check_layer,
    check_writable,
    checked_options,
    checked_tables,
    layer_config,
)
from clusterfusion.ops.layer_launch import (
    ErrorRecord,
    LayerBuffers,
    LayerScratch,
    RotaryTables,
    layer_arguments,
    plan_for,
    prepare_layer,
)
from clusterfusion.weights import LayerWeights


def checked_run(
    x: Tensor, position: Tensor, weights: LayerWeights, k_cache: Tensor, v_cache: Tensor, cos: Tensor, sin: Tensor,
    rotary_dim: int, eps: float, activation: str, parallel_residual: bool, form: str, pairing: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What both operators do with a layer's weights: check everything, then run it where x is."""
    check_layer(x, weights, position)
    checked_options(weights.q_weight.shape[1], rotary_dim, eps, activation, parallel_residual, form, pairing)
    k, v = cache_views(k_cache, v_cache, weights)
    check_writable(k, v)
    check_apart("x", x, k, v)
    config = layer_config(weights, k.shape[1], rotary_dim, eps, activation, parallel_residual, pairing)
    tables = checked_tables(cos, sin, config, x.device)
    if x.device.type == "cpu":
        return on_cpu(config, weights, x, k, v, position, tables)
    return on_gpu(config, weights, x, k, v, position, tables, form)


def on_cpu(
    config: DecoderConfig,
    weights: LayerWeights,
    x: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor,
    tables: RotaryTables,
) -> tuple[Tensor, Tensor, Tensor]:
    at, max_len = int(position.item()), k.shape[1]
    if not 0 <= at < max_len:
        raise ArgumentError(f"position is {at}; it must be from 0 to {max_len - 1}, the last row of k_cache")
    cos, sin = angles_at(config, tables, at)
    row = x.reshape(1, -1).float()
    with torch.autocast("cpu", enabled=False):
        out = reference.decoder_layer(config, weights, row, cos, sin, k, v, at, dtype=k.dtype)
    return out.to(x.dtype).reshape(x.shape), k[:, at].clone(), v[:, at].clone()


def angles_at(config: DecoderConfig, tables: RotaryTables, position: int) -> tuple[Tensor, Tensor]:
    """cos and sin of a position as the reference takes them."""
    half = config.rotary.dim // 2
    cos, sin = (table[position if tables.row_stride else 0] for table in (tables.cos, tables.sin))
    second = tables.second_angles
    if config.rotary.neighbours and second:
        cos, sin = (t[: 2 * half].unflatten(0, (half, 2)).T[None] for t in (cos, sin))  # [1, 2, half]
    else:
        cos, sin = (torch.stack((t[:half], t[second : second + half]))[None] for t in (cos, sin))
    return cos, sin


def on_gpu(
    config: DecoderConfig,
    weights: LayerWeights,
    x: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor,
    tables: RotaryTables,
    form: str,
) -> tuple[Tensor, Tensor, Tensor]:
    index = x.device.index
    plan = plan_for(config, index)
    error = error_record(index)
    error.check("This is said once", forget=True)
    with torch.cuda.device(index):
        row = dense(x)
        out = torch.empty_like(row)
        k_new, v_new = (k.new_empty(k.shape[0], k.shape[2]) for _ in range(2))
        scratch = LayerScratch(plan, k.dtype, x.device)
        buffers = LayerBuffers(row, out, k, v, position, tables, k_new, v_new)
        arguments = layer_arguments(plan, weights, buffers, scratch, error)
        segments = plan.segments if form == "split" else ("whole",)
        for launch in prepare_layer(plan, k.dtype, x.dtype, segments, arguments, index):
            launch()
    return out.view(x.shape), k_new, v_new


_ERRORS: dict[int, ErrorRecord] = {}
_ERRORS_LOCK = threading.Lock()


def error_record(device_index: int) -> ErrorRecord:
    """The one that all calls on a device share."""
    with _ERRORS_LOCK:
        if device_index not in _ERRORS:
            _ERRORS[device_index] = ErrorRecord()
        return _ERRORS[device_index]


def dense(x: Tensor) -> Tensor:
    """x as a vector that kernels read in 16-byte accesses: itself, or a copy if it is strided or misaligned."""
    row = x.reshape(-1)
    return row if row.is_contiguous() and row.data_ptr() % 16 == 0 else row.clone(memory_format=torch.contiguous_format)
