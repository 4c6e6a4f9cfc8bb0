"""decoder_layer of LLaMA layers on the CPU: the reference's mathematics, transformers' own layer, both rotary pairings, both cache
layouts, the operator's contract, and what it refuses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ops.layer_case import ROOM, LayerCase
from tiny_models import relative_error, tiny_llama, weights_of
from torch import Tensor

import clusterfusion
from clusterfusion import reference
from clusterfusion.errors import ArgumentError
from clusterfusion.ops.separate_layer import _WEIGHTS
from clusterfusion.weights import LayerWeights

BIASES = {"attention_bias": True, "mlp_bias": True}


class Case(LayerCase):
    def __init__(self, dtype: torch.dtype = torch.float16, **options: Any) -> None:
        self.model = tiny_llama(num_hidden_layers=1, max_position_embeddings=ROOM, **options).to(dtype)
        whole = weights_of(self.model)
        super().__init__(whole.config, whole.layers[0], dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [{}, BIASES, {"num_key_value_heads": 1}, {"head_dim": 24}],
    ids=["plain", "biases", "one K/V head", "wide"],
)
@pytest.mark.parametrize("position", [0, 7, ROOM - 1])
def test_it_is_the_reference_layer(options: dict[str, Any], position: int, dtype: torch.dtype) -> None:
    case = Case(dtype, **options)
    k, v = case.k.clone(), case.v.clone()
    cos, sin = case.cos[position : position + 1], case.sin[position : position + 1]
    expected = reference.decoder_layer(case.config, case.weights, case.x, cos, sin, k, v, position, dtype=dtype)
    out, k_new, v_new = case.call(position=position)
    assert torch.equal(out, expected)
    assert torch.equal(k_new, k[:, position]) and torch.equal(v_new, v[:, position])
    assert torch.equal(case.k, k) and torch.equal(case.v, v), "the new token is in the cache, the others are untouched"
    assert k_new.shape == (case.config.num_kv_heads, case.config.head_dim)


def test_left_out_activation_and_residual_are_the_familys() -> None:
    case = Case()
    arguments = case.arguments()
    del arguments["activation"], arguments["parallel_residual"]
    expected, got = case.call()[0], clusterfusion.decoder_layer(**arguments)[0]
    assert torch.equal(expected, got)
    assert not torch.equal(expected, case.call(parallel_residual=True)[0])


def neighbours(tensor: Tensor) -> Tensor:
    """Rows of every head [heads, head_dim, ...] so that those that are half a head apart become neighbours."""
    half = tensor.shape[1] // 2
    order = torch.arange(2 * half).view(2, half).T.flatten()
    return tensor[:, order]


@pytest.mark.parametrize("per_dimension", [False, True])
def test_neighbours_are_halves_in_another_order(per_dimension: bool) -> None:
    """A head's dimensions dealt anew, in q, k and the cached keys, change no score."""
    case = Case(**BIASES)
    expected, k_expected, v_expected = case.call()
    w = case.weights
    assert w.q_bias is not None and w.k_bias is not None
    dealt = dataclasses.replace(
        w,
        **{name: neighbours(getattr(w, name)).contiguous() for name in ("q_weight", "k_weight", "q_bias", "k_bias")},
    )
    fresh = Case(**BIASES)
    keys = neighbours(fresh.k.transpose(1, 2)).transpose(1, 2).contiguous()
    tables = [t.repeat_interleave(2, dim=1) if per_dimension else t for t in (case.cos, case.sin)]
    out, k_new, v_new = fresh.call(
        layer_weights=dealt, k_cache=keys, cos=tables[0], sin=tables[1], pairing="neighbours"
    )
    assert relative_error(out, expected) < 1e-3  # sums of another order, operands in float16
    assert torch.equal(k_new, neighbours(k_expected)) and torch.equal(v_new, v_expected)
    wrong, _, _ = Case(**BIASES).call(layer_weights=dealt, k_cache=keys)
    assert relative_error(wrong, expected) > 1e-2, "the pairing matters"


