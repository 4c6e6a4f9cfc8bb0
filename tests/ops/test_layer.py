"""decoder_layer on the CPU: the reference's mathematics, both cache layouts, the operator's contract, and what it refuses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from ops.layer_case import ROOM, LayerCase
from torch import Tensor
from torch._subclasses import FakeTensorMode

import clusterfusion
from clusterfusion import reference
from clusterfusion.architecture import DecoderConfig
from clusterfusion.errors import ArgumentError
from clusterfusion.named_shapes import named_shape
from clusterfusion.ops.layer_checks import check_layer
from clusterfusion.random_weights import random_weights
from clusterfusion.weights import LayerWeights

CPU = torch.device("cpu")


def small(**changes: Any) -> DecoderConfig:
    changes = {"num_layers": 1, "vocab_size": 64, "max_position": ROOM} | changes
    return dataclasses.replace(named_shape("pythia-14m"), **changes)


class Case(LayerCase):
    def __init__(
        self, dtype: torch.dtype = torch.float16, x_dtype: torch.dtype = torch.float32, **changes: Any
    ) -> None:
        config = small(**changes)
        super().__init__(config, random_weights(config, seed=3, dtype=dtype, device=CPU).layers[0], dtype, x_dtype)


def token_major(cache: Tensor) -> Tensor:
    """[heads, max_len, head_dim] as the seed lays it out: [max_len, heads * head_dim]."""
    return cache.transpose(0, 1).flatten(1).contiguous()


@pytest.mark.parametrize(
    "changes",
    [{}, {"parallel_residual": False}, {"activation": "gelu_tanh"}, {"attention_bias": False, "mlp_bias": False}],
)
@pytest.mark.parametrize("position", [0, 7, ROOM - 1])
def test_it_is_the_reference_layer(changes: dict[str, Any], position: int) -> None:
    case = Case(**changes)
    k, v = case.k.clone(), case.v.clone()
    cos, sin = case.cos[position : position + 1], case.sin[position : position + 1]
    expected = reference.decoder_layer(case.config, case.weights, case.x, cos, sin, k, v, position, dtype=torch.float16)
    out, k_new, v_new = case.call(position=position)
    assert torch.equal(out, expected)
    assert torch.equal(k_new, k[:, position]) and torch.equal(v_new, v[:, position])
    assert torch.equal(case.k, k) and torch.equal(case.v, v), "the new token is in the cache, the others are untouched"


@pytest.mark.parametrize("x_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_output_has_the_dtype_and_shape_of_x(dtype: torch.dtype, x_dtype: torch.dtype) -> None:
    case = Case(dtype, x_dtype)
    for shape in ((-1,), (1, -1), (1, 1, -1)):
        x = case.x.reshape(shape)
        out, k_new, v_new = case.call(x=x)
        assert (out.shape, out.dtype) == (x.shape, x_dtype)
        assert k_new.shape == v_new.shape == (case.config.num_heads, case.config.head_dim)
        assert k_new.dtype == dtype


def test_cache_layouts_and_tables_give_the_same_bits() -> None:
    case = Case()
    expected = case.call()
    rotary_dim, half = case.config.rotary.dim, case.config.rotary.dim // 2
    wide = [torch.cat((t, t, torch.full((ROOM, 5), 9.0)), dim=1) for t in (case.cos, case.sin)]
    fresh = Case()
    got = fresh.call(
        k_cache=token_major(fresh.k),
        v_cache=token_major(fresh.v),
        position=torch.tensor([7], dtype=torch.int32),
        cos=wide[0][7:8],
        sin=wide[1][7:8],
    )
    assert rotary_dim == 2 * half
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    fresh = Case()
    got = fresh.call(cos=wide[0], sin=wide[1])
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_the_second_dimensions_of_pairs_may_have_angles_of_their_own() -> None:
    case = Case()
    d, c = case.config.rotary.dim, case.config
    angles = torch.rand(1, d) * 6
    x = case.x.double()
    normed = torch.nn.functional.layer_norm(
        x, (c.hidden_size,), case.weights.input_norm_weight.double(), case.weights.input_norm_bias.double(), c.norm_eps
    )
    k = torch.einsum("hdi,i->hd", case.weights.k_weight.double(), normed[0]) + case.weights.k_bias.double()
    turned = torch.cat((-k[:, d // 2 : d], k[:, : d // 2]), dim=1)
    expected = torch.cat((k[:, :d] * angles.cos() + turned * angles.sin(), k[:, d:]), dim=1)
    _, k_new, _ = case.call(cos=angles.cos(), sin=angles.sin())
    torch.testing.assert_close(k_new.double(), expected, rtol=0, atol=5e-3)


def operator_arguments(case: Case) -> tuple[Any, ...]:
    w, c = case.weights, case.config
    return (
        case.x,
        torch.tensor([7], dtype=torch.int32),
        *(w.qkv_weight, w.qkv_bias, w.o_weight, w.o_bias, w.up_weight, w.up_bias, w.down_weight, w.down_bias),
        *(w.input_norm_weight, w.input_norm_bias, w.post_norm_weight, w.post_norm_bias),
        *(case.k, case.v, case.cos, case.sin),
        *(c.num_heads, c.rotary.dim, c.norm_eps, c.activation, c.parallel_residual, "fused"),
    )


def test_the_operator_passes_opcheck() -> None:
    for case in (Case(), Case(torch.bfloat16, torch.bfloat16, attention_bias=False)):
        results = torch.library.opcheck(torch.ops.clusterfusion.decoder_layer.default, operator_arguments(case))
        assert set(results.values()) == {"SUCCESS"}


def test_it_can_be_compiled() -> None:
    case, plain = Case(), Case()

    def two_steps(x: Tensor, position: Tensor) -> Tensor:
        x = clusterfusion.decoder_layer(**case.arguments(x=x, position=position))[0] * 2
        return clusterfusion.decoder_layer(**case.arguments(x=x, position=position + 1))[0]

    compiled = torch.compile(two_steps, fullgraph=True, backend="aot_eager")
    for position in (0, 3, 9):
        got = compiled(case.x, torch.tensor([position], dtype=torch.int32))
        x = plain.call(position=position)[0] * 2
        assert torch.equal(got, plain.call(x=x, position=position + 1)[0])
        assert torch.equal(case.k, plain.k) and torch.equal(case.v, plain.v)


def test_numbers_may_change_under_compile() -> None:
    case, plain = Case(), Case()

    def step(position: int, eps: float) -> Tensor:
        return clusterfusion.decoder_layer(**case.arguments(position=position, eps=eps))[0]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for position, eps in ((0, 1e-5), (1, 1e-4), (2, 1e-3)):
        assert torch.equal(compiled(position, eps), plain.call(position=position, eps=eps)[0])


def replaced(name: str, change: Callable[[Tensor], Any]) -> Callable[[Case], dict[str, Any]]:
    """Changes one tensor of the layer."""
    return lambda case: {
        "layer_weights": dataclasses.replace(case.weights, **{name: change(getattr(case.weights, name))})
    }


def overlapping(case: Case) -> dict[str, Any]:
    """Caches of which one begins a row into the other."""
    both = torch.cat((case.k.flatten(), case.v.flatten()))
    k = both[: case.k.numel()].view_as(case.k)
    return {"k_cache": k, "v_cache": both[case.config.head_dim :][: k.numel()].view_as(k)}


def row_of_cache(case: Case, dtype: torch.dtype = torch.float16, step: int = 1) -> dict[str, Any]:
    """x among the elements of k_cache: one token's row, or with steps some of two rows."""
    cache = token_major(case.k)
    x = cache[7:9].flatten().view(dtype)[: case.config.hidden_size * step : step]
    return {"x": x, "k_cache": cache, "v_cache": token_major(case.v)}


