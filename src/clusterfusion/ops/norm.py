"""Operations on tensors: checked, then run as plain PyTorch on the CPU or as kernels on the GPU.

Inference only: no gradient is recorded.
"""

from __future__ import annotations

import ctypes
from typing import Literal, get_args

import torch

from clusterfusion.arguments import as_float
from clusterfusion.errors import ArgumentError
from clusterfusion.jit.cluster_norm import (
    CLUSTER_SIZES,
    MAX_HIDDEN,
    VECTOR_BYTES,
    ElementType,
    Exchange,
    Norm,
    choose_cluster_norm,
)

_ELEMENT_TYPES: dict[torch.dtype, ElementType] = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
}
_EPS = "zero or a positive number, finite in float32"


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    *,
    cluster_size: int = 4,
    exchange: Literal["direct", "tree"] = "direct",
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """LayerNorm (Ba, Kiros and Hinton 2016; `torch.nn.LayerNorm`): (x - mean) / sqrt(variance + eps) * weight + bias.

    x [..., hidden], rows possibly strided; weight and bias [hidden], bias may be None; all on one device, float16,
    bfloat16 or float32, weight and bias of one dtype. Returns a new contiguous tensor of x's shape, in `out_dtype`: x's
    dtype (the default) or float32. All arithmetic is float32, the mean before the centred squares.
    On a GPU it runs on PyTorch's current stream, each row split over a cluster of `cluster_size` CTAs (1, 2, 4 or 8)
    that exchange partial sums directly or as a tree; the bits of the result depend on both, and on nothing else.
    Raises ArgumentError for unusable arguments, DeviceError when the GPU or the compiler is missing.
    """
    return _norm("layer_norm", x, weight, bias, eps, cluster_size, exchange, out_dtype)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    cluster_size: int = 4,
    exchange: Literal["direct", "tree"] = "direct",
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """RMSNorm (Zhang and Sennrich 2019; `torch.nn.RMSNorm`): x / sqrt(mean(x^2) + eps) * weight.

    Arguments, result and errors as for `layer_norm`. Rounds once, at the end: `transformers` rounds the normalised row
    to x's dtype before it multiplies by the weight.
    """
    return _norm("rms_norm", x, weight, None, eps, cluster_size, exchange, out_dtype)


@torch.no_grad()
def _norm(
    norm: Norm,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    cluster_size: int,
    exchange: Exchange,
    out_dtype: torch.dtype | None,
) -> torch.Tensor:
    rows = _checked_rows(x)
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None:
            _check_vector(name, vector, x)
    if bias is not None and bias.dtype != weight.dtype:
        raise ArgumentError(f"bias is {bias.dtype}; it must be {weight.dtype}, as weight is")
    eps = as_float("eps", eps, _EPS)
    _require("eps", eps, 0 <= eps <= torch.finfo(torch.float32).max, _EPS)
    _require("cluster_size", cluster_size, cluster_size in CLUSTER_SIZES, f"one of {CLUSTER_SIZES}")
    _require("exchange", exchange, exchange in get_args(Exchange), f"one of {get_args(Exchange)}")
    out_dtype = x.dtype if out_dtype is None else out_dtype
    _require("out_dtype", out_dtype, out_dtype in (x.dtype, torch.float32), f"x's dtype ({x.dtype}) or torch.float32")
    if x.device.type == "cpu":
        return _norm_on_cpu(norm, rows, weight, bias, eps).to(out_dtype).view(x.shape)
    out = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    _launch_norm(norm, rows, weight, bias, eps, cluster_size, exchange, out)
    return out


def _checked_rows(x: torch.Tensor) -> torch.Tensor:
    """x as [rows, hidden], a view of it."""
    _require("x", tuple(x.shape), x.dim() >= 1 and 1 <= x.shape[-1] <= MAX_HIDDEN, f"[..., 1 to {MAX_HIDDEN}]")
    _require("x", x.dtype, x.dtype in _ELEMENT_TYPES, f"one of {tuple(_ELEMENT_TYPES)}")
    _require("x", x.device, x.device.type in ("cpu", "cuda"), "a CPU or CUDA tensor")
    hidden = x.shape[-1]
    if x.numel() == 0:
        return x.reshape(0, hidden)
    try:
        rows = x.view(-1, hidden)
    except RuntimeError:
        rows = None
    if rows is None or (hidden > 1 and rows.stride(1) != 1):
        raise ArgumentError(
            f"x of shape {tuple(x.shape)} has strides {x.stride()}; rows must be contiguous and evenly spaced: "
            "pass x.contiguous()"
        )
    return rows


def _check_vector(name: str, vector: torch.Tensor, x: torch.Tensor) -> None:
    hidden = x.shape[-1]
    _require(name, tuple(vector.shape), tuple(vector.shape) == (hidden,), f"[{hidden}], the last dimension of x")
    _require(name, vector.dtype, vector.dtype in _ELEMENT_TYPES, f"one of {tuple(_ELEMENT_TYPES)}")
    _require(name, vector.device, vector.device == x.device, f"on {x.device}, as x is")
    _require(name, f"of stride {vector.stride(0)}", vector.is_contiguous(), "contiguous")


def _require(name: str, seen: object, condition: bool, needed: str) -> None:
    if not condition:
        raise ArgumentError(f"{name} is {seen}; it must be {needed}")


def _norm_on_cpu(
    norm: Norm, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    values = rows.float()
    if norm == "layer_norm":
        values = values - values.mean(dim=-1, keepdim=True)
    normed = values / torch.sqrt(values.square().mean(dim=-1, keepdim=True) + eps) * weight.float()
    return normed if bias is None else normed + bias.float()


def _launch_norm(
    norm: Norm,
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    cluster_size: int,
    exchange: Exchange,
    out: torch.Tensor,
) -> None:
    from clusterfusion.jit.launch import load_kernel

    count, hidden = rows.shape
    if count == 0:
        return
    row_stride = rows.stride(0) if count > 1 else hidden
    tensors = [rows, weight, out] + ([] if bias is None else [bias])
    aligned = (
        all(tensor.data_ptr() % VECTOR_BYTES == 0 for tensor in tensors)
        and hidden * rows.element_size() % VECTOR_BYTES == 0
        and row_stride * rows.element_size() % VECTOR_BYTES == 0
    )
    chosen = choose_cluster_norm(
        norm,
        hidden,
        _ELEMENT_TYPES[rows.dtype],
        _ELEMENT_TYPES[weight.dtype],
        _ELEMENT_TYPES[out.dtype],
        cluster_size,
        exchange,
        aligned=aligned,
    )
    kernel = load_kernel(chosen.source, chosen.instance, rows.device.index)
    kernel.launch(
        chosen.launch_shape(count),
        rows,
        weight,
        bias,
        out,
        ctypes.c_int64(row_stride),
        ctypes.c_int32(hidden),
        ctypes.c_float(1.0 / hidden),
        ctypes.c_float(eps),
    )
