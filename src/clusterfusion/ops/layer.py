"""One decoder layer at one token, as a torch operator: clusterfusion::decoder_layer for GPT-NeoX's, whose q, k and v are one
matrix; clusterfusion::separate_decoder_layer, in separate_layer.py, where they are three."""

from __future__ import annotations

import torch
from torch import Tensor

from clusterfusion.architecture import Activation
from clusterfusion.arguments import index_of, require, require_dense, require_not_negated, shown
from clusterfusion.errors import ArgumentError
from clusterfusion.ops.layer_checks import (
    CACHE_SHAPES,
    Form,
    Pairing,
    check_heads,
    check_qkv,
    check_views,
    checked_options,
    layer_tensors,
)
from clusterfusion.ops.layer_run import checked_run
from clusterfusion.ops.separate_layer import call_separate
from clusterfusion.weights import LayerWeights, gpt_neox_layer


def decoder_layer(
    x: Tensor,
    layer_weights: LayerWeights,
    k_cache: Tensor,
    v_cache: Tensor,
    position: int | Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    rotary_dim: int,
    eps: float = 1e-5,
    activation: Activation | None = None,
    parallel_residual: bool | None = None,
    form: Form = "fused",
    pairing: Pairing = "halves",
) -> tuple[Tensor, Tensor, Tensor]:
    """One decode step through a GPT-NeoX layer (Black et al. 2022): x' = x + attn(norm1 x) + mlp(norm2 x), or with
    parallel_residual=False the sequential form; or through a LLaMA layer (Touvron et al. 2023). Which norm, whether the MLP is
    gated and how many K/V heads there are, layer_weights says. Returns (x', k_new, v_new).

    x: the residual stream, [hidden], [1, hidden] or [1, 1, hidden]; float16, bfloat16 or float32. x' has its shape
    and dtype.
    Sums are float32. The MLP's hidden vector and the new keys and values are rounded to the weights' dtype, float16 or
    bfloat16: on a GPU nothing else is; on the CPU the reference rounds every operand of a matrix product to it, the normed
    x, the queries and attention's output too.
    layer_weights: matrices output-major, q, k, v fused head by head or three tensors; `clusterfusion.gpt_neox_layer` and
    `clusterfusion.llama_layer` make one of tensors, `Engine.weights.layers` holds a model's. Without norm biases the norm is
    RMSNorm; with gate_weight the MLP is activation(gate) * up. Read where they lie; of a fused layer only qkv_weight and
    qkv_bias are, of which q, k and v must be the views.
    k_cache, v_cache: keys (rotated) and values of the tokens so far, of the weights' dtype: [kv_heads, max_len, head_dim] or
    [max_len, kv_heads * head_dim], of any strides that are multiples of 16 bytes. Rows below `position` are read; the new
    token's are written at row `position` and returned as k_new, v_new [kv_heads, head_dim]. Everything else must lie in memory
    apart from the caches.
    position: how many tokens are cached, 0 to max_len - 1: an int, or an int32 tensor of one element on x's device, which
    one captured CUDA graph then reads anew at each replay. On a GPU only the launch looks at a tensor's value: one out of
    range leaves all three results NaN and the cache untouched, and the next call on the device that comes after that
    launch has ended is a DeviceError. (A replay of a graph is no call: after replays, look at the results.)
    cos, sin: float32 [rows, rotary_dim / 2] (row `position` is taken; of a single row, that one), or, where the two
    dimensions of a pair have angles of their own, [rows, rotary_dim or more], of which the first rotary_dim count.
    activation: "gelu" (by erf), "gelu_tanh" or "silu". Left out, it is "silu" for a layer with RMSNorm, as LLaMA's, else "gelu".
    parallel_residual: left out, False for a layer with RMSNorm, else True.
    pairing: which dimensions rotate together, "halves": i and i + rotary_dim / 2, or "neighbours": 2 i and 2 i + 1. Tables with
    angles for each dimension are in the order of the dimensions.
    form: "fused", one cooperative launch with clusters, or "split", regular launches; the same bits.

    On CUDA tensors it runs on PyTorch's current stream; on CPU tensors the reference runs (position is read then).
    Beside the results a call takes `BlockPlan.scratch_bytes` of device memory until it has run. Raises ArgumentError
    naming the argument, UnsupportedModelError for shapes that the kernels do not run, DeviceError and CompileError.
    Inference only: no gradient is recorded.
    """
    tensors = {"x": x, "k_cache": k_cache, "v_cache": v_cache, "cos": cos, "sin": sin}
    if isinstance(position, Tensor):
        tensors["position"] = position
    for name, tensor in tensors.items():
        require_dense(name, tensor)
    weights = layer_tensors(layer_weights)
    where = "qkv_weight" if "qkv_weight" in weights else "q_weight"
    device = weights[where].device
    require(where, f"on {device}", device.type in ("cpu", "cuda"), "a CPU or CUDA tensor")
    for name, tensor in (tensors | weights).items():
        # Among them one on "meta" would make the operator infer shapes and compute nothing.
        if tensor.device != device:
            raise ArgumentError(f"{name} is on {tensor.device}; it must be on {device}, as {where} is")
    if not torch.compiler.is_compiling():
        require_not_negated("k_cache", k_cache)  # of one PyTorch would hand the operator a copy
        require_not_negated("v_cache", v_cache)
    check_heads(weights)
    check_views(weights)
    w, head_dim = layer_weights, layer_weights.q_weight.shape[1]
    llama = w.input_norm_bias is None
    if activation is None:
        activation = "silu" if llama else "gelu"
    if parallel_residual is None:
        parallel_residual = not llama
    rotary_dim, eps = checked_options(head_dim, rotary_dim, eps, activation, parallel_residual, form, pairing)
    if not isinstance(position, Tensor):
        position = _position_tensor(position, k_cache)
    options = (rotary_dim, eps, activation, parallel_residual, form, pairing)
    with torch.no_grad():
        call = _call if w.qkv_weight is not None else call_separate
        return call(x, position, w, k_cache, v_cache, cos, sin, *options)