def half_an_element(case: Case) -> dict[str, Any]:
    """A float32 x that ends two bytes into k_cache."""
    width = 2 * case.config.hidden_size
    memory = torch.zeros(width - 1 + case.k.numel(), dtype=torch.float16)
    return {"x": memory[:width].view(torch.float32), "k_cache": memory[width - 1 :].view_as(case.k)}


def negated(tensor: Tensor) -> Tensor:
    return torch._neg_view(tensor)


def all_without_data(case: Case) -> dict[str, Any]:
    """Of which the operator would infer shapes, whatever they are."""
    weights = {
        field.name: None if value is None else value.to("meta")
        for field in dataclasses.fields(LayerWeights)
        for value in (getattr(case.weights, field.name),)
    }
    tensors = {name: torch.empty(7, device="meta") for name in ("x", "k_cache", "v_cache", "cos", "sin")}
    return tensors | {"layer_weights": LayerWeights(**weights), "position": torch.zeros(1, device="meta").int()}


def no_room(case: Case) -> dict[str, Any]:
    return {"k_cache": case.k[:, :0], "v_cache": case.v[:, :0]}


def sparse(tensor: Tensor) -> Tensor:
    return tensor.float().to_sparse()


NUMBERS = np.array([3])

BAD: dict[str, tuple[Callable[[Case], dict[str, Any]], str]] = {
    "x too short": (lambda c: {"x": c.x[:, :-1]}, r"x is of shape \[1, 127\]; it must be \[128\]"),
    "two rows": (lambda c: {"x": c.x.expand(2, -1)}, r"x is of shape \[2, 128\]"),
    "x in float64": (lambda c: {"x": c.x.double()}, "x is torch.float64"),
    "x elsewhere": (lambda c: {"x": c.x.to("meta")}, "x is on meta"),
    "qkv elsewhere": (
        replaced("qkv_weight", lambda t: t.to("meta")),
        "qkv_weight is on meta; it must be a CPU or CUDA",
    ),
    "all elsewhere": (all_without_data, "qkv_weight is on meta; it must be a CPU or CUDA"),
    "position at the end": (lambda c: {"position": ROOM}, "position is 40; it must be an int from 0 to 39"),
    "negative position": (lambda c: {"position": -1}, "position is -1"),
    "position True": (lambda c: {"position": True}, "position is True"),
    "position 1.0": (lambda c: {"position": 1.0}, "position is 1.0"),
    "wide position": (lambda c: {"position": torch.tensor([1])}, "position is torch.int64"),
    "two positions": (lambda c: {"position": torch.zeros(2, dtype=torch.int32)}, r"position is of shape \[2\]"),
    "tensor out of range": (lambda c: {"position": torch.tensor(ROOM, dtype=torch.int32)}, "position is 40"),
    "weights of a dict": (lambda c: {"layer_weights": {}}, "layer_weights is a dict"),
    "a gated layer": (replaced("gate_weight", lambda t: torch.zeros(1)), "no gate"),
    "no fused matrix": (replaced("qkv_weight", lambda t: None), "qkv_weight"),
    "fp32 weights": (replaced("qkv_weight", lambda t: t.float()), "qkv_weight is torch.float32"),
    "short qkv": (replaced("qkv_weight", lambda t: t[:-3]), "qkv_weight is of shape"),
    "strided o": (replaced("o_weight", lambda t: t.t()), "o_weight is of strides"),
    "o of another dtype": (replaced("o_weight", lambda t: t.bfloat16()), "o_weight is torch.bfloat16"),
    "short up": (replaced("up_weight", lambda t: t[:-8]), "up_bias is of shape"),
    "flat up": (replaced("up_weight", lambda t: t.flatten()), "up_weight is of shape"),
    "short down bias": (replaced("down_bias", lambda t: t[:-1]), "down_bias is of shape"),
    "square norm": (replaced("input_norm_weight", lambda t: t.expand(2, -1)), "input_norm_weight is of shape"),
    "flat cache": (lambda c: {"k_cache": c.k.flatten()}, "k_cache is of shape"),
    "cache of fewer heads": (lambda c: {"k_cache": c.k[1:]}, "k_cache is of shape"),
    "v shorter": (lambda c: {"v_cache": c.v[:, :-1]}, "v_cache is of shape"),
    "v of another layout": (lambda c: {"v_cache": token_major(c.v)}, "v_cache is of shape"),
    "v of another dtype": (lambda c: {"v_cache": c.v.float()}, "v_cache is torch.float32"),
    "cache backwards": (
        lambda c: {"k_cache": c.k.transpose(1, 2).contiguous().transpose(1, 2)},
        "k_cache is of strides",
    ),
    "narrow tables": (lambda c: {"cos": c.cos[:, :-1]}, "cos is of shape"),
    "short tables": (lambda c: {"cos": c.cos[:-1], "sin": c.sin[:-1]}, "cos is of 39 rows"),
    "tables unlike": (lambda c: {"sin": c.sin[:1]}, "sin is of shape"),
    "tables in half": (lambda c: {"cos": c.cos.half()}, "cos is torch.float16"),
    "odd rotary": (lambda c: {"rotary_dim": 3}, "rotary_dim is 3"),
    "rotary too wide": (lambda c: {"rotary_dim": 34}, "rotary_dim is 34"),
    "no eps": (lambda c: {"eps": 0.0}, "eps is 0.0"),
    "an eps that float32 takes for 0": (lambda c: {"eps": 1e-60}, "eps is 1e-60; it must be a positive number"),
    "an eps infinite in float32": (lambda c: {"eps": 1e39}, r"eps is 1e\+39; it must be a positive number"),
    "NaN eps": (lambda c: {"eps": float("nan")}, "eps is nan"),
    "relu": (lambda c: {"activation": "relu"}, "activation is 'relu'"),
    "pairs": (lambda c: {"pairing": "pairs"}, "pairing is 'pairs'; it must be one of"),
    "k and v the same": (lambda c: {"v_cache": c.k}, "v_cache shares elements with k_cache"),
    "v a row into k": (lambda c: overlapping(c), "v_cache shares elements with k_cache"),
    "one row for all": (lambda c: {"k_cache": c.k[:, :1].expand(-1, ROOM, -1)}, "k_cache is of strides"),
    "one head for all": (lambda c: {"k_cache": c.k[:1].expand(4, -1, -1)}, "k_cache is of strides"),
    "x a list": (lambda c: {"x": [1.0]}, "x is a list"),
    "no cache": (lambda c: {"k_cache": None}, "k_cache is a NoneType"),
    "cos a list": (lambda c: {"cos": [1.0]}, "cos is a list"),
    "rotary 8.0": (lambda c: {"rotary_dim": 8.0}, "rotary_dim is 8.0"),
    "eps as text": (lambda c: {"eps": "1"}, "eps is '1'"),
    "unknown form": (lambda c: {"form": "graph"}, "form is 'graph'"),
    "x in k_cache": (row_of_cache, "x shares memory with k_cache"),
    "x in v_cache": (lambda c: {"x": c.v.view(-1)[-c.config.hidden_size :]}, "x shares memory with v_cache"),
    "float32 x in k_cache": (lambda c: row_of_cache(c, torch.float32), "x shares memory with k_cache"),
    "the end of x in k_cache": (half_an_element, "x shares memory with k_cache"),
    "strided x in k_cache": (lambda c: row_of_cache(c, step=2), "x shares memory with k_cache"),
    "one element of k_cache as x": (lambda c: {"x": c.k[1, 2, :1].expand(128)}, "x shares memory with k_cache"),
    "a room of none": (no_room, r"k_cache is of shape \[4, 0, 32\]; .*max_len being 1 or more"),
    "a flat room of none": (
        lambda c: {name: token_major(t)[:0] for name, t in (("k_cache", c.k), ("v_cache", c.v))},
        r"k_cache is of shape \[0, 128\]; .*max_len being 1 or more",
    ),
    "position of an array": (lambda c: {"position": NUMBERS}, r"position is array\(\[3\]\); it must be an int from 0"),
    "position of NumPy's True": (lambda c: {"position": np.bool_(True)}, "position is .*True"),
    "sparse position": (lambda c: {"position": sparse(torch.ones(1)).int()}, "position is of layout torch.sparse_coo"),
    "sparse x": (lambda c: {"x": sparse(c.x)}, "x is of layout torch.sparse_coo; it must be a tensor of layout"),
    "x of oneDNN": (lambda c: {"x": c.x.to_mkldnn()}, "x is of layout torch._mkldnn"),
    "nested x": (lambda c: {"x": torch.nested.nested_tensor([c.x[0]])}, "x is of layout nested"),
    "sparse cache": (lambda c: {"v_cache": sparse(c.v)}, "v_cache is of layout torch.sparse_coo"),
    "sparse sin": (lambda c: {"sin": sparse(c.sin)}, "sin is of layout torch.sparse_coo"),
    "sparse weight": (replaced("o_weight", sparse), "o_weight is of layout torch.sparse_coo"),
    "qkv a list": (replaced("qkv_weight", lambda t: [1.0]), "qkv_weight is a list; it must be a tensor"),
    "bias a list": (replaced("up_bias", lambda t: [1.0]), "up_bias is a list; it must be a tensor"),
    "k an array": (replaced("k_weight", lambda t: t.numpy()), "k_weight is a ndarray; it must be a tensor"),
    "q of fewer heads": (
        replaced("q_weight", lambda t: t[1:]),
        r"q_weight is of shape \[3, 32, 128\]; it must be \[heads, head_dim, 128\]",
    ),
    "q of two dimensions": (replaced("q_weight", lambda t: t.flatten(1)), r"q_weight is of shape \[4, 4096\]"),
    "v of other heads": (replaced("v_weight", lambda t: t.reshape(8, 16, 128)), r"v_weight is of shape \[8, 16, 128\]"),
    "negated k_cache": (lambda c: {"k_cache": negated(c.k)}, "k_cache is a negated view"),
    "negated v_cache": (lambda c: {"v_cache": negated(c.v)}, "v_cache is a negated view"),
    "qkv of other elements": (replaced("qkv_weight", lambda t: t.clone()), "q_weight is no view of qkv_weight"),
    "qkv_bias short": (replaced("qkv_bias", lambda t: t[:-1]), r"qkv_bias is of shape \[383\]; it must be .*\[384\]"),
    "q_bias alone": (replaced("qkv_bias", lambda t: None), "layer_weights has q_bias and no qkv_bias"),
    "no k_bias": (replaced("k_bias", lambda t: None), "layer_weights has qkv_bias and no k_bias"),
    "v_bias flat": (replaced("v_bias", lambda t: t.flatten()), "v_bias is no view of qkv_bias"),
    "no activation": (lambda c: {"activation": ""}, "activation is ''; it must be one of"),
    "activation 3": (lambda c: {"activation": 3}, "activation is 3; it must be one of"),
    "activations": (lambda c: {"activation": ["gelu"]}, r"activation is \['gelu'\]; it must be one of"),
    "no form": (lambda c: {"form": None}, "form is None; it must be one of"),
    "form 0": (lambda c: {"form": 0}, "form is 0; it must be one of"),
    "forms": (lambda c: {"form": ["fused"]}, r"form is \['fused'\]; it must be one of"),
    "residual as text": (lambda c: {"parallel_residual": "no"}, "parallel_residual is 'no'; it must be True or False"),
    "no residual": (lambda c: {"parallel_residual": 0}, "parallel_residual is 0; it must be True or False"),
    "residual 2.5": (lambda c: {"parallel_residual": 2.5}, "parallel_residual is 2.5; it must be True or False"),
    "eps True": (lambda c: {"eps": True}, "eps is True; it must be a positive number"),
    "huge eps": (lambda c: {"eps": 10**400}, r"eps is 1000.*\.\.\.; it must be a positive number"),
    "rotary False": (lambda c: {"rotary_dim": False}, "rotary_dim is False; it must be an even int from 0 to 32"),
    "huge rotary": (lambda c: {"rotary_dim": 10**30}, "rotary_dim is 1000.*; it must be an even int from 0 to 32"),
}
REQUIRED = (
    "input_norm_weight",
    "q_weight",
    "k_weight",
    "v_weight",
    "o_weight",
    "post_norm_weight",
    "up_weight",
    "down_weight",
)
BAD |= {
    f"no {name}": (replaced(name, lambda t: None), f"^{name} is a NoneType; it must be a tensor") for name in REQUIRED
}

