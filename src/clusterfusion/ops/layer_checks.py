"""What `decoder_layer` asks of its arguments. Every message names the argument, what came and what is needed."""

from __future__ import annotations

import dataclasses
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from clusterfusion.architecture import Activation, DecoderConfig, RotaryConfig
from clusterfusion.arguments import as_float, as_int, require, require_dense, require_not_negated, shown
from clusterfusion.errors import ArgumentError
from clusterfusion.ops.layer_launch import RotaryTables
from clusterfusion.weights import LayerWeights

Form = Literal["fused", "split"]
Pairing = Literal["halves", "neighbours"]

FORMS, PAIRINGS = get_args(Form), get_args(Pairing)
WEIGHT_DTYPES = (torch.float16, torch.bfloat16)
WITH_ADDRESS = (Tensor, torch.nn.Parameter)  # subclasses, FakeTensor among them, need not have one
X_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ACTIVATIONS = get_args(Activation)
MAY_BE_NONE = ("qkv_bias", "q_bias", "k_bias", "v_bias", "o_bias", "gate_weight", "gate_bias", "up_bias", "down_bias")
LEAST_EPS, LARGEST_EPS = 2.0**-149, torch.finfo(torch.float32).max  # in float32 not 0, and not infinite
CACHE_SHAPES = "[kv_heads, max_len, head_dim] or [max_len, kv_heads * head_dim]"


