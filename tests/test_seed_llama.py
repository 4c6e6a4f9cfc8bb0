"""The seed's LLaMA names on the CPU, and what they refuse."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import clusterfusion
from clusterfusion.errors import ArgumentError


def data(batch: int = 3, hidden: int = 40) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(hidden)
    x = torch.randn(batch, hidden, generator=generator)
    return {"input": x.half(), "weight": torch.randn(hidden, generator=generator).half()}


@pytest.mark.parametrize("hidden", [1, 40, 4096, 16384])
@pytest.mark.parametrize("eps", [None, 0.1])
def test_rmsnorm_against_float64(hidden: int, eps: float | None) -> None:
    arguments = data(hidden=hidden)
    got = clusterfusion.rmsnorm(**arguments) if eps is None else clusterfusion.rmsnorm(**arguments, eps=eps)
    x, weight = (tensor.double() for tensor in arguments.values())
    exact = F.rms_norm(x, (hidden,), weight, eps or 1e-6)
    assert got.dtype == torch.float16
    torch.testing.assert_close(got.double(), exact, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"input": torch.ones(40).half()}, r"input is of shape \[40\]; it must be \[batch, hidden\]"),
        ({"input": torch.ones(2, 16385).half()}, "hidden from 1 to 16384"),
        ({"input": torch.ones(2, 40)}, "input is torch.float32; it must be torch.float16"),
        ({"input": [1.0]}, "input is a list"),
        ({"weight": torch.ones(40)}, "weight is torch.float32"),
        ({"weight": torch.ones(41).half()}, r"weight is of shape \[41\]"),
        ({"weight": torch.ones(80).half()[::2]}, "weight is of strides"),
        ({"weight": None}, "weight is a NoneType"),
        ({"eps": -1.0}, "eps is -1.0"),
        ({"eps": "x"}, "eps is 'x'"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ArgumentError, match=complaint):
        clusterfusion.rmsnorm(**(data() | changes))


# -- the attention half of a layer -------------------------------------------------------------------------------------

HIDDEN, HEADS, HEAD_DIM = 4096, 32, 128
PLAIN = ("input", "weight_qkv", "weight_o", "k_cache", "v_cache", "rms_input_weight", "cos", "sin")
SGLANG = ("input", "residual", "weight_qkv", "weight_o", "k_cache", "v_cache", "rms_input_weight", "eps", "cos", "sin")
FUNCTIONS = {"llama_decoder_layer": PLAIN, "llama_decoder_layer_sglang": SGLANG}


def call(name: str, given: dict[str, Any], **changes: Any) -> Any:
    """By position, as the seed's scripts call."""
    given = given | changes
    return getattr(clusterfusion, name)(*(given[argument] for argument in FUNCTIONS[name]))


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """Matrices that are as good in either order."""
    generator = torch.Generator().manual_seed(8)
    matrices = {"weight_qkv": 3 * HIDDEN, "weight_o": HIDDEN}
    made = {name: torch.randn(rows, HIDDEN, generator=generator) / 64 for name, rows in matrices.items()}
    return {name: matrix.half() for name, matrix in made.items()}


