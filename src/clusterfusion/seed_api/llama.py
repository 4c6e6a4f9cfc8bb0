"""The seed's LLaMA functions at one token: RMSNorm, and the attention half of a Llama-2-7B layer in two layouts."""

from __future__ import annotations

import torch
from torch import Tensor

from clusterfusion.arguments import require, require_dense
from clusterfusion.jit.cluster_norm import MAX_HIDDEN
from clusterfusion.ops.attention_half import attention_half
from clusterfusion.ops.layer_checks import checked_eps, require_tensor
from clusterfusion.ops.norm import rms_norm
from clusterfusion.seed_api.checks import device_of
from clusterfusion.seed_api.llama_checks import (
    HEAD_DIM,
    by_heads,
    check_angles,
    check_cached,
    check_rows,
    check_written,
    checked_weights,
    half_config,
)

NEIGHBOURS_EPS = 1e-6  # of llama_decoder_layer, which takes none


def rmsnorm(input: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """RMSNorm (Zhang and Sennrich 2019; transformers' LlamaRMSNorm) of every row: x / sqrt(mean(x^2) + eps) * weight.

    input: float16 [batch, hidden], hidden up to 16,384; weight: float16 [hidden]. Returns a new tensor like input. The
    arithmetic is float32 and rounds once, at the end. Raises ArgumentError naming the argument; DeviceError and CompileError
    as `clusterfusion.rms_norm`, which it is.
    """
    device = device_of("input", input)
    shape = list(input.shape)
    needed = f"[batch, hidden], hidden from 1 to {MAX_HIDDEN}"
    require("input", f"of shape {shape}", len(shape) == 2 and 1 <= shape[1] <= MAX_HIDDEN, needed)
    require("input", input.dtype, input.dtype == torch.float16, "torch.float16")
    apart = "rows whose elements lie side by side: input.contiguous()"
    require("input", f"of strides {list(input.stride())}", shape[1] == 1 or input.stride(1) == 1, apart)
    require_dense("weight", weight, f"a tensor [{shape[1]}]")
    require_tensor("weight", weight, (shape[1],), torch.float16, device)
    return rms_norm(input, weight, eps)


@torch.no_grad()
def llama_decoder_layer(
    input: Tensor, weight_qkv: Tensor, weight_o: Tensor, k_cache: Tensor, v_cache: Tensor, rms_input_weight: Tensor,
    cos: Tensor, sin: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The attention half of a Llama-2-7B layer (Touvron et al. 2023) at one token, with input-major weights: RMSNorm with eps
    1e-6, q, k, v, rotary of neighbouring dimensions, attention over the cached tokens and the new one, output projection.
    The residual is not added. Returns (output, k_new, v_new).

    input: float16 [1, 4096]; output is alike. weight_qkv: float16 [12288, 4096], three matrices [inputs, outputs], one behind
    the other: q, k, v = norm(input) @ each; so too weight_o [4096, 4096]. rms_input_weight: float16 [4096] or [1, 4096].
    k_cache, v_cache: keys (rotated) and values of the cached tokens and no others, float16 [tokens, 4096], tokens from 0 on.
    They are not written: k_new and v_new, float16 [1, 32, 128], are the new token's.
    cos, sin: float32 [1, 128], of the new token's angles, one for each dimension of a head; dimensions 2 i and 2 i + 1 rotate
    together. All tensors are contiguous.

    Sums are float32. k_new, v_new and the output are rounded to float16: on the CPU nothing else is; on a GPU, where PyTorch's
    products run before and behind the attention kernel, the normed input, the queries and attention's result are too.

    Raises ArgumentError naming the argument, before anything is launched; DeviceError and CompileError as
    `clusterfusion.decoder_layer` does.
    """
    device = device_of("input", input)
    check_rows(device, 1, input=input)
    weights = checked_weights(device, weight_qkv, weight_o, rms_input_weight, "input_major")
    check_cached(device, k_cache, v_cache)
    check_angles(device, cos, sin, (HEAD_DIM,))
    config = half_config(NEIGHBOURS_EPS, "neighbours")
    out, k_new, v_new = attention_half(config, weights, input, by_heads(k_cache), by_heads(v_cache), cos, sin)
    return out, k_new[None], v_new[None]


@torch.no_grad()
def llama_decoder_layer_sglang(
    input: Tensor, residual: Tensor, weight_qkv: Tensor, weight_o: Tensor, k_cache: Tensor, v_cache: Tensor,
    rms_input_weight: Tensor, eps: float, cos: Tensor, sin: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`llama_decoder_layer` as SGLang calls it: `residual` += input first, and what is normed is that sum; weights as nn.Linear
    holds them. Returns (output, residual, k_new, v_new); the output is attention's alone, to be added to the residual later.

    input, residual: float16 [1, 4096]. The sum is rounded to float16 and written to `residual`, as SGLang's fused add does; the
    tensor that is returned is the same one. It must share no memory with the others.
    weight_qkv: float16 [12288, 4096], rows of q, then k, then v, head after head; weight_o: float16 [4096, 4096].
    eps: of the RMSNorm, a positive number.
    cos, sin: float32 [1, 64], of the new token's angles, one for each pair of dimensions i and i + 64, which rotate together;
    or [1, 128], one for each dimension: two halves, equal in every model.

    Sums are float32; the new residual, k_new, v_new and the output are rounded to float16, and nothing else. Everything else,
    errors too, is as for `llama_decoder_layer`; after an ArgumentError `residual` is as it was.
    """
    device = device_of("input", input)
    check_rows(device, 1, input=input, residual=residual)
    weights = checked_weights(device, weight_qkv, weight_o, rms_input_weight, "output_major")
    check_cached(device, k_cache, v_cache)
    config = half_config(checked_eps(eps), "halves")
    check_angles(device, cos, sin, (HEAD_DIM // 2, HEAD_DIM))
    check_written(
        "residual", residual, input=input, weight_qkv=weight_qkv, weight_o=weight_o, k_cache=k_cache, v_cache=v_cache,
        rms_input_weight=rms_input_weight, cos=cos, sin=sin,
    )  # fmt: skip
    residual.add_(input)
    out, k_new, v_new = attention_half(config, weights, residual, by_heads(k_cache), by_heads(v_cache), cos, sin)
    return out, residual, k_new[None], v_new[None]
