"""A decoder layer whose q, k and v are three matrices, at one token: the torch operator clusterfusion::separate_decoder_layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clusterfusion.ops.layer_checks import (
    check_heads,
    check_separate,
    layer_tensors,
)
from clusterfusion.ops.layer_run import checked_run
from clusterfusion.weights import LayerWeights

# In the operator's order.
_WEIGHTS = (
    *("q_weight", "q_bias", "k_weight", "k_bias", "v_weight", "v_bias", "o_weight", "o_bias"),
    *("gate_weight", "gate_bias", "up_weight", "up_bias", "down_weight", "down_bias"),
    *("input_norm_weight", "input_norm_bias", "post_norm_weight", "post_norm_bias"),
)
_NEEDED = (
    *("q_weight", "k_weight", "v_weight", "o_weight", "up_weight", "down_weight"),
    *("input_norm_weight", "post_norm_weight"),
)


def call_separate(
    x: Tensor, position: Tensor, w: LayerWeights, k_cache: Tensor, v_cache: Tensor, cos: Tensor, sin: Tensor,
    rotary_dim: int, eps: float, activation: str, parallel_residual: bool, form: str, pairing: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return torch.ops.clusterfusion.separate_decoder_layer(
        x,
        position,
        *(getattr(w, name) for name in _WEIGHTS),
        k_cache,
        v_cache,
        cos,
        sin,
        rotary_dim,
        eps,
        activation,
        parallel_residual,
        form,
        pairing,
    )


_SCHEMA = (
    "(Tensor x, Tensor position, "
    + "".join(f"Tensor{'' if name in _NEEDED else '?'} {name}, " for name in _WEIGHTS)
    + "Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cos, Tensor sin, int rotary_dim, float eps, str activation, "
    "bool parallel_residual, str form, str pairing) -> (Tensor, Tensor, Tensor)"
)


@torch.library.custom_op("clusterfusion::separate_decoder_layer", mutates_args=("k_cache", "v_cache"), schema=_SCHEMA)
@torch.no_grad()
def _separate_decoder_layer(x: Tensor, position: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`rest`: as the schema has it, the weights first."""
    tensors, others = rest[: len(_WEIGHTS)], rest[len(_WEIGHTS) :]
    weights = LayerWeights(**dict(zip(_WEIGHTS, tensors, strict=True)), qkv_weight=None, qkv_bias=None)
    check_heads(layer_tensors(weights))
    check_separate(weights)
    return checked_run(x, position, weights, *others)


@_separate_decoder_layer.register_fake
def _(x: Tensor, position: Tensor, q_weight: Tensor, q_bias: Tensor | None, k_weight: Tensor, *rest: Any) -> Any:
    new = (k_weight.shape[0], k_weight.shape[1])
    return x.new_empty(x.shape), k_weight.new_empty(new), k_weight.new_empty(new)