def arguments(weights: dict[str, Tensor], tokens: int, width: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(tokens)
    angles = 6 * torch.rand(1, 64, generator=generator)
    angles = angles if width == 64 else torch.cat((angles, angles), 1)
    if width == -HEAD_DIM:  # an angle for each dimension
        angles = 6 * torch.rand(1, HEAD_DIM, generator=generator)
    return weights | {
        "input": torch.randn(1, HIDDEN, generator=generator).half(),
        "residual": torch.randn(1, HIDDEN, generator=generator).half(),
        "k_cache": torch.randn(tokens, HIDDEN, generator=generator).half(),
        "v_cache": torch.randn(tokens, HIDDEN, generator=generator).half(),
        "rms_input_weight": torch.rand(HIDDEN, generator=generator).half() + 0.5,
        "eps": 1e-5,
        "cos": angles.cos(),
        "sin": angles.sin(),
    }


def formula(given: dict[str, Any], x: Tensor, eps: float, neighbours: bool) -> dict[str, Tensor]:
    """The half in float64, of the x that is normed; with neighbours, weights input-major."""
    x = x.double()
    normed = x / (x.square().mean() + eps).sqrt() * given["rms_input_weight"].double()

    def product(vector: Tensor, matrix: Tensor) -> Tensor:
        return vector @ matrix.double() if neighbours else vector @ matrix.double().T

    q, k, v = (product(normed, matrix).view(HEADS, HEAD_DIM) for matrix in given["weight_qkv"].view(3, HIDDEN, HIDDEN))
    cos, sin = (given[name].double()[0] for name in ("cos", "sin"))
    if len(cos) == 64:
        cos, sin = cos.repeat(2), sin.repeat(2)

    def rotate(t: Tensor) -> Tensor:
        if neighbours:
            turned = torch.stack((-t[:, 1::2], t[:, 0::2]), -1).flatten(1)
        else:
            turned = torch.cat((-t[:, 64:], t[:, :64]), 1)
        return t * cos + turned * sin

    q, k = rotate(q), rotate(k)
    keys, values = (
        torch.cat((given[name].double().view(-1, HEADS, HEAD_DIM), new[None]))
        for name, new in (("k_cache", k), ("v_cache", v))
    )
    scores = torch.einsum("hd,thd->ht", q, keys) / math.sqrt(HEAD_DIM)
    attended = torch.einsum("ht,thd->hd", scores.softmax(1), values)
    return {"output": product(attended.view(1, HIDDEN), given["weight_o"]), "k_new": k[None], "v_new": v[None]}


def assert_close(exact: dict[str, Tensor], output: Tensor, k_new: Tensor, v_new: Tensor) -> None:
    for name, got in {"output": output, "k_new": k_new, "v_new": v_new}.items():
        assert got.dtype == torch.float16 and got.shape == exact[name].shape
        torch.testing.assert_close(got.double(), exact[name], rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("tokens", [0, 1, 37])
def test_input_major_neighbours_against_float64(weights: dict[str, Tensor], tokens: int) -> None:
    given = arguments(weights, tokens, -HEAD_DIM)
    before = {name: value.clone() for name, value in given.items() if isinstance(value, Tensor)}
    got = call("llama_decoder_layer", given)
    assert_close(formula(given, given["input"], 1e-6, neighbours=True), *got)
    assert all(torch.equal(given[name], value) for name, value in before.items())


@pytest.mark.parametrize(("tokens", "width"), [(0, 64), (1, HEAD_DIM), (37, 64), (5, -HEAD_DIM)])
def test_output_major_halves_against_float64(weights: dict[str, Tensor], tokens: int, width: int) -> None:
    given = arguments(weights, tokens, width)
    before = {name: value.clone() for name, value in given.items() if isinstance(value, Tensor)}
    total = given["residual"] + given["input"]
    output, residual, *new = call("llama_decoder_layer_sglang", given)
    assert residual is given["residual"] and torch.equal(residual, total)
    assert_close(formula(given, total, 1e-5, neighbours=False), output, *new)
    assert all(torch.equal(given[name], value) for name, value in before.items() if name != "residual")


def test_each_function_is_its_own_model(weights: dict[str, Tensor]) -> None:
    """With symmetric matrices the orders agree, and the pairings still differ."""
    given = arguments(weights, 3, HEAD_DIM)
    given["weight_qkv"] = torch.cat([(m + m.T) / 2 for m in given["weight_qkv"].view(3, HIDDEN, HIDDEN)])
    given["weight_o"] = (given["weight_o"] + given["weight_o"].T) / 2
    given["residual"].zero_()
    _, k_plain, v_plain = call("llama_decoder_layer", given)
    _, _, k_new, v_new = call("llama_decoder_layer_sglang", given, eps=1e-6)
    torch.testing.assert_close(v_plain, v_new, rtol=1e-3, atol=1e-3)
    assert (k_plain - k_new).abs().max() > 0.1


def test_a_norm_weight_of_one_row_and_a_residual_that_wants_a_gradient(weights: dict[str, Tensor]) -> None:
    given = arguments(weights, 2, 64)
    residual = given["residual"].clone().requires_grad_()
    expected = call("llama_decoder_layer_sglang", given)
    got = call("llama_decoder_layer_sglang", given, rms_input_weight=given["rms_input_weight"][None], residual=residual)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert not any(t.requires_grad for t in (got[0], *got[2:]))


@pytest.fixture(scope="module")
def blank() -> dict[str, Any]:
    """Zeros, which take no time to make."""
    return arguments(
        {name: torch.zeros(n * HIDDEN, HIDDEN).half() for name, n in (("weight_qkv", 3), ("weight_o", 1))}, 7, 128
    )


def spoiled(tensor: Tensor) -> dict[str, tuple[Any, str]]:
    """The same tensor with one thing wrong, and what is said of it."""
    shape, one = tensor.shape, torch.zeros(1, dtype=tensor.dtype)
    return {
        "width": (one.expand(*shape[:-1], shape[-1] + 1), "shape"),
        "three dimensions": (tensor[None, None], "shape"),
        "dtype": (torch.zeros(1, dtype=torch.bfloat16).expand(shape), "bfloat16"),
        "device": (torch.empty(shape, dtype=tensor.dtype, device="meta"), "meta"),
        "strides": (one.expand(shape), "stride"),
        "type": (None, "NoneType"),
        "a list": ([1.0], "list"),
        "sparse": (
            torch.sparse_coo_tensor(torch.empty(len(shape), 0), one[:0], shape, check_invariants=True),
            "sparse",
        ),
        "negated": (torch._neg_view(tensor), "negated view"),
    }


TENSORS = [(name, argument) for name, names in FUNCTIONS.items() for argument in names if argument != "eps"]


@pytest.mark.parametrize(("name", "argument"), TENSORS)
def test_a_bad_tensor_is_named(blank: dict[str, Any], name: str, argument: str) -> None:
    before = blank["residual"].clone()
    for bad, seen in spoiled(blank[argument]).values():
        with pytest.raises(ArgumentError, match=f"^{argument} is .*must be") as caught:
            call(name, blank, **{argument: bad})
        assert seen in str(caught.value), caught.value
    assert torch.equal(blank["residual"], before)


@pytest.mark.parametrize("eps", [0, -1.0, float("nan"), float("inf"), "1", None, True, 1e-60])
def test_a_bad_eps_is_named(blank: dict[str, Any], eps: object) -> None:
    with pytest.raises(ArgumentError, match="^eps is .*must be a positive number"):
        call("llama_decoder_layer_sglang", blank, eps=eps)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_caches_are_of_one_length(blank: dict[str, Any], name: str) -> None:
    with pytest.raises(ArgumentError, match=r"^v_cache is of shape \[6, 4096\]; it must be of shape \[7, 4096\]"):
        call(name, blank, v_cache=blank["v_cache"][:6])


@pytest.mark.parametrize(("name", "width"), [("llama_decoder_layer", 64), ("llama_decoder_layer_sglang", 32)])
def test_angles_of_another_width_are_named(blank: dict[str, Any], name: str, width: int) -> None:
    with pytest.raises(ArgumentError, match=rf"^cos is of shape \[1, {width}\]; it must be "):
        call(name, blank, cos=blank["cos"][:, :width], sin=blank["sin"][:, :width])
    with pytest.raises(ArgumentError, match=r"^sin is of shape \[1, 64\]; it must be of shape \[1, 128\]"):
        call(name, blank, sin=blank["sin"][:, :64])


@pytest.mark.parametrize("other", ["input", "k_cache", "v_cache"])
def test_the_residual_has_memory_of_its_own(blank: dict[str, Any], other: str) -> None:
    before = blank[other].clone()
    with pytest.raises(ArgumentError, match=f"^residual shares memory with {other}"):
        call("llama_decoder_layer_sglang", blank, residual=blank[other][-1:])
    assert torch.equal(blank[other], before)


def test_a_residual_made_in_inference_mode_is_refused_outside(blank: dict[str, Any]) -> None:
    with torch.inference_mode():
        residual = blank["residual"].clone()
    with pytest.raises(ArgumentError, match="^residual was made in inference mode"):
        call("llama_decoder_layer_sglang", blank, residual=residual)
    with torch.inference_mode():
        call("llama_decoder_layer_sglang", blank, residual=residual)