PARTS = [f"{which}_{kind}" for kind in ("weight", "bias") for which in "qkv"]
BAD |= {
    f"another {name}": (replaced(name, lambda t: t * 3), f"^{name} is no view of qkv_{name[2:]}; .* alone is read")
    for name in PARTS
}
BAD |= {
    f"{name} of the next head": (replaced(name, lambda t: t.roll(1, 0)), f"^{name} is no view of qkv_{name[2:]}")
    for name in PARTS
}
BAD["q for k"] = (
    lambda c: {"layer_weights": dataclasses.replace(c.weights, k_weight=c.weights.q_weight)},
    "^k_weight is no",
)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name: str) -> None:
    change, message = BAD[name]
    case = Case()
    k, v = case.k.clone(), case.v.clone()
    with pytest.raises(ArgumentError, match=message):
        case.call(**change(case))
    assert torch.equal(case.k, k) and torch.equal(case.v, v)


@pytest.mark.parametrize(
    "name", ["k_cache", "v_cache", "cos", "sin", "position", "o_weight", "up_bias", "post_norm_weight"]
)
def test_a_tensor_without_data_is_named(name: str) -> None:
    case = Case()
    arguments = case.arguments(position=torch.tensor([7], dtype=torch.int32))
    if name in arguments:
        arguments[name] = arguments[name].to("meta")
    else:
        arguments["layer_weights"] = dataclasses.replace(case.weights, **{name: getattr(case.weights, name).to("meta")})
    with pytest.raises(ArgumentError, match=f"{name} is on meta"):
        clusterfusion.decoder_layer(**arguments)


