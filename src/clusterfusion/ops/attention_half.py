"""The attention half of a decoder layer with RMSNorm at one token, whose new key and value go beside the cache instead of into it."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from clusterfusion import reference
from clusterfusion.architecture import DecoderConfig
from clusterfusion.jit.decoder_block import KvCache, LayerArguments, LayerTensors, cache_map
from clusterfusion.ops.layer_launch import (
    ELEMENT_TYPES,
    ErrorRecord,
    LayerScratch,
    RotaryTables,
    address,
    plan_for,
    prepare_layer,
    require_streamable_cache,
    workspace,
)
from clusterfusion.ops.layer_run import angles_at, dense, error_record
from clusterfusion.ops.norm import rms_norm
from clusterfusion.plan import BlockPlan
from clusterfusion.plan.block import Segment
from clusterfusion.plan.sizes import PARTIAL_PADDING
from clusterfusion.weights import llama_layer

WeightOrder = Literal["output_major", "input_major"]
_SEGMENTS: tuple[Segment, ...] = ("project", "attend", "output")


@dataclasses.dataclass(frozen=True)
class AttentionWeights:
    """Matrices [outputs, inputs], as nn.Linear holds them, or input-major: [inputs, outputs]. All of one dtype of 16 bits."""

    norm: Tensor  # [hidden]
    q: Tensor  # heads * head_dim outputs
    k: Tensor  # kv_heads * head_dim outputs
    v: Tensor
    o: Tensor  # hidden outputs
    order: WeightOrder


@dataclasses.dataclass(frozen=True)
class NewToken:
    """What attention looks at beside the weights, and where its key and value go."""

    x: Tensor  # [hidden]
    k_cache: Tensor  # [kv_heads, n, head_dim], any strides between heads and tokens; n may be 0
    v_cache: Tensor
    position: Tensor  # [1], int32: n
    tables: RotaryTables
    k_new: Tensor  # [kv_heads, head_dim]
    v_new: Tensor


@torch.no_grad()
def attention_half(
    config: DecoderConfig, weights: AttentionWeights, x: Tensor, k_cache: Tensor, v_cache: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """RMSNorm of x, q, k, v, rotary, attention over all cached tokens and the new one, output projection; x is not added.
    Returns (output, k_new, v_new), the last two [kv_heads, head_dim].

    config: with RMSNorm and sequential residual, without biases. x: [1, hidden], of the weights' dtype, as are the caches
    [kv_heads, n, head_dim], which are not written. cos, sin: float32 [1, rotary_dim / 2], or [1, rotary_dim], an angle for each
    dimension.

    Sums are float32. k, v and the output are rounded to the weights' dtype, and nothing else, but on a GPU with input-major
    weights: there the normed x, the queries and attention's result are, too.

    The caller has checked everything. Raises UnsupportedModelError, DeviceError and CompileError.
    """
    half = config.rotary.dim // 2
    tables = RotaryTables(cos, sin, 0, half if half and cos.shape[1] != half else 0)
    with torch.autocast(x.device.type, enabled=False):
        run = _on_cpu if x.device.type == "cpu" else _on_gpu
        return run(config, weights, x, k_cache, v_cache, tables)


def _on_cpu(
    config: DecoderConfig, weights: AttentionWeights, x: Tensor, k_cache: Tensor, v_cache: Tensor, tables: RotaryTables
) -> tuple[Tensor, Tensor, Tensor]:
    w, n = weights, k_cache.shape[1]
    q, k, v, o = (matrix if w.order == "output_major" else matrix.T for matrix in (w.q, w.k, w.v, w.o))
    # o in the place of the MLP's matrices, which do not run here.
    layer = llama_layer(q, k, v, o, o, o, o, w.norm, w.norm, heads=config.num_heads, kv_heads=config.num_kv_heads)
    keys, values = (
        torch.cat((cache, cache.new_empty(cache.shape[0], 1, cache.shape[2])), 1) for cache in (k_cache, v_cache)
    )
    normed = reference.norm(config, x.float(), w.norm, None)
    cos, sin = angles_at(config, tables, 0)
    out = reference.attention(config, layer, normed, cos, sin, keys, values, n, dtype=torch.float32)
    return out.to(x.dtype), keys[:, n].clone(), values[:, n].clone()


def _on_gpu(
    config: DecoderConfig, weights: AttentionWeights, x: Tensor, k_cache: Tensor, v_cache: Tensor, tables: RotaryTables
) -> tuple[Tensor, Tensor, Tensor]:
    index, n = x.device.index, k_cache.shape[1]
    plan = plan_for(config, index)
    error = error_record(index)
    error.check("This is said once", forget=True)
    with torch.cuda.device(index):
        position = torch.full((1,), n, dtype=torch.int32, device=x.device)
        k_new, v_new = (x.new_empty(config.num_kv_heads, config.head_dim) for _ in range(2))
        token = NewToken(dense(x), k_cache, v_cache, position, tables, k_new, v_new)
        scratch = LayerScratch(plan, x.dtype, x.device)
        arguments = half_arguments(plan, weights, token, scratch, error)
        launched = launch_segments if weights.order == "output_major" else launch_between_products
        out = launched(plan, weights, token, scratch, arguments, index)
    return out[None], k_new, v_new


def half_arguments(
    plan: BlockPlan, weights: AttentionWeights, token: NewToken, scratch: LayerScratch, error: ErrorRecord
) -> LayerArguments:
    """Of `project`, `attend` and `output`, which read nothing of the MLP. What `attend` writes to row n of a cache goes to k_new
    and v_new, from head to head without a step for tokens; what it reads of the cache goes through the maps."""
    config, w = plan.config, weights
    k, v = token.k_cache, token.v_cache
    if not k.shape[1]:  # a map needs a token, though nobody reads it
        k, v = (new[:, None] for new in (token.k_new, token.v_new))
    require_streamable_cache(k, v)
    matrices = {}
    if w.order == "output_major":
        matrices = {f"{name}_weight": address(f"{name}_weight", getattr(w, name)) for name in "qkvo"}
    dtype = ELEMENT_TYPES[w.o.dtype]
    return LayerArguments(
        k_map=cache_map(plan, dtype, k),
        v_map=cache_map(plan, dtype, v),
        layer=LayerTensors(norm1_weight=address("norm_weight", w.norm), **matrices),
        cache=KvCache(
            k_cache=token.k_new.data_ptr(),
            v_cache=token.v_new.data_ptr(),
            head_stride=config.head_dim,
            token_stride=0,
            max_len=token.k_cache.shape[1] + 1,
        ),
        workspace=workspace(plan, token.tables, scratch, error),
        position=token.position.data_ptr(),
        x=token.x.data_ptr(),
        middle=scratch.tensors["middle"].data_ptr(),
    )


def launch_segments(
    plan: BlockPlan, weights: AttentionWeights, token: NewToken, scratch: LayerScratch, arguments: LayerArguments, index: int
) -> Tensor:  # fmt: skip
    """The half in segments of the sequential form. `output` adds x to attention's result, in float32: here a zero."""
    dtype = token.x.dtype
    zeros = torch.zeros_like(token.x)
    project, attend, output = prepare_layer(plan, weights.o.dtype, dtype, _SEGMENTS, arguments, index)
    project()
    attend()
    arguments.x = zeros.data_ptr()  # a launch takes the arguments as they are when it is made
    output()
    return scratch.tensors["middle"].to(dtype)


