"""The seed's LLaMA function over a paged cache on the CPU: a sequence's results are those of the function for one."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from test_seed_llama import HEAD_DIM, HIDDEN, spoiled
from torch import Tensor

import clusterfusion
from clusterfusion.errors import ArgumentError

SLOTS, LAYERS, ROWS = 64, 3, 100
SEQUENCES = [[5, 9, 2, 40], [7], [63, 0, 1, 2, 3, 4, 50, 51, 52]]  # the first and the last share slot 2
ARGUMENTS = (
    *(
        "output",
        "residual_output",
        "input",
        "residual",
        "weight_qkv",
        "weight_o",
        "paged_kv_indptr",
        "paged_kv_indices",
    ),
    *("k_cache_ptrs", "v_cache_ptrs", "layer_id", "rms_input_weight", "eps", "positions", "cos_sin"),
)


def call(given: dict[str, Any], **changes: Any) -> None:
    given = given | changes
    result = clusterfusion.llama_decoder_layer_batch_decode_sglang(*(given[name] for name in ARGUMENTS))
    assert result is None


def pointers(caches: list[Tensor]) -> Tensor:
    return torch.tensor([cache.data_ptr() for cache in caches], dtype=torch.uint64)


def arguments(sequences: list[list[int]], weights: dict[str, Tensor] | None = None) -> dict[str, Any]:
    """Beside the arguments the caches: k and v of each layer."""
    generator = torch.Generator().manual_seed(5)
    batch = len(sequences)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).half()

    if weights is None:
        weights = {"weight_qkv": torch.zeros(3 * HIDDEN, HIDDEN).half(), "weight_o": torch.zeros(HIDDEN, HIDDEN).half()}
    caches = {name: [random(SLOTS, HIDDEN) for _ in range(LAYERS)] for name in ("k", "v")}
    angles = 6 * torch.rand(ROWS, HEAD_DIM // 2, generator=generator)
    bounds = [sum(map(len, sequences[:b])) for b in range(batch + 1)]
    return weights | {
        **{name: torch.full((batch, HIDDEN), torch.nan).half() for name in ("output", "residual_output")},
        **{name: random(batch, HIDDEN) for name in ("input", "residual")},
        "paged_kv_indptr": torch.tensor(bounds, dtype=torch.int32),
        "paged_kv_indices": torch.tensor(
            [*itertools.chain(*sequences), -1, -1], dtype=torch.int32
        ),  # room behind the last
        "k_cache_ptrs": pointers(caches["k"]),
        "v_cache_ptrs": pointers(caches["v"]),
        "layer_id": 1,
        "rms_input_weight": random(HIDDEN),
        "eps": 1e-5,
        "positions": torch.tensor([3 * b + 1 for b in range(batch)], dtype=torch.int64),
        "cos_sin": torch.cat((angles.cos(), angles.sin()), 1),
        "caches": caches,
    }


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(8)
    matrices = {"weight_qkv": 3 * HIDDEN, "weight_o": HIDDEN}
    made = {name: torch.randn(rows, HIDDEN, generator=generator) / 64 for name, rows in matrices.items()}
    return {name: matrix.half() for name, matrix in made.items()}


def unchanged(given: dict[str, Any], before: dict[str, Any], *names: str) -> bool:
    return all(torch.equal(given[name], before[name]) for name in names)


@pytest.mark.parametrize("in_place", [False, True])
def test_each_sequence_is_as_by_itself(weights: dict[str, Tensor], in_place: bool) -> None:
    given, before = arguments(SEQUENCES, weights), arguments(SEQUENCES, weights)
    if in_place:
        given["residual_output"] = given["residual"]
    call(given)
    expected = {name: [cache.clone() for cache in before["caches"][name]] for name in "kv"}
    for b, slots in enumerate(SEQUENCES):
        row = given["cos_sin"][given["positions"][b]]
        output, residual, *new = clusterfusion.llama_decoder_layer_sglang(
            before["input"][b : b + 1], before["residual"][b : b + 1].clone(), weights["weight_qkv"], weights["weight_o"],
            *(before["caches"][name][1][slots[:-1]] for name in "kv"), before["rms_input_weight"], 1e-5,
            *(table[None].contiguous() for table in row.split(HEAD_DIM // 2)),
        )  # fmt: skip
        assert torch.equal(given["output"][b], output[0]) and torch.equal(given["residual_output"][b], residual[0])
        for name, rows in zip("kv", new, strict=True):
            expected[name][1][slots[-1]] = rows.flatten()
    for name in "kv":
        assert all(torch.equal(a, b) for a, b in zip(given["caches"][name], expected[name], strict=True)), name
    kept = ["input", "paged_kv_indptr", "paged_kv_indices", "positions", "cos_sin"]
    assert unchanged(given, before, *kept, *([] if in_place else ["residual"]))


def test_an_empty_batch() -> None:
    given = arguments([])
    before = [cache.clone() for cache in given["caches"]["k"]]
    call(given)
    assert all(torch.equal(a, b) for a, b in zip(given["caches"]["k"], before, strict=True))


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def given() -> Any:
    """Checked afterwards: that nothing has changed."""
    made, before = arguments(SEQUENCES), arguments(SEQUENCES)
    yield made
    assert made["output"].isnan().all() and made["residual_output"].isnan().all()
    assert unchanged(made, before, "input", "residual")
    for name in "kv":
        assert all(torch.equal(a, b) for a, b in zip(made["caches"][name], before["caches"][name], strict=True))


@pytest.mark.parametrize("argument", [name for name in ARGUMENTS if name not in ("layer_id", "eps")])
def test_a_bad_tensor_is_named(given: dict[str, Any], argument: str) -> None:
    one_dimension = ("k_cache_ptrs", "paged_kv_indices")  # of any length
    for what, (bad, seen) in spoiled(given[argument]).items():
        if what == "negated" and argument in ("k_cache_ptrs", "v_cache_ptrs"):
            continue  # there is none of that dtype
        if what == "width" and argument in one_dimension:
            continue
        with pytest.raises(ArgumentError, match=f"^{argument} is .*must be") as caught:
            call(given, **{argument: bad})
        assert seen in str(caught.value), caught.value


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("argument", "value", "complaint"),
    [
        ("paged_kv_indptr", int32(1, 4, 5, 14), "1 at 0; it must be 0"),
        ("paged_kv_indptr", int32(0, 4, 4, 14), "4 at 2; it must be more than 4 .* no sequence is empty"),
        ("paged_kv_indptr", int32(0, 5, 4, 14), "4 at 2; it must be more than 5"),
        ("paged_kv_indptr", int32(0, 4, 5, 17), "17 at 3; it must be .* at most 16"),
        ("paged_kv_indptr", int32(0, 4, 5, 15), None),  # -1 is among the slots then
        ("layer_id", 3, "3; it must be an int from 0 to 2"),
        ("layer_id", -1, "-1; it must be an int from 0 to 2"),
        ("layer_id", 1.0, "1.0; it must be an int"),
        ("layer_id", True, "True; it must be an int"),
        ("eps", 0.0, "0.0; it must be a positive number"),
        ("positions", torch.tensor([0, 100, 0]), "100 at 1; it must be from 0 to 99"),
        ("positions", torch.tensor([0, 0, -1]), "-1 at 2; it must be from 0 to 99"),
        ("k_cache_ptrs", torch.tensor([64, 0, 64], dtype=torch.uint64), "0x0 at 1; it must be the address"),
        ("v_cache_ptrs", torch.tensor([64, 0, 64], dtype=torch.uint64), "0x0 at 1; it must be the address"),
        ("v_cache_ptrs", torch.tensor([64, 72, 64], dtype=torch.uint64), "0x48 at 1; .* a multiple of 16"),
    ],
)
def test_a_bad_value_is_named(given: dict[str, Any], argument: str, value: Any, complaint: str | None) -> None:
    named = f"^{argument} is {complaint}" if complaint else "^paged_kv_indices is -1 at 14; it must be a slot"
    with pytest.raises(ArgumentError, match=named):
        call(given, **{argument: value})


@pytest.mark.parametrize("at", [3, 4, 13])
def test_a_new_token_has_a_slot_of_its_own(given: dict[str, Any], at: int) -> None:
    indices = given["paged_kv_indices"].clone()
    indices[at] = 0
    with pytest.raises(ArgumentError, match=f"^paged_kv_indices is 0 at {at}, .*it must be a slot of its own"):
        call(given, paged_kv_indices=indices)


def test_what_is_written_has_memory_of_its_own(given: dict[str, Any]) -> None:
    for argument, other in (("output", "input"), ("output", "residual"), ("residual_output", "input")):
        with pytest.raises(ArgumentError, match=f"^{argument} shares memory with {other}"):
            call(given, **{argument: given[other]})
    with pytest.raises(ArgumentError, match="^output shares memory with residual_output"):
        call(given, output=given["residual_output"])
    with pytest.raises(
        ArgumentError,
        match=r"^the k_cache at k_cache_ptrs \(up to slot \d+, the largest of paged_kv_indices\) shares memory with the v_cache",
    ):
        call(given, v_cache_ptrs=given["k_cache_ptrs"])
    with pytest.raises(
        ArgumentError, match=r"^the v_cache at v_cache_ptrs \(up to slot \d+, .*\) shares memory with input"
    ):
        call(given, input=given["caches"]["v"][1][:3])