@pytest.mark.parametrize("name", ["o_weight", "up_weight", "down_weight", "input_norm_weight", "post_norm_bias"])
def test_the_operator_and_its_checks_need_every_weight(name: str) -> None:
    """What torch hands to the operator as a tensor may be None."""
    case = Case()
    call = torch.ops.clusterfusion.decoder_layer.default
    names = [argument.name for argument in call._schema.arguments]
    arguments = list(operator_arguments(case))
    arguments[names.index(name)] = None
    with pytest.raises(ArgumentError, match=f"^{name} is a NoneType"):
        call(*arguments)
    weights = dataclasses.replace(case.weights, **{name: None})
    with pytest.raises(ArgumentError, match=f"^{name} is a NoneType"):
        check_layer(case.x, weights, torch.zeros(1, dtype=torch.int32))


def test_x_may_lie_beside_the_caches() -> None:
    """Before, behind and between their rows, in one piece of memory."""
    expected = Case(x_dtype=torch.float16).call()
    for order in ("xkv", "kxv", "kvx"):
        case = Case(x_dtype=torch.float16)
        parts = {"x": case.x, "k": token_major(case.k), "v": token_major(case.v)}
        pieces = torch.cat([parts[name].flatten() for name in order]).split([parts[name].numel() for name in order])
        x, k, v = (pieces[order.index(name)].view(parts[name].shape) for name in "xkv")
        got = case.call(x=x, k_cache=k, v_cache=v)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), order
    case = Case(x_dtype=torch.float16)
    hidden = case.config.hidden_size
    rows = torch.cat((token_major(case.k), token_major(case.v), case.x.expand(ROOM, -1)), dim=1)
    k, v, x = rows[:, :hidden], rows[:, hidden : 2 * hidden], rows[3, 2 * hidden :]
    got = case.call(x=x[None], k_cache=k, v_cache=v)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_caches_that_lie_between_each_other() -> None:
    """Keys and values in one tensor, in all the ways that keep them apart."""
    expected = Case().call()
    heads, head_dim = Case().k.shape[0], Case().k.shape[2]
    layouts = {
        (2, heads, ROOM, head_dim): (0, 1, 2, 3),
        (heads, 2, ROOM, head_dim): (1, 0, 2, 3),
        (heads, ROOM, 2, head_dim): (2, 0, 1, 3),
        (ROOM, heads, 2, head_dim): (2, 1, 0, 3),
        (ROOM, 2, heads, head_dim): (1, 2, 0, 3),
    }
    for shape, order in layouts.items():
        case = Case()
        both = torch.empty(shape, dtype=torch.float16).permute(order)
        both.copy_(torch.stack((case.k, case.v)))
        got = case.call(k_cache=both[0], v_cache=both[1])
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), shape