def test_angles_of_their_own_for_both_of_a_pair() -> None:
    case, fresh = Case(), Case()
    cos, sin = (torch.rand(1, case.config.head_dim) for _ in range(2))
    pair = cos[0, 2:4], sin[0, 2:4]
    _, k_new, _ = case.call(cos=cos, sin=sin, pairing="neighbours")
    normed = reference.norm(case.config, case.x, case.weights.input_norm_weight, None)
    k = reference.project_qkv(case.weights, normed, torch.float16)[1][:, 0]
    first = k[:, 2] * pair[0][0] - k[:, 3] * pair[1][0]
    second = k[:, 3] * pair[0][1] + k[:, 2] * pair[1][1]
    assert torch.equal(k_new[:, 2], first.half()) and torch.equal(k_new[:, 3], second.half())
    del fresh


def test_cache_layouts_and_tables_give_the_same_bits() -> None:
    case, fresh = Case(), Case()
    expected = case.call()
    token_major = [cache.transpose(0, 1).flatten(1).contiguous() for cache in (fresh.k, fresh.v)]
    row = [table[7:8] for table in (fresh.cos, fresh.sin)]
    got = fresh.call(k_cache=token_major[0], v_cache=token_major[1], cos=row[0], sin=row[1])
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_llama_layer_takes_the_tensors_of_transformers() -> None:
    case, fresh = Case(**BIASES), Case(**BIASES)
    layer = fresh.model.model.layers[0]
    a, m = layer.self_attn, layer.mlp
    weights = clusterfusion.llama_layer(
        a.q_proj.weight, a.k_proj.weight, a.v_proj.weight, a.o_proj.weight, m.gate_proj.weight, m.up_proj.weight,
        m.down_proj.weight, layer.input_layernorm.weight, layer.post_attention_layernorm.weight, heads=4, kv_heads=2,
        q_bias=a.q_proj.bias, k_bias=a.k_proj.bias, v_bias=a.v_proj.bias, o_bias=a.o_proj.bias, gate_bias=m.gate_proj.bias,
        up_bias=m.up_proj.bias, down_bias=m.down_proj.bias,
    )  # fmt: skip
    assert weights.q_weight.data_ptr() == a.q_proj.weight.data_ptr(), "no copies"
    for got, wanted in zip(fresh.call(layer_weights=weights), case.call(), strict=True):
        assert torch.equal(got, wanted)
    with pytest.raises(ArgumentError, match="kv_heads is 3; it must be a divisor of heads"):
        clusterfusion.llama_layer(*[a.q_proj.weight] * 9, heads=4, kv_heads=3)
    with pytest.raises(ArgumentError, match="q_weight is of shape .* a multiple of 5"):
        clusterfusion.llama_layer(*[a.q_proj.weight] * 9, heads=5, kv_heads=1)
    names = "q_weight k_weight v_weight o_weight gate_weight up_weight down_weight input_norm_weight post_norm_weight"
    for at, name in enumerate(names.split()):
        given: list[Any] = [a.q_proj.weight] * 9
        given[at] = 3
        with pytest.raises(ArgumentError, match=f"{name} is"):
            clusterfusion.llama_layer(*given, heads=4, kv_heads=4)
    with pytest.raises(ArgumentError, match="down_bias is"):
        clusterfusion.llama_layer(*[a.q_proj.weight] * 9, heads=4, kv_heads=4, down_bias=[1.0])  # type: ignore[arg-type]


def operator_arguments(case: Case) -> tuple[Any, ...]:
    position = torch.tensor([7], dtype=torch.int32)
    weights = [getattr(case.weights, name) for name in _WEIGHTS]
    options = (case.config.rotary.dim, 1e-6, "silu", False, "fused", "halves")
    return (case.x, position, *weights, case.k, case.v, case.cos, case.sin, *options)


@pytest.mark.parametrize("options", [{}, BIASES], ids=["plain", "biases"])
def test_the_operator_passes_opcheck(options: dict[str, Any]) -> None:
    operator = torch.ops.clusterfusion.separate_decoder_layer.default
    results = torch.library.opcheck(operator, operator_arguments(Case(**options)))
    assert set(results.values()) == {"SUCCESS"}


