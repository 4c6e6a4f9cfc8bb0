"""The seed's functions on the CPU, at their real shapes: against float64, what they write, and what they refuse."""

from __future__ import annotations

import dataclasses
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import clusterfusion
from clusterfusion.errors import ArgumentError
from clusterfusion.named_shapes import named_shape
from clusterfusion.plan import H200, plan_block
from clusterfusion.seed_api import graph_context_bytes
from clusterfusion.seed_api.graph_context import _Replayer

ROOM = 24
NAMES = (
    "decoder_layer",
    "decoder_layer_split",
    "attention_only",
    "mlp_only",
    "create_graph_context",
    "graph_decode_step",
    "destroy_graph_context",
)
LAYER = (
    "input weight_qkv bias_qkv weight_o bias_o k_cache v_cache ln_weight ln_bias cos sin post_ln_weight post_ln_bias "
    "mlp_up_weight mlp_up_bias mlp_down_weight mlp_down_bias current_seq_len"
).split()
STEP = (
    "ctx_id input ln_weight ln_bias bias_qkv bias_o cos sin k_cache v_cache post_ln_weight post_ln_bias mlp_up_bias "
    "mlp_down_bias current_seq_len"
).split()
CREATE = "ctx_id k_cache v_cache weight_qkv weight_o mlp_up_weight mlp_down_weight max_seq_len".split()
ARGUMENTS = {
    "decoder_layer": LAYER,
    "decoder_layer_split": LAYER,
    "attention_only": [name for name in LAYER if "down" not in name],
    "mlp_only": "input attn_output mlp_intermediate mlp_down_weight mlp_down_bias".split(),
    "create_graph_context": CREATE,
    "graph_decode_step": STEP,
    "destroy_graph_context": ["ctx_id"],
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    hidden: int
    heads: int
    rotary: int
    intermediate: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        h, i = self.hidden, self.intermediate
        one = dict.fromkeys(("bias_o", "ln_weight", "ln_bias", "post_ln_weight", "post_ln_bias", "mlp_down_bias"), (h,))
        return one | {
            "input": (1, h),
            "weight_qkv": (3 * h, h),
            "bias_qkv": (3 * h,),
            "weight_o": (h, h),
            "k_cache": (ROOM, h),
            "v_cache": (ROOM, h),
            "cos": (1, self.head_dim),
            "sin": (1, self.head_dim),
            "mlp_up_weight": (i, h),
            "mlp_up_bias": (i,),
            "mlp_down_weight": (h, i),
            "attn_output": (1, h),
            "mlp_intermediate": (i,),
        }


SIZES = {"pythia_2b8": Sizes(2560, 32, 20, 10240), "pythia_6b9": Sizes(4096, 32, 32, 16384)}


def function(model: str, name: str) -> Callable[..., Any]:
    return getattr(clusterfusion, f"{model}_{name}")


def call(model: str, name: str, arguments: dict[str, Any], **changes: Any) -> Any:
    """As a program written for the seed calls it: by place."""
    values = arguments | changes
    return function(model, name)(*(values[argument] for argument in ARGUMENTS[name]))


@pytest.mark.parametrize("model", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_the_arguments_are_the_seeds(model: str, name: str) -> None:
    assert list(inspect.signature(function(model, name)).parameters) == ARGUMENTS[name]
    assert function(model, name).__doc__


# -- results -----------------------------------------------------------------------------------------------------------


def random_arguments(model: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(11)
    sizes, arguments = SIZES[model], {}
    for name, shape in sizes.shapes.items():
        noise = torch.randn(shape, generator=generator)
        if name in ("ln_weight", "post_ln_weight"):
            noise = 1 + 0.1 * noise
        elif "weight" in name:
            noise *= shape[1] ** -0.5
        elif "bias" in name:
            noise *= 0.1
        arguments[name] = noise.half()
    arguments["input"][0, 3] = 40.0  # a channel that sticks out, as in real models
    angles = 6 * torch.rand(1, sizes.rotary, generator=generator)  # each dimension its own
    arguments["cos"], arguments["sin"] = torch.ones(1, sizes.head_dim), torch.zeros(1, sizes.head_dim)
    arguments["cos"][:, : sizes.rotary], arguments["sin"][:, : sizes.rotary] = angles.cos(), angles.sin()
    return arguments | {"current_seq_len": 7, "ctx_id": 1, "max_seq_len": ROOM}


@pytest.fixture(scope="module", params=SIZES)
def case(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    return request.param, random_arguments(request.param)


def with_fresh_caches(arguments: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return arguments | {name: arguments[name].clone() for name in ("k_cache", "v_cache")} | changes


def float64_layer(sizes: Sizes, given: dict[str, Any]) -> dict[str, Tensor]:
    """The layer after Black et al. 2022, written out on its own."""
    at, half = given["current_seq_len"], sizes.rotary // 2

    def get(name: str) -> Tensor:
        return given[name].double()

    def norm(name: str) -> Tensor:
        x = get("input")[0]
        x = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()
        return x * get(f"{name}_weight") + get(f"{name}_bias")

    def rotate(x: Tensor) -> Tensor:
        turned = torch.zeros_like(x)
        turned[:, :half], turned[:, half : 2 * half] = -x[:, half : 2 * half], x[:, :half]
        return x * get("cos") + turned * get("sin")

    qkv = (get("weight_qkv") @ norm("ln") + get("bias_qkv")).view(sizes.heads, 3, sizes.head_dim)
    q, k, v = rotate(qkv[:, 0]), rotate(qkv[:, 1]), qkv[:, 2]
    keys, values = (
        torch.cat((get(name)[:at].view(at, sizes.heads, sizes.head_dim), new[None]))
        for name, new in (("k_cache", k), ("v_cache", v))
    )
    scores = torch.einsum("hd,thd->ht", q, keys) / sizes.head_dim**0.5
    attended = torch.einsum("ht,thd->hd", scores.softmax(dim=1), values).flatten()
    attn_output = get("weight_o") @ attended + get("bias_o")
    up = get("mlp_up_weight") @ norm("post_ln") + get("mlp_up_bias")
    h = 0.5 * up * (1 + torch.erf(up / 2**0.5))
    down = get("mlp_down_weight") @ h + get("mlp_down_bias")
    return {
        "output": (get("input")[0] + attn_output + down)[None],
        "attn_output": attn_output[None],
        "mlp_intermediate": h,
        "k_new": k[None],
        "v_new": v[None],
    }


def assert_near(got: Tensor, expected: Tensor) -> None:
    assert got.dtype == torch.float16
    torch.testing.assert_close(got.double(), expected, rtol=2e-3, atol=4e-3)


@pytest.fixture(scope="module")
def expected(case: tuple[str, dict[str, Any]]) -> dict[str, Tensor]:
    model, arguments = case
    return float64_layer(SIZES[model], arguments)


@pytest.mark.parametrize("name", ["decoder_layer", "decoder_layer_split", "graph_decode_step"])
def test_a_layer_is_the_formula(case: tuple[str, dict[str, Any]], expected: dict[str, Tensor], name: str) -> None:
    model, given = case[0], with_fresh_caches(case[1])
    before = {cache: given[cache].clone() for cache in ("k_cache", "v_cache")}
    if name == "graph_decode_step":
        call(model, "create_graph_context", given)
    output, k_new, v_new = call(model, name, given)
    if name == "graph_decode_step":
        call(model, "destroy_graph_context", given)
    for got, what in ((output, "output"), (k_new, "k_new"), (v_new, "v_new")):
        assert_near(got, expected[what])
    for cache, new in (("k_cache", k_new), ("v_cache", v_new)):
        assert torch.equal(given[cache][7], new.flatten()), "the new row"
        before[cache][7] = given[cache][7]
        assert torch.equal(given[cache], before[cache]), "no other row"


def test_the_halves_make_the_layer(case: tuple[str, dict[str, Any]], expected: dict[str, Tensor]) -> None:
    model, given = case[0], with_fresh_caches(case[1])
    attn_output, h, k_new, v_new = call(model, "attention_only", given)
    halves = {"attn_output": attn_output, "mlp_intermediate": h, "k_new": k_new, "v_new": v_new}
    for name, got in halves.items():
        assert_near(got, expected[name])
    assert torch.equal(given["k_cache"][7], k_new.flatten()) and torch.equal(given["v_cache"][7], v_new.flatten())
    output = call(model, "mlp_only", given, attn_output=attn_output, mlp_intermediate=h)
    assert_near(output, expected["output"])
    assert torch.equal(output, call(model, "mlp_only", given, attn_output=attn_output, mlp_intermediate=h[None]))


@pytest.mark.parametrize("name", ["decoder_layer", "attention_only", "graph_decode_step"])
def test_positions_may_be_tensors_and_vectors_may_be_rows(case: tuple[str, dict[str, Any]], name: str) -> None:
    model, plain = case[0], with_fresh_caches(case[1])
    rows = {key: value[None] for key, value in case[1].items() if isinstance(value, Tensor) and value.dim() == 1}
    call(model, "create_graph_context", plain)
    try:
        first = call(model, name, plain)
        for position in (torch.tensor(7, dtype=torch.int32), torch.tensor([7], dtype=torch.int32)):
            second = call(model, name, plain, **rows, current_seq_len=position)
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    finally:
        call(model, "destroy_graph_context", plain)


def test_an_id_may_be_any_int_and_messages_stay_short() -> None:
    given = blank("pythia_2b8")
    for number, seen in ((10**5000, "a very large int"), (10**200, "1000.*\\.\\.\\."), (-3, "-3")):
        with pytest.raises(ArgumentError, match=f"ctx_id is {seen}; it must be that of a context"):
            clusterfusion.pythia_2b8_destroy_graph_context(number)
        call("pythia_2b8", "create_graph_context", given, ctx_id=number)
        with pytest.raises(ArgumentError, match=f"ctx_id is {seen}, which a context has"):
            call(
                "pythia_2b8", "create_graph_context", given, ctx_id=number, k_cache=None
            )  # before anything else is looked at
        clusterfusion.pythia_2b8_destroy_graph_context(number)


def test_what_a_context_takes_is_what_its_docstring_says() -> None:
    for size, shape in (("136 KB on an H200", "2.8b"), ("216 KB at 6.9B", "6.9b")):
        stated = round(graph_context_bytes(plan_block(named_shape(f"pythia-{shape}"), H200)) / 1000)
        assert size.startswith(f"{stated} KB")
        assert size in " ".join(str(clusterfusion.pythia_2b8_create_graph_context.__doc__).split())


def test_caches_may_have_rows_apart() -> None:
    arguments = blank("pythia_2b8")
    wide = {name: torch.zeros(ROOM, 2 * 2560, dtype=torch.float16) for name in ("k_cache", "v_cache")}
    call("pythia_2b8", "decoder_layer", arguments | {"bias_qkv": torch.ones_like(arguments["bias_qkv"])}, **{
        name: cache[:, :2560] for name, cache in wide.items()
    })  # fmt: skip
    assert wide["v_cache"][7, :2560].eq(1).all() and not wide["v_cache"][:, 2560:].any()


@pytest.mark.parametrize("name", ["decoder_layer", "attention_only", "graph_decode_step"])
@pytest.mark.parametrize("integer", [np.int64, np.uint8, np.array])
def test_integers_of_another_library(name: str, integer: Callable[[int], Any]) -> None:
    given = blank("pythia_2b8") | {"bias_qkv": torch.ones(3 * 2560, dtype=torch.float16)}
    call("pythia_2b8", "create_graph_context", given, ctx_id=integer(1), max_seq_len=integer(ROOM))
    try:
        call("pythia_2b8", name, given, ctx_id=1, current_seq_len=integer(7))
        assert given["v_cache"][7].eq(1).all() and not given["v_cache"][8:].any()
    finally:
        call("pythia_2b8", "destroy_graph_context", given, ctx_id=integer(1))


@pytest.mark.parametrize("name", ["decoder_layer", "attention_only", "mlp_only", "graph_decode_step"])
def test_autocast_changes_nothing(case: tuple[str, dict[str, Any]], name: str) -> None:
    model, plain, other = case[0], with_fresh_caches(case[1]), with_fresh_caches(case[1], ctx_id=2)
    for given in (plain, other):
        call(model, "create_graph_context", given)
    try:
        expected = call(model, name, plain)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = call(model, name, other)
    finally:
        for given in (plain, other):
            call(model, "destroy_graph_context", given)
    pairs = [(got, expected)] if name == "mlp_only" else list(zip(got, expected, strict=True))
    pairs += [(other[cache], plain[cache]) for cache in ("k_cache", "v_cache")]
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("inference", [False, True])
def test_a_replay_records_no_gradient(inference: bool) -> None:
    """Of what a context does on a GPU, the part that a CPU can: its buffers here, a graph that does nothing."""

    class NoGraph:
        grad_enabled = True

        def replay(self) -> None:
            self.grad_enabled = torch.is_grad_enabled()

    class NoError:
        def check(self, way_out: str) -> None:
            pass

    graph, replayer, bias = NoGraph(), _Replayer.__new__(_Replayer), torch.zeros(4, requires_grad=True)
    replayer._error = NoError()  # type: ignore[assignment]
    replayer._input, replayer._results = torch.empty(1, 4), torch.zeros(3, 4)
    replayer._angles, replayer._position = torch.empty(2, 4), torch.empty(1, dtype=torch.int32)
    replayer._graphs = {(bias.data_ptr(),): (graph, ())}  # type: ignore[dict-item]
    x, cos = torch.ones(1, 4, requires_grad=True), torch.ones(1, 4, requires_grad=True)
    with torch.inference_mode(inference):
        result = replayer.step(x, cos, cos, 1, {"bias": bias})
    assert not graph.grad_enabled
    assert not any(t.requires_grad for t in (result, replayer._input, replayer._angles))


# -- refusals ----------------------------------------------------------------------------------------------------------


def blank(model: str) -> dict[str, Any]:
    """Zeros, which take no time to make."""
    tensors = {
        name: torch.zeros(shape, dtype=torch.float32 if name in ("cos", "sin") else torch.float16)
        for name, shape in SIZES[model].shapes.items()
    }
    return tensors | {"current_seq_len": 7, "ctx_id": 1, "max_seq_len": ROOM}


TENSORS = [
    (name, argument)
    for name in ("decoder_layer", "decoder_layer_split", "attention_only", "mlp_only", "create_graph_context")
    for argument in ARGUMENTS[name]
    if argument not in ("ctx_id", "max_seq_len", "current_seq_len")
]
TENSORS += [("graph_decode_step", a) for a in STEP if a not in ("ctx_id", "k_cache", "v_cache", "current_seq_len")]


@pytest.fixture
def context() -> Iterator[dict[str, Any]]:
    """The arguments of a live context of zeros."""
    given = blank("pythia_2b8")
    call("pythia_2b8", "create_graph_context", given)
    yield given
    clusterfusion.pythia_2b8_destroy_graph_context(1)


def spoiled(tensor: Tensor) -> dict[str, Any]:
    """The same tensor with one thing wrong, and nothing allocated."""
    shape, one = tensor.shape, torch.zeros(1, dtype=tensor.dtype)
    return {
        "shape": one.expand(*shape[:-1], shape[-1] + 1),
        "three dimensions": tensor[None, None],
        "dtype": torch.zeros(1, dtype=torch.bfloat16).expand(shape),
        "device": torch.empty(shape, dtype=tensor.dtype, device="meta"),
        "strides": one.expand(shape),
        "type": None,
        "a list": [1.0],
        "sparse": torch.sparse_coo_tensor(torch.empty(len(shape), 0), one[:0], shape, check_invariants=True),
        "nested": torch.nested.nested_tensor([one]),
        "nested, of two dimensions": torch.nested.nested_tensor([one[None]]),
        "negated": torch._neg_view(tensor),
    }


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(("name", "argument"), TENSORS)
def test_a_bad_tensor_is_named(context: dict[str, Any], name: str, argument: str) -> None:
    ctx_id = 2 if name == "create_graph_context" else 1
    for what, bad in spoiled(context[argument]).items():
        with pytest.raises(ArgumentError, match=f"^{argument} is .*must be") as caught:
            call("pythia_2b8", name, context, ctx_id=ctx_id, **{argument: bad})
        seen = {"shape": "shape", "dtype": "bfloat16", "device": "meta", "strides": "stride", "type": "NoneType",
                "sparse": "sparse_coo", "nested": "nested", "negated": "negated view"}  # fmt: skip
        assert seen.get(what, "") in str(caught.value), caught.value
    assert not context["k_cache"].any() and not context["v_cache"].any()


@pytest.mark.parametrize("name", ["decoder_layer", "attention_only", "graph_decode_step"])
@pytest.mark.parametrize(
    "value",
    [-1, ROOM, True, 1.0, "3", None, torch.tensor(7), torch.tensor([7, 8], dtype=torch.int32),
     torch.tensor(ROOM, dtype=torch.int32), torch.tensor([-1], dtype=torch.int32), np.array([7]), np.bool_(True),
     torch.empty(1, dtype=torch.int32, device="meta")],
)  # fmt: skip
def test_a_bad_position_is_named(context: dict[str, Any], name: str, value: object) -> None:
    with pytest.raises(ArgumentError, match=f"^current_seq_len is .*must be an int from 0 to {ROOM - 1}"):
        call("pythia_2b8", name, context, current_seq_len=value)
    assert not context["k_cache"].any() and not context["v_cache"].any()


def test_the_other_models_tensors_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"^input is of shape \[1, 2560\]; it must be of shape \[1, 4096\]"):
        call("pythia_6b9", "decoder_layer", blank("pythia_2b8"))


def test_caches_must_be_alike() -> None:
    given = blank("pythia_2b8")
    with pytest.raises(ArgumentError, match="^v_cache is .*laid out as k_cache"):
        call("pythia_2b8", "decoder_layer", given, v_cache=given["v_cache"][:-1])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_tensor_of_another_layout_is_named() -> None:
    given = blank("pythia_2b8")
    position = torch.tensor([7], dtype=torch.int32).to_sparse()
    with pytest.raises(ArgumentError, match="^current_seq_len is of layout torch.sparse_coo"):
        call("pythia_2b8", "decoder_layer", given, current_seq_len=position)
    nested = torch.nested.nested_tensor([torch.tensor([7], dtype=torch.int32)])
    with pytest.raises(ArgumentError, match="^current_seq_len is of layout nested"):
        call("pythia_2b8", "decoder_layer", given, current_seq_len=nested)
    with pytest.raises(ArgumentError, match="^current_seq_len is a negated view"):
        call("pythia_2b8", "decoder_layer", given, current_seq_len=torch._neg_view(torch.tensor(-7, dtype=torch.int32)))
    with pytest.raises(ArgumentError, match="^cos is of layout torch._mkldnn"):  # which calls itself contiguous
        call("pythia_2b8", "attention_only", given, cos=given["cos"].to_mkldnn())


@pytest.mark.parametrize("name", ["decoder_layer", "decoder_layer_split", "attention_only", "create_graph_context"])
@pytest.mark.parametrize("rows", [0, 1])
def test_caches_share_no_elements(name: str, rows: int) -> None:
    both = torch.zeros(ROOM + 1, 2560, dtype=torch.float16)
    with pytest.raises(ArgumentError, match="^v_cache shares elements with k_cache"):
        call("pythia_2b8", name, blank("pythia_2b8"), k_cache=both[:ROOM], v_cache=both[rows:][:ROOM])
    assert not both.any()


@pytest.mark.parametrize("name", ["decoder_layer", "attention_only", "create_graph_context"])
@pytest.mark.parametrize("cache", ["k_cache", "v_cache"])
def test_inference_caches_outside_inference_mode_are_refused_before_they_change(name: str, cache: str) -> None:
    given = blank("pythia_2b8") | {"bias_qkv": torch.ones(3 * 2560, dtype=torch.float16)}
    with torch.inference_mode():
        given[cache] = torch.zeros_like(given[cache])
    with pytest.raises(ArgumentError, match=f"^{cache} was made in inference mode"):
        call("pythia_2b8", name, given)
    assert not given["k_cache"].any() and not given["v_cache"].any()
    with torch.inference_mode():
        call("pythia_2b8", name, given)
        if name == "create_graph_context":
            call("pythia_2b8", "destroy_graph_context", given)


@pytest.mark.parametrize("name", ["decoder_layer", "decoder_layer_split", "attention_only", "graph_decode_step"])
@pytest.mark.parametrize("cache", ["k_cache", "v_cache"])
def test_the_input_is_no_row_of_a_cache(context: dict[str, Any], name: str, cache: str) -> None:
    with pytest.raises(ArgumentError, match=f"^input shares memory with {cache}"):
        call("pythia_2b8", name, context, input=context[cache][7:8], bias_qkv=torch.ones(3 * 2560).half())
    assert not context["k_cache"].any() and not context["v_cache"].any()


# -- contexts ----------------------------------------------------------------------------------------------------------


def test_a_context_lives_from_create_to_destroy() -> None:
    given = blank("pythia_2b8")
    unknown = "ctx_id is 1; it must be that of a context"
    for name in ("graph_decode_step", "destroy_graph_context"):
        with pytest.raises(ArgumentError, match=unknown):
            call("pythia_2b8", name, given)
    for _ in range(2):
        call("pythia_2b8", "create_graph_context", given)
        with pytest.raises(ArgumentError, match="ctx_id is 1, which a context has"):
            call("pythia_2b8", "create_graph_context", given)
        call("pythia_2b8", "graph_decode_step", given)
        with pytest.raises(ArgumentError, match=unknown):
            call("pythia_6b9", "graph_decode_step", given)
        call("pythia_2b8", "destroy_graph_context", given)
        for name in ("graph_decode_step", "destroy_graph_context"):
            with pytest.raises(ArgumentError, match=unknown):
                call("pythia_2b8", name, given)


def test_the_two_models_ids_do_not_meet() -> None:
    for model in SIZES:
        call(model, "create_graph_context", blank(model))
    for model in SIZES:
        call(model, "destroy_graph_context", {"ctx_id": 1})


@pytest.mark.parametrize("ctx_id", ["1", 1.0, None, True, [1]])
def test_ids_are_ints(ctx_id: object) -> None:
    for name in ("create_graph_context", "graph_decode_step", "destroy_graph_context"):
        with pytest.raises(ArgumentError, match="^ctx_id is .*must be an int"):
            call("pythia_2b8", name, blank("pythia_2b8"), ctx_id=ctx_id)


@pytest.mark.parametrize("max_seq_len", [0, -1, ROOM + 1, 3.0, True, None])
def test_a_bad_max_seq_len_is_named(max_seq_len: object) -> None:
    with pytest.raises(ArgumentError, match=f"^max_seq_len is .*from 1 to {ROOM}"):
        call("pythia_2b8", "create_graph_context", blank("pythia_2b8"), max_seq_len=max_seq_len)


def test_max_seq_len_bounds_the_position() -> None:
    given = blank("pythia_2b8")
    call("pythia_2b8", "create_graph_context", given, max_seq_len=8)
    try:
        call("pythia_2b8", "graph_decode_step", given, current_seq_len=7)
        for position in (8, torch.tensor(8, dtype=torch.int32)):
            with pytest.raises(ArgumentError, match="current_seq_len is 8; it must be an int from 0 to 7"):
                call("pythia_2b8", "graph_decode_step", given, current_seq_len=position)
    finally:
        call("pythia_2b8", "destroy_graph_context", given)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", ["k_cache", "v_cache"])
def test_a_step_takes_the_contexts_own_caches(context: dict[str, Any], name: str) -> None:
    cache = context[name]
    for other in (
        cache.clone(),
        cache[:-1],
        cache[1:],
        cache.view(torch.int16),
        cache.float(),
        cache.to("meta"),
        cache.to_sparse(),
        torch.nested.nested_tensor([cache]),
        None,
    ):
        with pytest.raises(ArgumentError, match=f"^{name} is .*the tensor that the context was created with"):
            call("pythia_2b8", "graph_decode_step", context, **{name: other})
    with pytest.raises(ArgumentError, match=f"^{name} is a negated view"):
        call("pythia_2b8", "graph_decode_step", context, **{name: torch._neg_view(cache)})
    call("pythia_2b8", "graph_decode_step", context, **{name: cache.view(cache.shape)})


def test_one_of_many_threads_gets_an_id() -> None:
    given, refused = blank("pythia_2b8"), []

    def create() -> None:
        try:
            call("pythia_2b8", "create_graph_context", given)
        except ArgumentError as error:
            refused.append(error)

    threads = [threading.Thread(target=create) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    call("pythia_2b8", "destroy_graph_context", given)
    assert len(refused) == 7