def _call(
    x: Tensor, position: Tensor, w: LayerWeights, k_cache: Tensor, v_cache: Tensor, cos: Tensor, sin: Tensor,
    rotary_dim: int, eps: float, activation: str, parallel_residual: bool, form: str, pairing: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return torch.ops.clusterfusion.decoder_layer(
        x,
        position,
        w.qkv_weight,
        w.qkv_bias,
        w.o_weight,
        w.o_bias,
        w.up_weight,
        w.up_bias,
        w.down_weight,
        w.down_bias,
        w.input_norm_weight,
        w.input_norm_bias,
        w.post_norm_weight,
        w.post_norm_bias,
        k_cache,
        v_cache,
        cos,
        sin,
        w.q_weight.shape[0],
        rotary_dim,
        eps,
        activation,
        parallel_residual,
        form,
        pairing,
    )


def _position_tensor(position: object, k_cache: Tensor) -> Tensor:
    shape = list(k_cache.shape)
    if len(shape) not in (2, 3) or not shape[-2]:
        raise ArgumentError(f"k_cache is of shape {shape}; it must be {CACHE_SHAPES}, max_len being 1 or more")
    number, max_len = index_of(position), shape[-2]
    if number is None or not 0 <= number < max_len:
        raise ArgumentError(
            f"position is {shown(position)}; it must be an int from 0 to {max_len - 1}, the last row of k_cache, or an "
            "int32 tensor of one element"
        )
    return torch.full((1,), number, dtype=torch.int32, device=k_cache.device)


_SCHEMA = (
    "(Tensor x, Tensor position, Tensor qkv_weight, Tensor? qkv_bias, Tensor o_weight, Tensor? o_bias, Tensor up_weight, "
    "Tensor? up_bias, Tensor down_weight, Tensor? down_bias, Tensor input_norm_weight, Tensor input_norm_bias, "
    "Tensor post_norm_weight, Tensor post_norm_bias, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cos, Tensor sin, "
    "int heads, int rotary_dim, float eps, str activation, bool parallel_residual, str form, str pairing='halves') "
    "-> (Tensor, Tensor, Tensor)"
)


@torch.library.custom_op("clusterfusion::decoder_layer", mutates_args=("k_cache", "v_cache"), schema=_SCHEMA)
@torch.no_grad()
def _decoder_layer(
    x: Tensor,
    position: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    o_weight: Tensor,
    o_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    input_norm_weight: Tensor,
    input_norm_bias: Tensor,
    post_norm_weight: Tensor,
    post_norm_bias: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    rotary_dim: int,
    eps: float,
    activation: str,
    parallel_residual: bool,
    form: str,
    pairing: str = "halves",
) -> tuple[Tensor, Tensor, Tensor]:
    weights = gpt_neox_layer(
        qkv_weight, qkv_bias, o_weight, o_bias, up_weight, up_bias, down_weight, down_bias,
        input_norm_weight, input_norm_bias, post_norm_weight, post_norm_bias, heads=heads,
    )  # fmt: skip
    check_qkv(qkv_weight, qkv_bias)
    options = (rotary_dim, eps, activation, parallel_residual, form, pairing)
    return checked_run(x, position, weights, k_cache, v_cache, cos, sin, *options)


@_decoder_layer.register_fake
def _(
    x: Tensor,
    position: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    o_weight: Tensor,
    o_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    input_norm_weight: Tensor,
    input_norm_bias: Tensor,
    post_norm_weight: Tensor,
    post_norm_bias: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    rotary_dim: int,
    eps: float,
    activation: str,
    parallel_residual: bool,
    form: str,
    pairing: str = "halves",
) -> tuple[Tensor, Tensor, Tensor]:
    new = (heads, qkv_weight.shape[1] // heads)
    return x.new_empty(x.shape), qkv_weight.new_empty(new), qkv_weight.new_empty(new)