def require_tensor(name: str, tensor: object, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Raise ArgumentError unless `tensor` is a dense tensor of that shape and dtype, there. Not for torch.compile to follow."""
    require_dense(name, tensor, f"a tensor of shape {list(shape)}")
    assert isinstance(tensor, Tensor)
    require(name, f"of shape {list(tensor.shape)}", tuple(tensor.shape) == shape, f"of shape {list(shape)}")
    require(name, tensor.dtype, tensor.dtype == dtype, str(dtype))
    require(name, f"on {tensor.device}", tensor.device == device, f"on {device}")
    require(name, f"of strides {tensor.stride()}", tensor.is_contiguous(), "contiguous")
    require_not_negated(name, tensor)


def layer_tensors(weights: object) -> dict[str, Tensor]:
    """The tensors of a layer by the names of LayerWeights, without those that it lacks."""
    if not isinstance(weights, LayerWeights):
        raise ArgumentError(
            f"layer_weights is a {type(weights).__name__}; it must be a LayerWeights, from clusterfusion.gpt_neox_layer or "
            "clusterfusion.llama_layer"
        )
    w = weights
    fused = w.qkv_weight is not None
    if fused and (w.input_norm_bias is None or w.post_norm_bias is None or w.gate_weight is not None):
        raise ArgumentError(
            "layer_weights has qkv_weight, as a GPT-NeoX layer has: it must have norm biases and no gate"
        )
    if not fused and w.qkv_bias is not None:
        raise ArgumentError(
            "layer_weights has qkv_bias and no qkv_weight; q_bias, k_bias and v_bias go with three matrices"
        )
    if (w.input_norm_bias is None) != (w.post_norm_bias is None):
        raise ArgumentError("layer_weights has one norm bias of two; it must have both (LayerNorm) or none (RMSNorm)")
    if w.gate_bias is not None and w.gate_weight is None:
        raise ArgumentError("layer_weights has gate_bias and no gate_weight")
    lacking = MAY_BE_NONE if fused else (*MAY_BE_NONE, "qkv_weight", "input_norm_bias", "post_norm_bias")
    tensors = {}
    for field in dataclasses.fields(w):
        tensor = getattr(w, field.name)
        if tensor is not None or field.name not in lacking:
            require_dense(field.name, tensor)
            tensors[field.name] = tensor
    return tensors


def check_heads(tensors: dict[str, Tensor]) -> None:
    """Of `layer_tensors`: that q, k and v can be heads, where one matrix holds them of that one."""
    if "qkv_weight" not in tensors:
        shape = list(tensors["q_weight"].shape)
        require("q_weight", f"of shape {shape}", len(shape) == 3 and all(shape), "[heads, head_dim, hidden]")
        heads, head_dim, hidden = shape
        for name in ("k_weight", "v_weight"):
            shape = list(tensors[name].shape)
            fits = len(shape) == 3 and shape[0] > 0 and heads % shape[0] == 0 and shape[1:] == [head_dim, hidden]
            fits = fits and shape == list(tensors["k_weight"].shape)
            needed = f"[kv_heads, {head_dim}, {hidden}], kv_heads a divisor of {heads}, k and v alike"
            require(name, f"of shape {shape}", fits, needed)
        return
    shape = list(tensors["qkv_weight"].shape)
    require("qkv_weight", f"of shape {shape}", len(shape) == 2 and shape[0] == 3 * shape[1], "[3 * hidden, hidden]")
    require_weight_dtype("qkv_weight", tensors["qkv_weight"])
    hidden, q_shape = shape[1], list(tensors["q_weight"].shape)
    for name in ("q_weight", "k_weight", "v_weight"):
        shape = list(tensors[name].shape)
        fits = len(shape) == 3 and shape[0] * shape[1] == hidden == shape[2] and shape == q_shape
        needed = f"[heads, head_dim, {hidden}] with heads * head_dim = {hidden}, a view of qkv_weight"
        require(name, f"of shape {shape}", fits, needed)


def check_views(tensors: dict[str, Tensor]) -> None:
    """Of `layer_tensors`, whose shapes check_heads has seen: that q, k and v of a fused layer, which nothing reads, are the
    views that gpt_neox_layer cuts. Of tensors without an address, only that they could be."""
    if "qkv_weight" not in tensors:
        return
    shape = tensors["q_weight"].shape
    _check_cut("qkv_weight", ("q_weight", "k_weight", "v_weight"), tensors, shape)
    if "qkv_bias" in tensors:
        size, rows = list(tensors["qkv_bias"].shape), 3 * shape[2]
        require("qkv_bias", f"of shape {size}", size == [rows], f"of shape [{rows}]")
    _check_cut("qkv_bias", ("q_bias", "k_bias", "v_bias"), tensors, shape[:2])


def _check_cut(fused: str, parts: tuple[str, ...], tensors: dict[str, Tensor], shape: torch.Size) -> None:
    """That each of `parts` is of that shape, and lies in `fused` as one of three in every head."""
    whole = tensors.get(fused)
    address: int | None = None
    if whole is not None and not torch.compiler.is_compiling() and type(whole) in WITH_ADDRESS:
        address, inner = whole.data_ptr(), whole.stride()
        apart = shape[1] * inner[0]
        size = apart * whole.element_size()
    for i, name in enumerate(parts):
        part = tensors.get(name)
        if part is None or whole is None:
            if part is whole:
                continue
            has, lacks = (fused, name) if part is None else (name, fused)
            raise ArgumentError(f"layer_weights has {has} and no {lacks}; it must have both or none")
        fits = part.dtype == whole.dtype and part.shape == shape
        if fits and address is not None and type(part) in WITH_ADDRESS:
            found = part.stride()
            fits = found[1:] == inner and (found[0] == 3 * apart or shape[0] == 1)
            fits = fits and part.data_ptr() == address + i * size
        if not fits:
            raise ArgumentError(
                f"{name} is no view of {fused}; it must be the one that clusterfusion.gpt_neox_layer cuts: {fused} alone is "
                "read"
            )


def checked_options(
    head_dim: int,
    rotary_dim: object,
    eps: object,
    activation: object,
    parallel_residual: object,
    form: object,
    pairing: object = "halves",
) -> tuple[int, float]:
    """What says how the layer computes; `rotary_dim` and `eps` as Python's numbers."""
    even = f"an even int from 0 to {head_dim}, the size of a head"
    dim = as_int("rotary_dim", rotary_dim, 0, head_dim, even)
    require("rotary_dim", dim, dim % 2 == 0, even)
    epsilon = checked_eps(eps)
    choices = (("activation", activation, ACTIVATIONS), ("form", form, FORMS), ("pairing", pairing, PAIRINGS))
    for name, value, known in choices:
        if not (isinstance(value, str) and value in known):
            raise ArgumentError(f"{name} is {shown(value)}; it must be one of {known}")
    if not isinstance(parallel_residual, bool):
        raise ArgumentError(f"parallel_residual is {shown(parallel_residual)}; it must be True or False")
    return dim, epsilon


def checked_eps(eps: object) -> float:
    needed = "a positive number, neither 0 nor infinite in float32"
    value = as_float("eps", eps, needed)
    require("eps", value, LEAST_EPS <= value <= LARGEST_EPS, needed)
    return value


def require_weight_dtype(name: str, weight: Tensor) -> None:
    require(name, weight.dtype, weight.dtype in WEIGHT_DTYPES, "torch.float16 or torch.bfloat16")


def check_qkv(weight: Tensor, bias: Tensor | None) -> None:
    """The fused projection, which gpt_neox_layer has cut into heads."""
    require_weight_dtype("qkv_weight", weight)
    require("qkv_weight", f"on {weight.device}", weight.device.type in ("cpu", "cuda"), "a CPU or CUDA tensor")
    require_tensor("qkv_weight", weight, (weight.shape[0], weight.shape[1]), weight.dtype, weight.device)
    if bias is not None:
        require_tensor("qkv_bias", bias, (weight.shape[0],), weight.dtype, weight.device)


def check_separate(weights: LayerWeights) -> None:
    """q, k and v as three matrices, whose shapes check_heads has seen."""
    q = weights.q_weight
    require_weight_dtype("q_weight", q)
    require("q_weight", f"on {q.device}", q.device.type in ("cpu", "cuda"), "a CPU or CUDA tensor")
    for which in "qkv":
        weight, bias = getattr(weights, f"{which}_weight"), getattr(weights, f"{which}_bias")
        require_tensor(f"{which}_weight", weight, tuple(weight.shape), q.dtype, q.device)
        if bias is not None:
            require_tensor(f"{which}_bias", bias, (weight.shape[0], weight.shape[1]), q.dtype, q.device)


def check_layer(x: Tensor, weights: LayerWeights, position: Tensor) -> None:
    """The residual vector, the position and all weights, against the projection of q, which check_qkv or check_separate has
    seen."""
    q = weights.q_weight
    q_size, hidden, dtype, device = q.shape[0] * q.shape[1], q.shape[2], q.dtype, q.device
    shapes = [(*[1] * n, hidden) for n in range(3)]
    for name, tensor in (("x", x), ("position", position), ("up_weight", weights.up_weight)):
        require_dense(name, tensor)
    require("x", f"of shape {list(x.shape)}", tuple(x.shape) in shapes, f"[{hidden}], or that behind ones")
    require("x", x.dtype, x.dtype in X_DTYPES, "torch.float16, torch.bfloat16 or torch.float32")
    require("x", f"on {x.device}", x.device == device, f"on {device}, where the weights are")
    require("position", f"of shape {list(position.shape)}", position.numel() == 1, "an int, or a tensor of one element")
    require("position", position.dtype, position.dtype == torch.int32, "an int, or an int32 tensor")
    require("position", f"on {position.device}", position.device == device, f"on {device}")
    up = weights.up_weight
    require("up_weight", f"of shape {list(up.shape)}", up.dim() == 2, f"[intermediate, {hidden}]")
    intermediate = up.shape[0]
    expected = {
        "o_weight": (hidden, q_size),
        "o_bias": (hidden,),
        "gate_weight": (intermediate, hidden),
        "gate_bias": (intermediate,),
        "up_weight": (intermediate, hidden),
        "up_bias": (intermediate,),
        "down_weight": (hidden, intermediate),
        "down_bias": (hidden,),
        "input_norm_weight": (hidden,),
        "input_norm_bias": (hidden,),
        "post_norm_weight": (hidden,),
        "post_norm_bias": (hidden,),
    }
    for name, shape in expected.items():
        tensor = getattr(weights, name)
        separate_norm = weights.qkv_weight is None and name.endswith("norm_bias")
        if tensor is not None or not (name in MAY_BE_NONE or separate_norm):
            require_tensor(name, tensor, shape, dtype, device)


def cache_views(k_cache: Tensor, v_cache: Tensor, weights: LayerWeights) -> tuple[Tensor, Tensor]:
    """Both caches as [kv_heads, max_len, head_dim], without copies."""
    heads, head_dim, _ = weights.k_weight.shape
    views = []
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        require_dense(name, cache)
        shape = list(cache.shape)
        needed = f"[{heads}, max_len, {head_dim}] or [max_len, {heads * head_dim}]"
        ok = (len(shape) == 3 and shape[0] == heads and shape[2] == head_dim) or (
            len(shape) == 2 and shape[1] == heads * head_dim
        )
        require(name, f"of shape {shape}", ok and shape[-2] > 0, needed)
        require(
            name, cache.dtype, cache.dtype == weights.q_weight.dtype, f"{weights.q_weight.dtype}, as the weights are"
        )
        require(name, f"on {cache.device}", cache.device == weights.q_weight.device, f"on {weights.q_weight.device}")
        require(name, f"of strides {cache.stride()}", cache.stride(-1) == 1, "dense in its last dimension")
        view = cache.unflatten(1, (heads, head_dim)).transpose(0, 1) if len(shape) == 2 else cache
        require(name, f"of strides {cache.stride()}", not _overlaps_itself(view), "of rows that do not overlap")
        views.append(view)
    k, v = views
    same = v_cache.shape == k_cache.shape and v.stride() == k.stride()
    require(
        "v_cache",
        f"of shape {list(v_cache.shape)} and strides {v_cache.stride()}",
        same,
        f"laid out as k_cache is: shape {list(k_cache.shape)}, strides {k_cache.stride()}",
    )
    return k, v


def check_writable(k: Tensor, v: Tensor) -> None:
    """Before anything is written, of the views: that the call may write, and writes of one are not in the other."""
    for name, cache in (("k_cache", k), ("v_cache", v)):
        if cache.is_inference() and not torch.is_inference_mode_enabled():
            raise ArgumentError(f"{name} was made in inference mode; it must be used there, or be made outside")
    if _share_elements(k, v):
        raise ArgumentError("v_cache shares elements with k_cache; it must have elements of its own")


def check_apart(name: str, x: Tensor, k: Tensor, v: Tensor) -> None:
    """That writes to the caches, of the same views, change nothing of `x`, a vector in whatever dimensions."""
    for cache_name, cache in (("k_cache", k), ("v_cache", v)):
        if _share_memory(x, cache):
            raise ArgumentError(
                f"{name} shares memory with {cache_name}, which the call writes; it must have memory of its own: clone it"
            )


def _steps(cache: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
    """Stride and size of heads and tokens, the smaller stride first. One of size 1 is never stepped over: its stride is 0."""
    small, large = sorted((cache.stride(i) if cache.shape[i] > 1 else 0, cache.shape[i]) for i in range(2))
    return small, large


def _overlaps_itself(cache: Tensor) -> bool:
    """Whether rows of head_dim elements may share elements: unless one of heads and tokens lies whole between two steps of
    the other, they are taken to."""
    (small, count), (large, number) = _steps(cache)
    inner = (count - 1) * small + cache.shape[2]
    return (count > 1 and small < cache.shape[2]) or (number > 1 and large < inner)


def _share_elements(k: Tensor, v: Tensor) -> bool:
    """Of two caches of the same layout that do not overlap themselves."""
    (small, count), (large, number) = _steps(k)
    distance = abs(v.data_ptr() - k.data_ptr()) // k.element_size()

    def nearest(length: int, step: int, steps: int) -> list[int]:
        """How many steps, fewer than `steps`, end just before and just behind that length."""
        before = length // step if step else 0
        return [i for i in (before, before + 1) if abs(i) < steps]

    for i in nearest(distance, large, number):
        rest = distance - i * large
        if any(abs(rest - j * small) < k.shape[2] for j in nearest(rest, small, count)):
            return True
    return False


def _share_memory(x: Tensor, cache: Tensor) -> bool:
    """Of a vector of any dtype and stride, and a cache that does not overlap itself."""
    size, width, step = cache.element_size(), x.element_size(), x.stride(-1) * x.element_size()
    (small, count), (large, number) = ((stride * size, length) for stride, length in _steps(cache))
    row = cache.shape[2] * size
    end = (number - 1) * large + (count - 1) * small + row
    first = x.data_ptr() - cache.data_ptr()
    last = first + (x.shape[-1] - 1) * step
    if last + width <= 0 or end <= first:
        return False  # as nearly always

    def in_a_row(byte: int) -> bool:
        if not 0 <= byte < end:
            return False
        rest = byte - min(byte // max(large, 1), number - 1) * large
        return rest - min(rest // max(small, 1), count - 1) * small < row

    starts = range(first, last + 1, step) if step else (first,)
    return any(in_a_row(start) or in_a_row(start + width - 1) for start in starts)


def checked_tables(cos: Tensor, sin: Tensor, config: DecoderConfig, device: torch.device) -> RotaryTables:
    """cos and sin as the kernels take them."""
    dim, max_len = config.rotary.dim, config.max_position
    for name, table in (("cos", cos), ("sin", sin)):
        require_dense(name, table)
        shape = list(table.shape)
        wide_enough = len(shape) == 2 and (shape[1] == dim // 2 or shape[1] >= dim)
        require(
            name,
            f"of shape {shape}",
            wide_enough,
            f"[rows, {dim // 2}] or [rows, {dim} or more], rotary_dim being {dim}",
        )
        rows_ok = shape[0] == 1 or shape[0] >= max_len
        require(name, f"of {shape[0]} rows", rows_ok, f"of one row, or of at least {max_len}, as the cache has")
        require(name, table.dtype, table.dtype == torch.float32, "torch.float32")
        require(name, f"on {table.device}", table.device == device, f"on {device}")
        require(
            name, f"of strides {table.stride()}", shape[1] <= 1 or table.stride(1) == 1, "dense in its last dimension"
        )
    require(
        "sin",
        f"of shape {list(sin.shape)} and strides {sin.stride()}",
        sin.shape == cos.shape and sin.stride() == cos.stride(),
        f"laid out as cos is: shape {list(cos.shape)}, strides {cos.stride()}",
    )
    per_dimension = dim > 0 and cos.shape[1] != dim // 2
    return RotaryTables(cos, sin, cos.stride(0) if cos.shape[0] > 1 else 0, dim // 2 if per_dimension else 0)


def layer_config(
    weights: LayerWeights,
    max_len: int,
    rotary_dim: int,
    eps: float,
    activation: str,
    parallel_residual: bool,
    pairing: str = "halves",
) -> DecoderConfig:
    """What the layer is, with placeholders for what concerns a whole model. The options have been checked."""
    heads, head_dim, hidden = weights.q_weight.shape
    return DecoderConfig(
        family="llama" if weights.qkv_weight is None else "gpt_neox",
        vocab_size=1,
        hidden_size=hidden,
        intermediate_size=weights.up_weight.shape[0],
        num_layers=1,
        num_heads=heads,
        num_kv_heads=weights.k_weight.shape[0],
        head_dim=head_dim,
        max_position=max_len,
        rotary=RotaryConfig(nominal_dim=rotary_dim, neighbours=pairing == "neighbours"),
        norm="rms_norm" if weights.input_norm_bias is None else "layer_norm",
        norm_eps=eps,
        activation=cast(Activation, activation),
        gated_mlp=weights.gate_weight is not None,
        parallel_residual=parallel_residual,
        attention_bias=weights.q_bias is not None,
        mlp_bias=weights.up_bias is not None,
        tied_embeddings=False,
        fused_qkv=weights.qkv_weight is not None,
    )
