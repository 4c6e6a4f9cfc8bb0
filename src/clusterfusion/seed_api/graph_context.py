"""Graph contexts: the fused layer over buffers of its own, captured once and replayed at every position."""

from __future__ import annotations

import dataclasses
import threading

import torch
from torch import Tensor

from clusterfusion.arguments import as_int, index_of, require, require_not_negated, shown
from clusterfusion.errors import ArgumentError
from clusterfusion.ops.layer_checks import check_apart, check_writable
from clusterfusion.ops.layer_launch import (
    CAPTURE_LOCK,
    ErrorRecord,
    LayerBuffers,
    LayerScratch,
    RotaryTables,
    layer_arguments,
    plan_for,
    prepare_layer,
)
from clusterfusion.ops.layer_run import error_record
from clusterfusion.plan import BlockPlan
from clusterfusion.seed_api.checks import Shape, check, check_caches, checked_position, device_of
from clusterfusion.seed_api.layer import Results, decode, weights_of
from clusterfusion.weights import LayerWeights, gpt_neox_layer

# What a step brings, by the kernel's names; q's, k's and v's biases are one, as their matrices are.
VECTORS = ("norm1_weight", "norm1_bias", "norm2_weight", "norm2_bias", "q_bias", "o_bias", "up_bias", "down_bias")
GRAPHS_KEPT = 4  # of a context: one for each set of norm weights and biases; then the oldest goes

_CONTEXTS: dict[tuple[str, int], _Context] = {}
_CONTEXTS_LOCK = threading.Lock()


def graph_context_bytes(plan: BlockPlan) -> int:
    """Device memory of one graph context beside caches and weights: `plan.scratch_bytes`, and in static buffers the
    input, the three results, cos and sin, and the position."""
    c = plan.config
    return plan.scratch_bytes + 2 * 4 * c.hidden_size + 4 * 2 * c.head_dim + 4


class _Replayer:
    """A context's static buffers on a GPU, and the fused launch over them in graphs that serve every position."""

    @torch.inference_mode(False)  # its buffers are written in place later, in whatever mode the caller is in then
    def __init__(self, shape: Shape, weights: LayerWeights, k: Tensor, v: Tensor) -> None:
        c, device, dtype = shape.config, k.device, k.dtype
        plan = plan_for(c, device.index)
        self._input = torch.empty(1, c.hidden_size, dtype=dtype, device=device)
        self._results = torch.empty(3, c.hidden_size, dtype=dtype, device=device)
        self._angles = torch.empty(2, c.head_dim, dtype=torch.float32, device=device)
        self._position = torch.empty(1, dtype=torch.int32, device=device)
        self._scratch = LayerScratch(plan, dtype, device)
        self._error = ErrorRecord()
        (out, k_new, v_new), (cos, sin) = self._results, self._angles
        tables = RotaryTables(cos, sin, row_stride=0, second_angles=c.rotary.dim // 2)
        buffers = LayerBuffers(self._input, out, k, v, self._position, tables, k_new, v_new)
        self._arguments = layer_arguments(plan, weights, buffers, self._scratch, self._error)
        (self._launch,) = prepare_layer(plan, dtype, dtype, ("whole",), self._arguments, device.index)
        torch.cuda.current_stream().synchronize()  # steps may come on other streams
        self._graphs: dict[tuple[int, ...], tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]] = {}

    @torch.inference_mode(False)
    @torch.no_grad()  # inside: leaving inference mode turns gradients on
    def step(
        self, input: Tensor, cos: Tensor, sin: Tensor, position: int | Tensor, vectors: dict[str, Tensor]
    ) -> Tensor:
        """`vectors` by VECTORS. Returns [3, hidden]: the output, and keys and values of all heads."""
        self._error.check("Destroy the context and create it again")
        self._input.copy_(input)
        torch.cat((cos, sin), out=self._angles)
        if isinstance(position, Tensor):
            self._position.copy_(position.reshape(1))
        else:
            self._position.fill_(position)
        addresses = tuple(t.data_ptr() for t in vectors.values())
        if addresses in self._graphs:
            self._graphs[addresses][0].replay()
        else:
            self._run_and_capture(addresses, vectors)
        return self._results.clone()

    def _run_and_capture(self, addresses: tuple[int, ...], vectors: dict[str, Tensor]) -> None:
        for name, address in zip(vectors, addresses, strict=True):
            setattr(self._arguments.layer, name, address)
        self._launch()
        with CAPTURE_LOCK:
            if len(self._graphs) == GRAPHS_KEPT:
                torch.cuda.synchronize()  # the oldest may still be running
                del self._graphs[next(iter(self._graphs))]
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
                self._launch()
        self._graphs[addresses] = graph, tuple(t.detach() for t in vectors.values())  # what it reads stays


