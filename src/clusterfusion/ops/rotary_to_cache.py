"""Between the projections of a prompt and its attention: rotate queries and keys, put keys and values into the K/V cache. One
launch on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from clusterfusion import reference
from clusterfusion.architecture import DecoderConfig
from clusterfusion.jit.rotary_to_cache import RotaryToCacheArguments, prepare
from clusterfusion.ops.layer_launch import ELEMENT_TYPES


class RotaryToCache:
    """Of one model on one device. Its arguments belong to it alone: not for several threads at once."""

    def __init__(self, config: DecoderConfig, dtype: torch.dtype, device: torch.device) -> None:
        """`dtype` is that of the weights and the cache; on a GPU it has 16 bits. Raises DeviceError on a GPU that is not
        supported, CompileError."""
        self._launch: Callable[[], None] | None = None
        if device.type == "cuda":
            self._arguments = RotaryToCacheArguments()
            self._launch = prepare(config, ELEMENT_TYPES[dtype], self._arguments, device.index)

    def bind(
        self, q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, cos: Tensor, sin: Tensor
    ) -> Callable[[int], None]:
        """The operation on these tensors for the layer that it is called with; valid until the next `bind`, and as long as the
        caller keeps the tensors.

        q [T, heads, head_dim] is rotated in place; rotated k and v, both [T, kv_heads, head_dim], are written to k_cache and
        v_cache [layers, kv_heads, T, head_dim]. cos, sin [T, rotary_dim / 2], contiguous, of reference.accumulate_dtype.
        Heads are contiguous; k and v have the same strides, the two caches too, and all strides are multiples of head_dim. On a
        GPU every tensor starts at a multiple of 16 bytes, or of as much of it as divides head_dim and rotary_dim / 2.
        """
        launch = self._launch
        if launch is None:
            return lambda layer: _compute(q, k, v, k_cache[layer], v_cache[layer], cos, sin)
        a = self._arguments
        a.q, a.k, a.v = q.data_ptr(), k.data_ptr(), v.data_ptr()
        a.cos, a.sin = cos.data_ptr(), sin.data_ptr()
        a.q_token_stride, a.q_head_stride, _ = q.stride()
        a.kv_token_stride, a.kv_head_stride, _ = k.stride()
        layer_stride, a.cache_head_stride, a.cache_token_stride, _ = k_cache.stride()
        a.tokens = q.shape[0]
        first_keys, first_values = k_cache.data_ptr(), v_cache.data_ptr()
        layer_bytes = layer_stride * k_cache.element_size()

        def launch_layer(layer: int) -> None:
            a.k_cache, a.v_cache = first_keys + layer * layer_bytes, first_values + layer * layer_bytes
            launch()

        return launch_layer


def _compute(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, cos: Tensor, sin: Tensor) -> None:
    """The same in PyTorch, for one layer's caches [kv_heads, T, head_dim]."""
    q.copy_(reference.rotate(q.transpose(0, 1).to(cos.dtype), cos, sin).transpose(0, 1))
    k_cache.copy_(reference.rotate(k.transpose(0, 1).to(cos.dtype), cos, sin))
    v_cache.copy_(v.transpose(0, 1))