def test_parameters_record_no_gradient() -> None:
    case = Case()
    layer = LayerWeights(
        **{
            field.name: torch.nn.Parameter(value) if isinstance(value, Tensor) else value
            for field in dataclasses.fields(LayerWeights)
            for value in (getattr(case.weights, field.name),)
        }
    )
    position = torch.tensor([7], dtype=torch.int32)
    arguments = case.arguments(layer_weights=layer, position=position)

    def step(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return clusterfusion.decoder_layer(**arguments | {"x": x})

    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        assert not any(result.requires_grad for result in run(case.x))


def test_parts_of_a_fused_layer_may_be_cut_anew() -> None:
    expected, case = Case().call(), Case()
    parts = case.weights.qkv_weight.view(case.config.num_heads, 3, -1, case.config.hidden_size)
    cut = dict(zip(PARTS, parts.unbind(1), strict=False))
    got = case.call(layer_weights=dataclasses.replace(case.weights, **cut))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_fused_layer_can_be_traced_without_addresses() -> None:
    case = Case()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fields = {f.name: getattr(case.weights, f.name) for f in dataclasses.fields(LayerWeights)}
        layer = LayerWeights(**{n: t if t is None else mode.from_tensor(t) for n, t in fields.items()})
        tensors = {n: mode.from_tensor(t) for n, t in case.arguments().items() if isinstance(t, Tensor)}
        out, k_new, _ = case.call(**tensors, layer_weights=layer)
    assert out.shape == case.x.shape and k_new.shape == (case.config.num_heads, case.config.head_dim)


def test_the_least_and_the_largest_eps() -> None:
    for eps in (2.0**-149, torch.finfo(torch.float32).max):
        assert Case().call(eps=eps)[0].isfinite().all()


def test_inference_caches_outside_inference_mode_are_refused_before_they_change() -> None:
    with torch.inference_mode():
        case = Case()
        case.call()
    k = case.k.clone()
    with pytest.raises(ArgumentError, match="k_cache was made in inference mode"):
        case.call(position=9)
    assert torch.equal(case.k, k)


def test_autocast_changes_nothing() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = Case().call()
    assert all(torch.equal(a, b) for a, b in zip(got, Case().call(), strict=True))


@pytest.mark.parametrize(
    "changes",
    [{"position": np.int64(7)}, {"position": np.array(7)}, {"rotary_dim": np.int32(8)}, {"eps": np.float32(1e-5)}],
)
def test_numbers_of_another_library(changes: dict[str, Any]) -> None:
    plain = {name: value.item() for name, value in changes.items()}
    assert torch.equal(Case().call(**changes)[0], Case().call(**plain)[0])


def test_a_layer_of_a_loaded_model_can_be_passed_on() -> None:
    engine = clusterfusion.load("demo", dtype="float16", device="cpu")
    layer = engine.weights.layers[0]
    assert isinstance(layer, LayerWeights)
    c = engine.config
    cos, sin = reference.rotary_tables(c.rotary, torch.arange(8), torch.float32)
    k, v = (torch.zeros(8, c.hidden_size, dtype=torch.float16) for _ in range(2))
    out, _, _ = clusterfusion.decoder_layer(
        torch.ones(c.hidden_size), layer, k, v, 0, cos, sin, rotary_dim=c.rotary.dim, eps=c.norm_eps
    )
    assert torch.isfinite(out).all() and k[0].any() and not k[1:].any()
