"""The seed's LLaMA functions on a GPU: true against float64, the same bits every time, caches as they were."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import clusterfusion
from clusterfusion.errors import ArgumentError

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)
HIDDEN, HEADS, HEAD_DIM = 4096, 32, 128
CONTEXTS = (0, 1, 17, 1024, 4095)
ROOM = 4096
PLAIN = ("input", "weight_qkv", "weight_o", "k_cache", "v_cache", "rms_input_weight", "cos", "sin")
SGLANG = ("input", "residual", "weight_qkv", "weight_o", "k_cache", "v_cache", "rms_input_weight", "eps", "cos", "sin")
FUNCTIONS = {"llama_decoder_layer": PLAIN, "llama_decoder_layer_sglang": SGLANG}


def random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, device=GPU, generator=generator)


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    """Matrices that are as good in either order, and caches with room."""
    generator = torch.Generator(GPU).manual_seed(8)
    return {
        "weight_qkv": (random(generator, 3 * HIDDEN, HIDDEN) / 64).half(),
        "weight_o": (random(generator, HIDDEN, HIDDEN) / 64).half(),
        "k_cache": random(generator, ROOM, HIDDEN).half(),
        "v_cache": random(generator, ROOM, HIDDEN).half(),
        "rms_input_weight": 1 + 0.2 * random(generator, HIDDEN).half(),
    }


def arguments(tensors: dict[str, Tensor], tokens: int, width: int = HEAD_DIM, seed: int = 1) -> dict[str, Any]:
    generator = torch.Generator(GPU).manual_seed(seed)
    angles = 6 * torch.rand(1, width, device=GPU, generator=generator)
    x, residual = (random(generator, 1, HIDDEN).half() for _ in range(2))
    residual[0, 5] = 30.0  # a channel that sticks out, as in real models
    new = {"input": x, "residual": residual, "eps": 1e-5, "cos": angles.cos(), "sin": angles.sin()}
    return tensors | new | {name: tensors[name][:tokens] for name in ("k_cache", "v_cache")}


def call(name: str, given: dict[str, Any], **changes: Any) -> dict[str, Tensor]:
    """The residual is a copy, and among the results."""
    given = given | {"residual": given["residual"].clone()} | changes
    results = getattr(clusterfusion, name)(*(given[argument] for argument in FUNCTIONS[name]))
    if name == "llama_decoder_layer":
        return dict(zip(("output", "k_new", "v_new"), results, strict=True))
    assert results[1] is given["residual"]
    return dict(zip(("output", "residual", "k_new", "v_new"), results, strict=True))


def formula(name: str, given: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """The function in plain operations of one dtype: the truth in float64, the bar in float16."""
    sglang = name == "llama_decoder_layer_sglang"
    x = given["input"] + given["residual"] if sglang else given["input"]
    results = {"residual": x} if sglang else {}
    eps = given["eps"] if sglang else 1e-6
    wide = torch.promote_types(dtype, torch.float32)
    squares = x.to(wide).square().mean()
    normed = (x.to(wide) / (squares + eps).sqrt()).to(dtype) * given["rms_input_weight"].to(dtype)

    def product(vector: Tensor, matrix: Tensor) -> Tensor:
        return vector @ (matrix.T if sglang else matrix).to(dtype)

    q, k, v = (product(normed, m).view(HEADS, HEAD_DIM) for m in given["weight_qkv"].view(3, HIDDEN, HIDDEN))
    cos, sin = (given[table].to(dtype)[0] for table in ("cos", "sin"))
    if len(cos) == HEAD_DIM // 2:
        cos, sin = cos.repeat(2), sin.repeat(2)

    def rotate(t: Tensor) -> Tensor:
        half = HEAD_DIM // 2
        if sglang:
            turned = torch.cat((-t[:, half:], t[:, :half]), 1)
        else:
            turned = torch.stack((-t[:, 1::2], t[:, 0::2]), -1).flatten(1)
        return t * cos + turned * sin

    q, k = rotate(q), rotate(k)
    keys, values = (
        torch.cat((given[cache].to(dtype).view(-1, HEADS, HEAD_DIM), new[None])).transpose(0, 1)
        for cache, new in (("k_cache", k), ("v_cache", v))
    )
    scores = (keys @ q[:, :, None])[:, :, 0].to(wide) / math.sqrt(HEAD_DIM)
    attended = (scores.softmax(1).to(dtype)[:, None] @ values).reshape(1, HIDDEN)
    return results | {"output": product(attended, given["weight_o"]), "k_new": k[None], "v_new": v[None]}


def assert_close(what: str, ours: Tensor, theirs: Tensor, exact: Tensor, slack: float) -> None:
    assert ours.shape == exact.shape and ours.dtype == torch.float16 and ours.isfinite().all(), what
    our_error, their_error = ((got.double() - exact).abs() for got in (ours, theirs))
    pairs = {"mean": (our_error.mean(), their_error.mean()), "max": (our_error.max(), 1.25 * their_error.max())}
    for which, (mine, bar) in pairs.items():
        assert mine <= slack * bar, f"{what}: {which} {mine:.3e}, PyTorch in float16 {bar:.3e}"


def check_against_truth(name: str, given: dict[str, Any], slack: float) -> None:
    caches = given["k_cache"].clone(), given["v_cache"].clone()
    exact, theirs = (formula(name, given, dtype) for dtype in (torch.float64, torch.float16))
    got = call(name, given)
    for what, ours in got.items():
        if what == "residual":
            assert torch.equal(ours, exact[what])
        else:
            assert_close(f"{what} at {len(caches[0])}", ours, theirs[what], exact[what], slack)
    assert torch.equal(given["k_cache"], caches[0]) and torch.equal(given["v_cache"], caches[1])


@pytest.mark.parametrize("width", [HEAD_DIM // 2, HEAD_DIM])
@pytest.mark.parametrize("tokens", CONTEXTS)
def test_output_major_halves_against_truth(tensors: dict[str, Tensor], tokens: int, width: int) -> None:
    check_against_truth("llama_decoder_layer_sglang", arguments(tensors, tokens, width), 1.0)


@pytest.mark.parametrize("tokens", CONTEXTS)
def test_input_major_neighbours_against_truth(tensors: dict[str, Tensor], tokens: int) -> None:
    """It rounds between the products as PyTorch does, so it is about as true, not truer."""
    check_against_truth("llama_decoder_layer", arguments(tensors, tokens), 1.25)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("tokens", CONTEXTS)
def test_repeats_have_the_same_bits(tensors: dict[str, Tensor], name: str, tokens: int) -> None:
    given = arguments(tensors, tokens)
    first = call(name, given)
    other, a = torch.cuda.Stream(), torch.randn(2048, 2048, device=GPU)
    for repeat in range(100):
        if repeat % 10 == 0:
            with torch.cuda.stream(other):
                a @ a  # someone else's kernel beside ours
        got = call(name, given)
        assert all(torch.equal(got[what], first[what]) for what in first), f"repeat {repeat} differs"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_lies_behind_the_cached_tokens_is_not_read(tensors: dict[str, Tensor], name: str) -> None:
    caches = {cache: tensors[cache].clone() for cache in ("k_cache", "v_cache")}
    for tokens in (0, 1, 17, 1000):
        expected = call(name, arguments(tensors | caches, tokens))
        spoiled = {cache: tensor.clone() for cache, tensor in caches.items()}
        for tensor in spoiled.values():
            tensor[tokens:] = torch.nan
        got = call(name, arguments(tensors | spoiled, tokens))
        assert all(torch.equal(got[what], expected[what]) for what in expected), f"at {tokens}"
        assert all(tensor[tokens:].isnan().all() for tensor in spoiled.values()), f"at {tokens}"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_tokens_one_after_another(tensors: dict[str, Tensor], name: str) -> None:
    """New keys and values, put into the cache, are what later calls see."""
    k, v = (torch.full((ROOM, HIDDEN), torch.nan, device=GPU, dtype=torch.float16) for _ in range(2))
    for token in range(40):
        given = arguments(tensors | {"k_cache": k, "v_cache": v}, token, seed=token)
        exact = formula(name, given, torch.float64)["output"]
        got = call(name, given)
        torch.testing.assert_close(got["output"].double(), exact, rtol=5e-3, atol=5e-3)
        k[token], v[token] = got["k_new"].flatten(), got["v_new"].flatten()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_misaligned_input_is_copied(tensors: dict[str, Tensor], name: str) -> None:
    given = arguments(tensors, 20)
    room = torch.empty(2, HIDDEN + 8, device=GPU, dtype=torch.float16)
    moved = {}
    for row, what in zip(room, ("input", "residual"), strict=True):
        moved[what] = row[1 : HIDDEN + 1][None].copy_(given[what])
    expected, got = call(name, given), call(name, given, **moved)
    assert all(torch.equal(got[what], expected[what]) for what in expected)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_caller_may_capture_it(tensors: dict[str, Tensor], name: str) -> None:
    given = arguments(tensors, 300)
    expected = call(name, given)
    torch.cuda.synchronize()
    graph, residual = torch.cuda.CUDAGraph(), given["residual"].clone()
    with torch.cuda.graph(graph):
        got = call(name, given, residual=residual)
    for _ in range(3):
        residual.copy_(given["residual"])
        graph.replay()
        assert all(torch.equal(got[what], expected[what]) for what in expected)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_bad_arguments_are_named_before_anything_changes(tensors: dict[str, Tensor], name: str) -> None:
    given = arguments(tensors, 20)
    residual = given["residual"].clone()
    odd = torch.empty(20 * HIDDEN + 8, device=GPU, dtype=torch.float16)[1 : 20 * HIDDEN + 1].view(20, HIDDEN)
    changes: dict[str, list[tuple[Any, str]]] = {
        "input": [(given["input"].float(), "float32"), (given["input"][0], "shape"), (None, "NoneType")],
        "weight_qkv": [(given["weight_qkv"].cpu(), "on cpu"), (given["weight_qkv"][:HIDDEN], "shape")],
        "weight_o": [(given["weight_o"].T, "strides")],
        "k_cache": [(odd, "address"), (tensors["k_cache"][:40:2], "strides"), (given["k_cache"].cpu(), "on cpu")],
        "v_cache": [(odd, "address"), (given["v_cache"][1:], "shape")],
        "rms_input_weight": [(given["rms_input_weight"].bfloat16(), "bfloat16")],
        "cos": [(given["cos"].half(), "float16"), (given["cos"][:, :32], "shape")],
        "sin": [(given["sin"].cpu(), "on cpu"), (given["sin"][:, :64], "shape")],
    }
    for argument, bad_ones in changes.items():
        for bad, seen in bad_ones:
            with pytest.raises(ArgumentError, match=f"^{argument} is .*{seen}.*must be"):
                call(name, given, **{argument: bad}, residual=residual)
    assert torch.equal(residual, given["residual"])


# -- a batch over a paged cache ----------------------------------------------------------------------------------------


def batch_arguments(tensors: dict[str, Tensor], sequences: list[list[int]]) -> dict[str, Any]:
    """In the function's order, but for the caches of two layers, which come last."""
    generator, batch = torch.Generator(GPU).manual_seed(5), len(sequences)
    caches = {name: [tensors[f"{name}_cache"].clone() for _ in range(2)] for name in "kv"}
    angles = 6 * torch.rand(5000, HEAD_DIM // 2, device=GPU, generator=generator)
    bounds = [sum(map(len, sequences[:b])) for b in range(batch + 1)]
    slots = [slot for sequence in sequences for slot in sequence]
    addresses = {
        name: torch.tensor([c.data_ptr() for c in caches[name]], dtype=torch.uint64, device=GPU) for name in "kv"
    }
    return {
        "output": torch.full((batch, HIDDEN), torch.nan, dtype=torch.float16, device=GPU),
        "residual_output": torch.full((batch, HIDDEN), torch.nan, dtype=torch.float16, device=GPU),
        "input": random(generator, batch, HIDDEN).half(),
        "residual": random(generator, batch, HIDDEN).half(),
        "weight_qkv": tensors["weight_qkv"],
        "weight_o": tensors["weight_o"],
        "paged_kv_indptr": torch.tensor(bounds, dtype=torch.int32, device=GPU),
        "paged_kv_indices": torch.tensor(slots, dtype=torch.int32, device=GPU),
        "k_cache_ptrs": addresses["k"],
        "v_cache_ptrs": addresses["v"],
        "layer_id": 1,
        "rms_input_weight": tensors["rms_input_weight"],
        "eps": 1e-5,
        "positions": torch.tensor([len(s) - 1 for s in sequences], dtype=torch.int64, device=GPU),
        "cos_sin": torch.cat((angles.cos(), angles.sin()), 1),
        "caches": caches,
    }


def call_batch(given: dict[str, Any], **changes: Any) -> None:
    values = {name: value for name, value in (given | changes).items() if name != "caches"}
    clusterfusion.llama_decoder_layer_batch_decode_sglang(*values.values())


@pytest.mark.parametrize("lengths", [[1], [2], [18, 1, 1025], [700, 3, 1, 40, 512, 65, 64, 9]])
def test_each_sequence_is_as_by_itself(tensors: dict[str, Tensor], lengths: list[int]) -> None:
    order = torch.randperm(ROOM, generator=torch.Generator().manual_seed(2)).tolist()
    sequences = [order[sum(lengths[:b]) : sum(lengths[: b + 1])] for b in range(len(lengths))]
    given = batch_arguments(tensors, sequences)
    expected = {name: [cache.clone() for cache in given["caches"][name]] for name in "kv"}
    call_batch(given)
    for b, slots in enumerate(sequences):
        cached = torch.tensor(slots[:-1], dtype=torch.int64, device=GPU)
        cos, sin = given["cos_sin"][len(slots) - 1][None].split(HEAD_DIM // 2, 1)
        output, residual, *new = clusterfusion.llama_decoder_layer_sglang(
            given["input"][b : b + 1], given["residual"][b : b + 1].clone(), given["weight_qkv"], given["weight_o"],
            *(tensors[f"{name}_cache"][cached] for name in "kv"), given["rms_input_weight"], 1e-5, cos.contiguous(),
            sin.contiguous(),
        )  # fmt: skip
        assert torch.equal(given["output"][b], output[0]) and torch.equal(given["residual_output"][b], residual[0])
        for name, rows in zip("kv", new, strict=True):
            expected[name][1][slots[-1]] = rows.flatten()
    for name in "kv":
        assert all(torch.equal(a, b) for a, b in zip(given["caches"][name], expected[name], strict=True)), name


def test_bad_batches_are_named_before_anything_changes(tensors: dict[str, Tensor]) -> None:
    given = batch_arguments(tensors, [[4, 5, 6], [7]])
    on_the_host = torch.zeros(ROOM, HIDDEN, dtype=torch.float16)
    addresses = torch.tensor([0, on_the_host.data_ptr()], dtype=torch.uint64, device=GPU)

    def int32(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=GPU)

    for argument, bad in {
        "k_cache_ptrs": addresses,
        "v_cache_ptrs": torch.zeros_like(addresses),
        "paged_kv_indptr": int32(0, 3, 3),
        "paged_kv_indices": int32(4, 5, 6, -7),
        "positions": torch.tensor([0, 5000], device=GPU),
        "layer_id": 2,
    }.items():
        with pytest.raises(ArgumentError, match=f"^{argument} "):
            call_batch(given, **{argument: bad})
    assert given["output"].isnan().all() and given["residual_output"].isnan().all()
    for name in "kv":
        assert all(torch.equal(cache, tensors[f"{name}_cache"]) for cache in given["caches"][name])