@dataclasses.dataclass
class _Context:
    """What the id of a graph context stands for."""

    k_cache: Tensor
    v_cache: Tensor
    by_heads: tuple[Tensor, Tensor]  # the same, [heads, max_len, head_dim]
    matrices: tuple[Tensor, Tensor, Tensor, Tensor]  # qkv, o, up, down
    max_seq_len: int
    replayer: _Replayer | None  # on a GPU
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)  # one step at a time
    destroyed: bool = False


def create(
    shape: Shape, ctx_id: int, k_cache: Tensor, v_cache: Tensor, weight_qkv: Tensor, weight_o: Tensor,
    mlp_up_weight: Tensor, mlp_down_weight: Tensor, max_seq_len: int,
) -> None:  # fmt: skip
    ctx_id = _checked_id(ctx_id)
    with _CONTEXTS_LOCK:
        if (shape.name, ctx_id) in _CONTEXTS:
            raise _taken(shape, ctx_id)
    device = device_of("k_cache", k_cache)
    check_caches(shape, device, k_cache, v_cache)
    # Aliases: whatever the caller makes of his tensor objects, this memory stays.
    k_cache, v_cache = k_cache.detach(), v_cache.detach()
    k, v = shape.by_heads(k_cache), shape.by_heads(v_cache)
    check_writable(k, v)
    check(
        shape, device, weight_qkv=weight_qkv, weight_o=weight_o, mlp_up_weight=mlp_up_weight,
        mlp_down_weight=mlp_down_weight,
    )  # fmt: skip
    room = k_cache.shape[0]
    max_seq_len = as_int("max_seq_len", max_seq_len, 1, room, f"an int from 1 to {room}, k_cache's rows")
    _refuse_capture(device, "created")
    qkv, o, up, down = (t.detach() for t in (weight_qkv, weight_o, mlp_up_weight, mlp_down_weight))
    replayer = None
    if device.type == "cuda":
        norm = o[0]  # some vector, until a step brings the norms' own
        weights = gpt_neox_layer(
            qkv, None, o, None, up, None, down, None, norm, norm, norm, norm, heads=shape.config.num_heads
        )
        with torch.cuda.device(device):
            error_record(device.index)  # page-locked memory, which steps inside a caller's capture could not take
            replayer = _Replayer(shape, weights, k[:, :max_seq_len], v[:, :max_seq_len])
    with _CONTEXTS_LOCK:
        if (shape.name, ctx_id) in _CONTEXTS:
            raise _taken(shape, ctx_id)
        _CONTEXTS[shape.name, ctx_id] = _Context(k_cache, v_cache, (k, v), (qkv, o, up, down), max_seq_len, replayer)