def launch_between_products(
    plan: BlockPlan, weights: AttentionWeights, token: NewToken, scratch: LayerScratch, arguments: LayerArguments, index: int
) -> Tensor:  # fmt: skip
    """The half with input-major matrices, which the program does not read: its `attend` between PyTorch's products."""
    c, w = plan.config, weights
    (attend,) = prepare_layer(plan, w.o.dtype, token.x.dtype, ("attend",), arguments, index)
    normed = rms_norm(token.x[None], w.norm, c.norm_eps)
    q, k, v = (torch.matmul(normed, matrix) for matrix in (w.q, w.k, w.v))
    fill_qkv(c, scratch.tensors["qkv"], q, k, v)
    attend()
    attended = merged_partials(plan, scratch.tensors["partials"], token.k_cache.shape[1])
    return torch.matmul(attended.to(w.o.dtype)[None], w.o)[0]


def fill_qkv(config: DecoderConfig, scratch: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Leaves q [1, heads * head_dim] and k, v [1, kv_heads * head_dim] where `project` does: float32, K/V head by K/V head, the
    queries that share it, its key, its value."""
    parts = [t.view(config.num_kv_heads, -1) for t in (q, k, v)]
    rows = torch.cat(parts, 1).flatten()
    scratch.view(torch.float32)[: rows.numel()].copy_(rows)


def merged_partials(plan: BlockPlan, partials: Tensor, position: int) -> Tensor:
    """Attention's output, float32 [heads * head_dim], of what `attend` leaves in the scratch: for each head, parts of so many
    values, their maximum score, in units of log2, and the sum of their weights."""
    c, width = plan.config, plan.config.head_dim + PARTIAL_PADDING
    floats = partials.view(torch.float32)[: c.num_heads * plan.partials_per_head * width]
    parts = floats.view(c.num_heads, plan.partials_per_head, width)[:, : plan.used_partials(position)]
    values, maximum, total, _ = parts.split((c.head_dim, 1, 1, PARTIAL_PADDING - 2), -1)
    weight = torch.exp2(maximum - maximum.amax(1, keepdim=True))
    return ((weight * values).sum(1) / (weight * total).sum(1)).flatten()
