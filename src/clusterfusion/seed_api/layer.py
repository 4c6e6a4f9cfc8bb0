"""A layer at one token, whole or in two halves: checked, then computed on the CPU or launched on the GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from clusterfusion import reference
from clusterfusion.jit.decoder_block import KvCache, LayerArguments, LayerTensors, Workspace
from clusterfusion.ops.layer import decoder_layer
from clusterfusion.ops.layer_checks import Form, check_apart, check_writable
from clusterfusion.ops.layer_launch import (
    LayerBuffers,
    LayerScratch,
    RotaryTables,
    layer_arguments,
    plan_for,
    prepare_layer,
)
from clusterfusion.ops.layer_run import dense, error_record
from clusterfusion.plan.block import Segment
from clusterfusion.seed_api.checks import Shape, check, check_caches, checked_position, device_of
from clusterfusion.weights import LayerWeights, gpt_neox_layer

Results = tuple[Tensor, Tensor, Tensor]


def weights_of(shape: Shape, *tensors: Tensor) -> LayerWeights:
    """Of matrices and vectors in gpt_neox_layer's order; vectors may be [1, n]."""
    flat = (t.view(-1) if t.shape[0] == 1 else t for t in tensors)
    return gpt_neox_layer(*flat, heads=shape.config.num_heads)


def decode(
    shape: Shape, form: Form, input: Tensor, weights: LayerWeights, k_cache: Tensor, v_cache: Tensor,
    position: int | Tensor, cos: Tensor, sin: Tensor,
) -> Results:  # fmt: skip
    c = shape.config
    out, k_new, v_new = decoder_layer(
        input, weights, k_cache, v_cache, position, cos, sin, rotary_dim=c.rotary.dim, eps=c.norm_eps, form=form
    )
    return out, k_new[None], v_new[None]


def layer(
    shape: Shape, form: Form, input: Tensor, weight_qkv: Tensor, bias_qkv: Tensor, weight_o: Tensor, bias_o: Tensor,
    k_cache: Tensor, v_cache: Tensor, ln_weight: Tensor, ln_bias: Tensor, cos: Tensor, sin: Tensor,
    post_ln_weight: Tensor, post_ln_bias: Tensor, mlp_up_weight: Tensor, mlp_up_bias: Tensor,
    mlp_down_weight: Tensor, mlp_down_bias: Tensor, current_seq_len: int | Tensor,
) -> Results:  # fmt: skip
    device = device_of("input", input)
    check(
        shape, device, input=input, weight_qkv=weight_qkv, bias_qkv=bias_qkv, weight_o=weight_o, bias_o=bias_o,
        ln_weight=ln_weight, ln_bias=ln_bias, cos=cos, sin=sin, post_ln_weight=post_ln_weight,
        post_ln_bias=post_ln_bias, mlp_up_weight=mlp_up_weight, mlp_up_bias=mlp_up_bias,
        mlp_down_weight=mlp_down_weight, mlp_down_bias=mlp_down_bias,
    )  # fmt: skip
    check_caches(shape, device, k_cache, v_cache)
    check_apart("input", input, shape.by_heads(k_cache), shape.by_heads(v_cache))
    position = checked_position(current_seq_len, k_cache.shape[0], device)
    weights = weights_of(
        shape, weight_qkv, bias_qkv, weight_o, bias_o, mlp_up_weight, mlp_up_bias, mlp_down_weight, mlp_down_bias,
        ln_weight, ln_bias, post_ln_weight, post_ln_bias,
    )  # fmt: skip
    return decode(shape, form, input, weights, k_cache, v_cache, position, cos, sin)