@torch.no_grad()
def step(
    shape: Shape, ctx_id: int, input: Tensor, ln_weight: Tensor, ln_bias: Tensor, bias_qkv: Tensor, bias_o: Tensor,
    cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, post_ln_weight: Tensor, post_ln_bias: Tensor,
    mlp_up_bias: Tensor, mlp_down_bias: Tensor, current_seq_len: int | Tensor,
) -> Results:  # fmt: skip
    ctx_id = _checked_id(ctx_id)
    context = _context(shape, ctx_id)
    device = context.k_cache.device
    check(
        shape, device, input=input, ln_weight=ln_weight, ln_bias=ln_bias, bias_qkv=bias_qkv, bias_o=bias_o, cos=cos,
        sin=sin, post_ln_weight=post_ln_weight, post_ln_bias=post_ln_bias, mlp_up_bias=mlp_up_bias,
        mlp_down_bias=mlp_down_bias,
    )  # fmt: skip
    _check_same_memory("k_cache", k_cache, context.k_cache)
    _check_same_memory("v_cache", v_cache, context.v_cache)
    check_apart("input", input, *context.by_heads)
    position = checked_position(current_seq_len, context.max_seq_len, device)
    with context.lock:
        if context.destroyed:
            raise _unknown(shape, ctx_id)
        if context.replayer is None or _is_capturing(device):
            qkv, o, up, down = context.matrices
            weights = weights_of(
                shape, qkv, bias_qkv, o, bias_o, up, mlp_up_bias, down, mlp_down_bias, ln_weight, ln_bias,
                post_ln_weight, post_ln_bias,
            )  # fmt: skip
            k, v = (cache[: context.max_seq_len] for cache in (context.k_cache, context.v_cache))
            return decode(shape, "fused", input, weights, k, v, position, cos, sin)
        given = (ln_weight, ln_bias, post_ln_weight, post_ln_bias, bias_qkv, bias_o, mlp_up_bias, mlp_down_bias)
        vectors = dict(zip(VECTORS, given, strict=True))
        with torch.cuda.device(device):
            out, k_new, v_new = context.replayer.step(input, cos, sin, position, vectors).unsqueeze(1)
    by_heads = (1, shape.config.num_heads, shape.config.head_dim)
    return out, k_new.view(by_heads), v_new.view(by_heads)


def destroy(shape: Shape, ctx_id: int) -> None:
    ctx_id = _checked_id(ctx_id)
    context = _context(shape, ctx_id)
    device = context.k_cache.device
    with context.lock:
        if context.destroyed:
            raise _unknown(shape, ctx_id)
        _refuse_capture(device, "destroyed")
        context.destroyed = True
        with _CONTEXTS_LOCK:
            del _CONTEXTS[shape.name, ctx_id]
        if device.type == "cuda":
            with CAPTURE_LOCK:
                torch.cuda.synchronize(device)  # queued steps still read and write the context's memory


def _checked_id(ctx_id: object) -> int:
    number = index_of(ctx_id)
    if number is None:
        raise ArgumentError(f"ctx_id is {shown(ctx_id)}; it must be an int")
    return number


def _context(shape: Shape, ctx_id: int) -> _Context:
    with _CONTEXTS_LOCK:
        context = _CONTEXTS.get((shape.name, ctx_id))
    if context is None:
        raise _unknown(shape, ctx_id)
    return context


def _taken(shape: Shape, ctx_id: int) -> ArgumentError:
    way_out = f"{shape.name}_destroy_graph_context of it must come first"
    return ArgumentError(f"ctx_id is {shown(ctx_id)}, which a context has; it must be another, or {way_out}")


def _unknown(shape: Shape, ctx_id: int) -> ArgumentError:
    makes = f"{shape.name}_create_graph_context"
    return ArgumentError(
        f"ctx_id is {shown(ctx_id)}; it must be that of a context that {makes} made and nobody destroyed"
    )


def _is_capturing(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _refuse_capture(device: torch.device, what: str) -> None:
    if _is_capturing(device):
        raise ArgumentError(
            f"a graph context cannot be {what} while the stream is being captured: do so before or after"
        )


def _check_same_memory(name: str, given: object, own: Tensor) -> None:
    """Raise ArgumentError unless `given` is a tensor over the very memory of `own`, laid out alike."""
    needed = "the tensor that the context was created with"
    if not isinstance(given, Tensor):
        raise ArgumentError(f"{name} is a {type(given).__name__}; it must be {needed}")
    layout = "nested" if given.is_nested else given.layout
    require(name, f"of layout {layout}", layout == torch.strided, needed)
    require_not_negated(name, given)
    seen, expected = ((t.data_ptr(), t.shape, t.stride(), t.dtype, t.device) for t in (given, own))
    if seen != expected:
        raise ArgumentError(
            f"{name} is (address, shape, strides, dtype, device) {seen}; it must be {needed}: {expected}"
        )
