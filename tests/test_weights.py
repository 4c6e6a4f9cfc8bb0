"""gpt_neox_layer: views of the tensors it is given, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import clusterfusion
from clusterfusion.errors import ArgumentError

HIDDEN = 12


def tensors() -> dict[str, Any]:
    vectors = ("o_bias", "down_bias", "input_norm_weight", "input_norm_bias", "post_norm_weight", "post_norm_bias")
    return {
        "qkv_weight": torch.rand(3 * HIDDEN, HIDDEN),
        "qkv_bias": torch.rand(3 * HIDDEN),
        "o_weight": torch.rand(HIDDEN, HIDDEN),
        "up_weight": torch.rand(4 * HIDDEN, HIDDEN),
        "up_bias": torch.rand(4 * HIDDEN),
        "down_weight": torch.rand(HIDDEN, 4 * HIDDEN),
        **{name: torch.rand(HIDDEN) for name in vectors},
    }


@pytest.mark.parametrize("heads", [3, np.int64(3), np.uint8(3), torch.tensor(3)])
def test_q_k_and_v_are_views(heads: Any) -> None:
    given = tensors()
    layer = clusterfusion.gpt_neox_layer(**given, heads=heads)
    by_heads = given["qkv_weight"].view(3, 3, 4, HIDDEN)
    for i, view in enumerate((layer.q_weight, layer.k_weight, layer.v_weight)):
        assert torch.equal(view, by_heads[:, i])
        assert view.data_ptr() == by_heads[:, i].data_ptr()
    biases = ("qkv_bias", "o_bias", "up_bias", "down_bias")
    layer = clusterfusion.gpt_neox_layer(**given | dict.fromkeys(biases), heads=heads)
    assert layer.q_bias is layer.k_bias is layer.v_bias is None


@pytest.mark.parametrize("heads", [0, 5, 24, -1, 4.0, None, "4", True, np.bool_(True), torch.tensor(True), 10**30])
def test_bad_heads_are_named(heads: Any) -> None:
    with pytest.raises(ArgumentError, match=r"^heads is .*; it must be a divisor of hidden \(12\)"):
        clusterfusion.gpt_neox_layer(**tensors(), heads=heads)


@pytest.mark.parametrize("name", [name for name in tensors() if name.endswith("weight") or "norm" in name])
@pytest.mark.parametrize("value", [None, [1.0], torch.eye(2).to_sparse()])
def test_what_is_no_tensor_is_named(name: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=f"^{name} is .*; it must be a tensor"):
        clusterfusion.gpt_neox_layer(**tensors() | {name: value}, heads=3)


@pytest.mark.parametrize("name", ["qkv_bias", "o_bias", "up_bias", "down_bias"])
def test_a_bias_is_a_tensor_or_none(name: str) -> None:
    with pytest.raises(ArgumentError, match=f"^{name} is a list; it must be a tensor or None"):
        clusterfusion.gpt_neox_layer(**tensors() | {name: [1.0]}, heads=3)


@pytest.mark.parametrize(
    ("name", "value", "needed"),
    [
        ("qkv_weight", torch.rand(2 * HIDDEN, HIDDEN), r"\[3 \* hidden, hidden\]"),
        ("qkv_weight", torch.rand(3 * HIDDEN), r"\[3 \* hidden, hidden\]"),
        ("qkv_weight", torch.tensor(1.0), r"\[3 \* hidden, hidden\]"),
        ("qkv_bias", torch.rand(HIDDEN), r"of shape \[36\]"),
        ("qkv_bias", torch.rand(1, 3 * HIDDEN), r"of shape \[36\]"),
    ],
)
def test_the_fused_projection_has_its_shape(name: str, value: Tensor, needed: str) -> None:
    with pytest.raises(ArgumentError, match=rf"^{name} is of shape \[.*; it must be {needed}"):
        clusterfusion.gpt_neox_layer(**tensors() | {name: value}, heads=3)