@torch.no_grad()
def attention_only(
    shape: Shape, input: Tensor, weight_qkv: Tensor, bias_qkv: Tensor, weight_o: Tensor, bias_o: Tensor,
    k_cache: Tensor, v_cache: Tensor, ln_weight: Tensor, ln_bias: Tensor, cos: Tensor, sin: Tensor,
    post_ln_weight: Tensor, post_ln_bias: Tensor, mlp_up_weight: Tensor, mlp_up_bias: Tensor,
    current_seq_len: int | Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    device, c = device_of("input", input), shape.config
    check(
        shape, device, input=input, weight_qkv=weight_qkv, bias_qkv=bias_qkv, weight_o=weight_o, bias_o=bias_o,
        ln_weight=ln_weight, ln_bias=ln_bias, cos=cos, sin=sin, post_ln_weight=post_ln_weight,
        post_ln_bias=post_ln_bias, mlp_up_weight=mlp_up_weight, mlp_up_bias=mlp_up_bias,
    )  # fmt: skip
    check_caches(shape, device, k_cache, v_cache)
    k, v = shape.by_heads(k_cache), shape.by_heads(v_cache)
    check_writable(k, v)
    check_apart("input", input, k, v)
    position = checked_position(current_seq_len, k_cache.shape[0], device)
    not_read = mlp_up_weight.view(c.hidden_size, -1)  # in the place of the down projection, which does not run here
    weights = weights_of(
        shape, weight_qkv, bias_qkv, weight_o, bias_o, mlp_up_weight, mlp_up_bias, not_read, bias_o,
        ln_weight, ln_bias, post_ln_weight, post_ln_bias,
    )  # fmt: skip
    if device.type == "cuda":
        attended, h, k_new, v_new = _attention_on_gpu(shape, input, weights, k, v, position, cos, sin)
    else:
        assert isinstance(position, int)
        attended, h, k_new, v_new = _attention_on_cpu(shape, input, weights, k, v, position, cos, sin)
    return attended, h, k_new[None], v_new[None]


@torch.autocast("cpu", enabled=False)
def _attention_on_cpu(
    shape: Shape, input: Tensor, weights: LayerWeights, k: Tensor, v: Tensor, position: int, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    c, x = shape.config, input.float()
    cos, sin = (table[:, : c.rotary.dim].unflatten(1, (2, -1)) for table in (cos, sin))
    normed = reference.norm(c, x, weights.input_norm_weight, weights.input_norm_bias)
    attended = reference.attention(c, weights, normed, cos, sin, k, v, position, dtype=k.dtype).to(k.dtype)
    normed = reference.norm(c, x, weights.post_norm_weight, weights.post_norm_bias)
    up = reference.linear(normed, weights.up_weight, weights.up_bias, k.dtype)
    h = reference.activation(c, up)[0].to(k.dtype)
    k_new, v_new = (t[:, position].clone() for t in (k, v))
    return attended, h, k_new, v_new


def _attention_on_gpu(
    shape: Shape, input: Tensor, weights: LayerWeights, k: Tensor, v: Tensor, position: int | Tensor,
    cos: Tensor, sin: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Segments of the sequential form. There `output` adds x to attention's result and leaves the sum in `middle`, in
    float32, from which `expand` takes norm 2: here x is zero in the one and the sum is x in the other."""
    index, half = input.device.index, shape.config.rotary.dim // 2
    plan = plan_for(shape.sequential, index)
    error = error_record(index)
    error.check("This is said once", forget=True)
    with torch.cuda.device(index):
        x = dense(input)
        x_in_float32, zeros = x.float(), torch.zeros_like(x)
        if not isinstance(position, Tensor):
            position = torch.full((1,), position, dtype=torch.int32, device=x.device)
        k_new, v_new = (k.new_empty(k.shape[0], k.shape[2]) for _ in range(2))
        scratch = LayerScratch(plan, k.dtype, x.device)
        attended, h = scratch.tensors["middle"], scratch.tensors["h"]
        for result in (attended, h):
            result.fill_(torch.nan)  # and so they stay if the position is not in the cache
        # Nothing writes `out`: `contract` does not run.
        buffers = LayerBuffers(x, zeros, k, v, position, RotaryTables(cos, sin, 0, half), k_new, v_new)
        arguments = layer_arguments(plan, weights, buffers, scratch, error)
        segments: tuple[Segment, ...] = ("project", "attend", "output", "expand")
        project, attend, output, expand = prepare_layer(plan, k.dtype, x.dtype, segments, arguments, index)
        project()
        attend()
        arguments.x = zeros.data_ptr()  # a launch takes the arguments as they are when it is made
        output()
        arguments.middle = x_in_float32.data_ptr()
        expand()
        return attended.to(x.dtype)[None], h, k_new, v_new


@torch.no_grad()
def mlp_only(
    shape: Shape, input: Tensor, attn_output: Tensor, mlp_intermediate: Tensor, mlp_down_weight: Tensor,
    mlp_down_bias: Tensor,
) -> Tensor:  # fmt: skip
    device = device_of("input", input)
    check(
        shape, device, input=input, attn_output=attn_output, mlp_intermediate=mlp_intermediate,
        mlp_down_weight=mlp_down_weight, mlp_down_bias=mlp_down_bias,
    )  # fmt: skip
    middle, h = input.float() + attn_output.float(), mlp_intermediate.view(-1)
    if device.type == "cpu":
        with torch.autocast("cpu", enabled=False):
            down = reference.linear(h[None], mlp_down_weight, mlp_down_bias.view(-1), h.dtype)
        return (middle + down).to(input.dtype)
    plan = plan_for(shape.sequential, device.index)
    error = error_record(device.index)
    error.check("This is said once", forget=True)
    with torch.cuda.device(device):
        out, h = torch.empty_like(input), dense(h)
        position = torch.zeros(1, dtype=torch.int32, device=device)
        arguments = LayerArguments(
            layer=LayerTensors(down_weight=mlp_down_weight.data_ptr(), down_bias=mlp_down_bias.data_ptr()),
            cache=KvCache(max_len=1),  # not read; position 0 is in it
            workspace=Workspace(h=h.data_ptr(), error=error.address),
            position=position.data_ptr(),
            middle=middle.data_ptr(),
            out=out.data_ptr(),
        )
        (contract,) = prepare_layer(plan, h.dtype, out.dtype, ("contract",), arguments, device.index)
        contract()
    return out
