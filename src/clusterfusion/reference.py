"""The mathematics of the decoder in plain PyTorch: ground truth of every kernel, and the path without a GPU.

GPT-NeoX (Black et al. 2022; transformers' GPTNeoXForCausalLM) and LLaMA (Touvron et al. 2023; LlamaForCausalLM) are one
function here; what differs is data in DecoderConfig. Two dtypes matter: matrix products take operands of `dtype`, while
norms, softmax, biases and the residual stream are in `accumulate_dtype(dtype)`: float32, or float64 for float64.
With dtype=torch.float64 over weights of any dtype this is the truth that errors are measured against.

Shapes: T tokens of this call, P cached tokens before them. A cache is [layers, kv_heads, max_len, head_dim].
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from clusterfusion.architecture import DecoderConfig, RotaryConfig
from clusterfusion.weights import DecoderWeights, LayerWeights


@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys (already rotated) and values of the tokens so far: two tensors [layers, kv_heads, max_len, head_dim]."""

    k: Tensor
    v: Tensor

    @classmethod
    def allocate(cls, config: DecoderConfig, max_len: int, dtype: torch.dtype, device: torch.device | str) -> KVCache:
        """A cache with room for `max_len` tokens: config.kv_elements_per_token elements of `dtype` for each."""
        shape = (config.num_layers, config.num_kv_heads, max_len, config.head_dim)
        with torch.inference_mode(False):  # written in place later, in whatever mode the caller is in then
            return cls(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))

    @property
    def max_len(self) -> int:
        return self.k.shape[2]


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, norms and the residual stream beside matrix operands of `dtype`."""
    return torch.promote_types(dtype, torch.float32)


@torch.no_grad()
def forward(
    weights: DecoderWeights,
    token_ids: Tensor,
    cache: KVCache,
    position: int,
    *,
    dtype: torch.dtype | None = None,
    last_only: bool = True,
) -> Tensor:
    """Logits after `token_ids` [T], which stand at positions `position` … `position + T - 1`.

    Reads the first `position` entries of the cache and writes the next T. `dtype` (default: that of the weights) is the
    dtype of matrix operands. Returns [vocab] for the last token, or [T, vocab] with last_only=False, in
    accumulate_dtype(dtype). The caller has checked that ids are in the vocabulary and the cache has room.
    """
    dtype = dtype or weights.dtype
    config = weights.config
    x = F.embedding(token_ids, weights.embedding).to(accumulate_dtype(dtype))
    positions = torch.arange(position, position + len(token_ids), device=x.device)
    cos, sin = rotary_tables(config.rotary, positions, dtype=x.dtype)
    for i, layer in enumerate(weights.layers):
        x = decoder_layer(config, layer, x, cos, sin, cache.k[i], cache.v[i], position, dtype=dtype)
    if last_only:
        x = x[-1]
    x = norm(config, x, weights.final_norm_weight, weights.final_norm_bias)
    return linear(x, weights.lm_head, None, dtype)


def decoder_layer(
    config: DecoderConfig,
    layer: LayerWeights,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    position: int,
    *,
    dtype: torch.dtype,
) -> Tensor:
    """One decoder layer: x [T, hidden] to [T, hidden], both in accumulate_dtype(dtype).

    `cos`, `sin` are rotary_tables for the T positions. k_cache, v_cache [kv_heads, max_len, head_dim] are read up to
    `position` and written at `position` … `position + T - 1`.
    """
    attended = attention(
        config,
        layer,
        norm(config, x, layer.input_norm_weight, layer.input_norm_bias),
        cos,
        sin,
        k_cache,
        v_cache,
        position,
        dtype=dtype,
    )
    if config.parallel_residual:
        return x + attended + mlp(config, layer, norm(config, x, layer.post_norm_weight, layer.post_norm_bias), dtype)
    x = x + attended
    return x + mlp(config, layer, norm(config, x, layer.post_norm_weight, layer.post_norm_bias), dtype)


def attention(
    config: DecoderConfig,
    layer: LayerWeights,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    position: int,
    *,
    dtype: torch.dtype,
) -> Tensor:
    """Causal self-attention of normed x [T, hidden] over the cache and itself, through the output projection."""
    tokens = x.shape[0]
    end = position + tokens
    q, k, v = project_qkv(layer, x, dtype)
    neighbours = config.rotary.neighbours
    q, k = rotate(q, cos, sin, neighbours=neighbours), rotate(k, cos, sin, neighbours=neighbours)
    k_cache[:, position:end] = k
    v_cache[:, position:end] = v
    causal = None
    if tokens > 1 and position:
        visible = torch.arange(end, device=x.device)
        causal = visible <= visible[position:, None]  # [T, P + T]
    out = F.scaled_dot_product_attention(
        q.to(dtype)[None],
        k_cache[:, :end].to(dtype)[None],
        v_cache[:, :end].to(dtype)[None],
        attn_mask=causal,
        is_causal=tokens > 1 and not position,
        enable_gqa=config.num_kv_heads != config.num_heads,
    )
    return linear(out[0].transpose(0, 1).flatten(1), layer.o_weight, layer.o_bias, dtype)


def mlp(config: DecoderConfig, layer: LayerWeights, x: Tensor, dtype: torch.dtype) -> Tensor:
    """The MLP on normed x [T, hidden], gated or not, to [T, hidden]."""
    up = linear(x, layer.up_weight, layer.up_bias, dtype)
    if layer.gate_weight is not None:
        hidden = activation(config, linear(x, layer.gate_weight, layer.gate_bias, dtype)) * up
    else:
        hidden = activation(config, up)
    return linear(hidden, layer.down_weight, layer.down_bias, dtype)


def norm(config: DecoderConfig, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang and Sennrich 2019) over the last dimension, in x's dtype."""
    if config.norm == "rms_norm":
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.norm_eps) * weight.to(x.dtype)
    assert bias is not None
    return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), config.norm_eps)