Change = Callable[[Case], dict[str, Any]]


def replaced(name: str, make: Callable[[Tensor], Any]) -> Change:
    return lambda case: {
        "layer_weights": dataclasses.replace(case.weights, **{name: make(getattr(case.weights, name))})
    }


def without_bias_of_pair(case: Case) -> dict[str, Any]:
    weights: LayerWeights = dataclasses.replace(case.weights, input_norm_bias=case.weights.input_norm_weight)
    return {"layer_weights": weights}


BAD: dict[str, tuple[Change, str]] = {
    "fp32 weights": (replaced("q_weight", lambda t: t.float()), "q_weight is torch.float32"),
    "k of another dtype": (replaced("k_weight", lambda t: t.bfloat16()), "k_weight is torch.bfloat16"),
    "flat q": (replaced("q_weight", lambda t: t.flatten(0, 1)), "q_weight is of shape .*\\[heads, head_dim, hidden\\]"),
    "three K/V heads for four": (replaced("k_weight", lambda t: t[:1].repeat(3, 1, 1)), "kv_heads a divisor of 4"),
    "v unlike k": (replaced("v_weight", lambda t: t[:1]), "v_weight is of shape .* k and v alike"),
    "transposed gate": (replaced("gate_weight", lambda t: t.T), "gate_weight is of shape"),
    "strided up": (replaced("up_weight", lambda t: t.T.contiguous().T), "up_weight is of strides"),
    "short down": (replaced("down_weight", lambda t: t[:, :-8]), "down_weight is of shape"),
    "wrong o": (replaced("o_weight", lambda t: t[:, :-8]), "o_weight is of shape"),
    "bias of the wrong shape": (replaced("q_bias", lambda _: torch.zeros(32).half()), "q_bias is of shape"),
    "gate a list": (replaced("gate_weight", lambda _: [1.0]), "gate_weight is a list"),
    "no norm": (replaced("post_norm_weight", lambda _: None), "post_norm_weight is a NoneType"),
    "one norm bias": (without_bias_of_pair, "one norm bias of two"),
    "a bias for a gate that is not there": (
        lambda c: {"layer_weights": dataclasses.replace(c.weights, gate_weight=None, gate_bias=torch.zeros(80).half())},
        "gate_bias and no gate_weight",
    ),
    "a cache for all query heads": (lambda c: {"k_cache": c.k.repeat(2, 1, 1)}, "k_cache is of shape"),
    "one cache for both": (lambda c: {"v_cache": c.k}, "v_cache shares elements"),
    "position past the cache": (lambda c: {"position": ROOM}, "position is 40"),
    "odd rotary_dim": (lambda c: {"rotary_dim": 3}, "rotary_dim is 3"),
    "relu": (lambda c: {"activation": "relu"}, "activation is 'relu'"),
    "other pairs": (lambda c: {"pairing": "interleaved"}, "pairing is 'interleaved'; it must be one of"),
    "narrow tables": (lambda c: {"cos": c.cos[:, :-1]}, "cos is of shape"),
}


@pytest.mark.parametrize(("change", "complaint"), BAD.values(), ids=BAD)
def test_bad_arguments_are_named(change: Change, complaint: str) -> None:
    case = Case()
    with pytest.raises(ArgumentError, match=complaint):
        case.call(**change(case))


def test_a_layer_without_a_gate_and_with_layer_norms_runs_too() -> None:
    """What the three matrices have to do with norms and gates is nothing."""
    case = Case()
    bias = torch.randn(32).half()
    plain = dataclasses.replace(case.weights, gate_weight=None, input_norm_bias=bias, post_norm_bias=bias)
    out, _, _ = case.call(layer_weights=plain, activation="gelu", parallel_residual=True)
    config = dataclasses.replace(
        case.config, norm="layer_norm", gated_mlp=False, activation="gelu", parallel_residual=True
    )
    row = slice(7, 8)
    k, v = Case().k, Case().v
    wanted = reference.decoder_layer(config, plain, case.x, case.cos[row], case.sin[row], k, v, 7, dtype=torch.float16)
    assert torch.equal(out, wanted)