def activation(config: DecoderConfig, x: Tensor) -> Tensor:
    """The config's activation: exact GELU by erf, its tanh form (Hendrycks and Gimpel 2016), or SiLU."""
    if config.activation == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if config.activation == "gelu_tanh" else "none")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """weight @ x + bias: operands in `dtype`, the result in accumulate_dtype(dtype). weight [rows, columns]."""
    out = F.linear(x.to(dtype), weight.to(dtype)).to(accumulate_dtype(dtype))
    return out if bias is None else out + bias.to(out.dtype)


def project_qkv(layer: LayerWeights, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, hidden] to q [heads, T, head_dim] and k, v [kv_heads, T, head_dim], in accumulate_dtype(dtype)."""
    if layer.qkv_weight is not None:
        heads, head_dim, _ = layer.q_weight.shape
        qkv = linear(x, layer.qkv_weight, layer.qkv_bias, dtype).unflatten(-1, (heads, 3, head_dim))
        q, k, v = qkv.permute(2, 1, 0, 3)
        return q, k, v

    def project(weight: Tensor, bias: Tensor | None) -> Tensor:
        flat_bias = None if bias is None else bias.flatten()
        return linear(x, weight.flatten(0, 1), flat_bias, dtype).unflatten(-1, weight.shape[:2]).transpose(0, 1)

    return (
        project(layer.q_weight, layer.q_bias),
        project(layer.k_weight, layer.k_bias),
        project(layer.v_weight, layer.v_bias),
    )


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, neighbours: bool = False) -> Tensor:
    """Rotary embedding of x [heads, T, head_dim]: dimension i pairs with i + rotary_dim / 2, or with `neighbours` 2i with
    2i + 1; the rest pass through.

    cos, sin [T, rotary_dim / 2], or [T, 2, rotary_dim / 2] where the two dimensions of a pair have angles of their own.
    """
    half = cos.shape[-1]
    rotates, rest = x[..., : 2 * half], x[..., 2 * half :]
    first, second = (
        (rotates[..., 0::2], rotates[..., 1::2]) if neighbours else (rotates[..., :half], rotates[..., half:])
    )
    first_cos, second_cos = cos.unbind(-2) if cos.dim() == 3 else (cos, cos)
    first_sin, second_sin = sin.unbind(-2) if sin.dim() == 3 else (sin, sin)
    rotated = first * first_cos - second * first_sin, second * second_cos + first * second_sin
    if neighbours:
        return torch.cat((torch.stack(rotated, dim=-1).flatten(-2), rest), dim=-1)
    return torch.cat((*rotated, rest), dim=-1)


def rotary_tables(rotary: RotaryConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [T, rotary_dim / 2] of the angles at `positions` [T].

    The angles are float32 products of position and float32 frequency, whatever `dtype` is: that is what the published
    models were trained and are run with, so it is part of the model, not of the arithmetic.
    """
    angles = positions.to(torch.float32)[:, None] * rotary_frequencies(rotary).to(positions.device)
    angles = angles.to(dtype)
    return angles.cos(), angles.sin()


def rotary_frequencies(rotary: RotaryConfig) -> Tensor:
    """Inverse frequencies [rotary_dim / 2], float32 on the CPU, scaled as the config says.

    Operations are rounded in the order transformers rounds them, so that the tables agree to the bit.
    """
    if not rotary.nominal_dim:
        return torch.empty(0)
    exponents = torch.arange(0, rotary.nominal_dim, 2, dtype=torch.int64).float() / rotary.nominal_dim
    frequencies = 1.0 / (rotary.theta**exponents)
    if rotary.scaling == "linear":
        return frequencies / rotary.factor
    if rotary.scaling == "llama3":
        turns = rotary.original_max_position / (2 * math.pi / frequencies)  # within the original context
        keep = (turns - rotary.low_freq_factor) / (rotary.high_freq_factor - rotary.low_freq_factor)
        keep = keep.clamp(0, 1)
        return (1 - keep) * frequencies / rotary.factor + keep * frequencies
    return frequencies
