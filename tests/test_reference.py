"""The reference against `transformers` on the CPU, over every option that changes the mathematics."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import random_token_ids, relative_error, tiny_model, weights_of
from torch import Tensor
from transformers import PreTrainedModel

from clusterfusion import reference
from clusterfusion.architecture import DecoderConfig
from clusterfusion.reference import KVCache
from clusterfusion.weights import DecoderWeights, LayerWeights, expected_tensors

PROMPT = 13
STEPS = 32
TOLERANCE = 1e-5  # float32 against float32, sums in another order; 2 layers measure up to 1e-6

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,  # short, so that the positions of a test lie beyond it
}

# An eps of 1e-5 moves these logits by less than the tolerance, so the eps variants are large.
GRID: dict[str, tuple[str, dict[str, Any]]] = {
    "neox-default": ("gpt_neox", {}),
    "neox-sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "neox-rotary-all": ("gpt_neox", {"rotary_pct": 1.0}),
    "neox-rotary-all-sequential": ("gpt_neox", {"rotary_pct": 1.0, "use_parallel_residual": False}),
    "neox-rotary-none": ("gpt_neox", {"rotary_pct": 0.0}),
    "neox-rotary-3-of-10": ("gpt_neox", {"rotary_pct": 0.3, "hidden_size": 40}),
    "neox-rotary-2.8-of-8": ("gpt_neox", {"rotary_pct": 0.35}),
    "neox-rotary-5-of-20": ("gpt_neox", {"hidden_size": 80}),
    "neox-rotary-1-of-4": ("gpt_neox", {"hidden_size": 16}),
    "neox-base-500": ("gpt_neox", {"rotary_pct": 1.0, "rotary_emb_base": 500}),
    "neox-base-1e6": ("gpt_neox", {"rotary_pct": 1.0, "rotary_emb_base": 1e6}),
    "neox-linear-scaling": ("gpt_neox", {"rotary_pct": 0.5, "rope_scaling": {"type": "linear", "factor": 3.0}}),
    "neox-llama3-scaling": ("gpt_neox", {"hidden_size": 128, "rope_scaling": LLAMA3_SCALING}),
    "neox-gelu-new": ("gpt_neox", {"hidden_act": "gelu_new"}),
    "neox-gelu-fast": ("gpt_neox", {"hidden_act": "gelu_fast"}),
    "neox-gelu-pytorch-tanh": ("gpt_neox", {"hidden_act": "gelu_pytorch_tanh", "use_parallel_residual": False}),
    "neox-gelu-python": ("gpt_neox", {"hidden_act": "gelu_python"}),
    "neox-no-attention-bias": ("gpt_neox", {"attention_bias": False}),
    "neox-tied": ("gpt_neox", {"tie_word_embeddings": True, "vocab_size": 257}),
    "neox-eps-1e-2": ("gpt_neox", {"layer_norm_eps": 1e-2}),
    "neox-head-80": ("gpt_neox", {"hidden_size": 160, "num_attention_heads": 2, "intermediate_size": 96}),
    "neox-head-96": ("gpt_neox", {"hidden_size": 192, "num_attention_heads": 2, "rotary_pct": 1.0}),
    "neox-one-head-one-layer": ("gpt_neox", {"num_attention_heads": 1, "num_hidden_layers": 1}),
    "neox-four-layers": ("gpt_neox", {"num_hidden_layers": 4, "intermediate_size": 31}),
    "llama-grouped": ("llama", {}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "llama-multi-head": ("llama", {"num_key_value_heads": 4, "vocab_size": 257}),
    "llama-groups-of-3": ("llama", {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2}),
    "llama-head-dim-larger": ("llama", {"head_dim": 20}),
    "llama-head-dim-smaller": ("llama", {"head_dim": 4}),
    "llama-head-80": ("llama", {"hidden_size": 64, "head_dim": 80, "num_attention_heads": 2, "num_key_value_heads": 1}),
    "llama-head-96": ("llama", {"hidden_size": 96, "num_attention_heads": 1, "num_key_value_heads": 1}),
    "llama-llama3-scaling": ("llama", {"head_dim": 32, "rope_theta": 500.0, "rope_scaling": LLAMA3_SCALING}),
    "llama-linear-scaling": ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "llama-base-500000": ("llama", {"rope_theta": 500000.0}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-attention-bias": ("llama", {"attention_bias": True}),
    "llama-mlp-bias": ("llama", {"mlp_bias": True}),
    "llama-all-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 20}),
    "llama-eps-1e-2": ("llama", {"rms_norm_eps": 1e-2}),
    "llama-four-layers": ("llama", {"num_hidden_layers": 4, "intermediate_size": 31}),
}

# One of each kind, for properties that do not depend on every option.
FEW = (
    "neox-default",
    "neox-rotary-all-sequential",
    "neox-rotary-5-of-20",
    "neox-rotary-none",
    "llama-llama3-scaling",
    "llama-all-biases",
    "llama-one-kv-head",
)

grid = pytest.mark.parametrize("name", GRID)
few = pytest.mark.parametrize("name", FEW)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """These matrices are too small to share: handing them between threads costs more than the product."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def build(name: str) -> tuple[PreTrainedModel, DecoderWeights]:
    """A model of the grid and the weights over it. Its attention is written out in PyTorch ("eager"), so that a mistake
    in the use of `scaled_dot_product_attention` is not made on both sides."""
    family, options = GRID[name]
    model = tiny_model(family, attn_implementation="eager", **options)
    return model, weights_of(model)


@torch.no_grad()
def transformers_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits [T, vocab] of one forward pass without a cache."""
    logits: Tensor = model(ids[None], use_cache=False).logits[0]
    return logits


def new_cache(weights: DecoderWeights, max_len: int, dtype: torch.dtype | None = None) -> KVCache:
    return KVCache.allocate(weights.config, max_len, dtype or weights.dtype, weights.device)


def prefill_and_steps(
    weights: DecoderWeights, ids: Tensor, *, prompt: int = PROMPT, dtype: torch.dtype | None = None
) -> Tensor:
    """Logits [T - prompt + 1, vocab]: after the prompt, then after each further token, one cached step at a time."""
    cache = new_cache(weights, len(ids), dtype)
    rows = [reference.forward(weights, ids[:prompt], cache, 0, dtype=dtype)]
    rows += [
        reference.forward(weights, ids[position : position + 1], cache, position, dtype=dtype)
        for position in range(prompt, len(ids))
    ]
    return torch.stack(rows)


def all_rows(weights: DecoderWeights, ids: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """Logits [T, vocab] of one prefill."""
    return reference.forward(weights, ids, new_cache(weights, len(ids), dtype), 0, dtype=dtype, last_only=False)


@grid
def test_prefill_and_cached_steps_agree_with_transformers(name: str) -> None:
    model, weights = build(name)
    ids = random_token_ids(weights.config.vocab_size, PROMPT + STEPS, seed=1)
    wanted = transformers_logits(model, ids)
    got = prefill_and_steps(weights, ids)
    assert got.dtype == torch.float32
    assert relative_error(got[0], wanted[PROMPT - 1]) < TOLERANCE
    for step, row in enumerate(got[1:]):
        assert relative_error(row, wanted[PROMPT + step]) < TOLERANCE, f"step {step}"


@few
def test_cached_steps_agree_with_the_cached_steps_of_transformers(name: str) -> None:
    model, weights = build(name)
    ids = random_token_ids(weights.config.vocab_size, PROMPT + STEPS, seed=2)
    got = prefill_and_steps(weights, ids)
    with torch.no_grad():
        out = model(ids[None, :PROMPT], use_cache=True)
        for step, row in enumerate(got):
            assert relative_error(row, out.logits[0, -1]) < TOLERANCE, f"step {step}"
            if PROMPT + step < len(ids):
                token = ids[None, PROMPT + step : PROMPT + step + 1]
                out = model(token, past_key_values=out.past_key_values, use_cache=True)


@grid
def test_the_cache_holds_what_transformers_caches(name: str) -> None:
    model, weights = build(name)
    ids = random_token_ids(weights.config.vocab_size, PROMPT, seed=3)
    cache = new_cache(weights, PROMPT)
    reference.forward(weights, ids, cache, 0)
    with torch.no_grad():
        layers = model(ids[None], use_cache=True).past_key_values.layers
    for i, layer in enumerate(layers):
        assert relative_error(cache.k[i], layer.keys[0]) < TOLERANCE, f"keys of layer {i}"
        assert relative_error(cache.v[i], layer.values[0]) < TOLERANCE, f"values of layer {i}"


@grid
def test_expected_tensors_are_those_of_the_model(name: str) -> None:
    model, weights = build(name)
    held = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if weights.config.tied_embeddings:
        del held["lm_head.weight"]
    assert expected_tensors(weights.config) == held
    assert weights.config.num_parameters == sum(p.numel() for p in model.parameters())
    assert weights.num_bytes == sum(p.nbytes for p in model.parameters())


@few
@pytest.mark.parametrize("pieces", [(1, 12), (7, 6), (12, 1), (4, 1, 5, 3)], ids=str)
def test_prefill_in_pieces_equals_one_prefill(name: str, pieces: tuple[int, ...]) -> None:
    _, weights = build(name)
    ids = random_token_ids(weights.config.vocab_size, PROMPT, seed=4)
    whole, parts = new_cache(weights, PROMPT), new_cache(weights, PROMPT)
    wanted = reference.forward(weights, ids, whole, 0, last_only=False)
    rows, position = [], 0
    for piece in ids.split(list(pieces)):
        rows.append(reference.forward(weights, piece, parts, position, last_only=False))
        position += len(piece)
    assert position == PROMPT
    assert relative_error(torch.cat(rows), wanted) < TOLERANCE
    assert relative_error(parts.k, whole.k) < TOLERANCE
    assert relative_error(parts.v, whole.v) < TOLERANCE


@few
def test_rows_of_one_prefill_equal_the_step_by_step_ones(name: str) -> None:
    _, weights = build(name)
    ids = random_token_ids(weights.config.vocab_size, PROMPT, seed=5)
    rows = all_rows(weights, ids)
    assert rows.shape == (PROMPT, weights.config.vocab_size)
    assert relative_error(rows, prefill_and_steps(weights, ids, prompt=1)) < TOLERANCE
    last = reference.forward(weights, ids, new_cache(weights, PROMPT), 0)
    assert last.shape == (weights.config.vocab_size,)
    assert relative_error(last, rows[-1]) < TOLERANCE


@few
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_cache_entries_from_the_position_on_are_never_read(name: str, poison: float) -> None:
    _, weights = build(name)
    ids = random_token_ids(weights.config.vocab_size, PROMPT + 4, seed=6)
    clean, poisoned = new_cache(weights, len(ids) + 3), new_cache(weights, len(ids) + 3)
    poisoned.k.fill_(poison)
    poisoned.v.fill_(poison)
    position = 0
    for piece in ids.split([PROMPT - 2, 2, 1, 1, 2]):  # first prefill, prefill over a cache, steps
        wanted = reference.forward(weights, piece, clean, position, last_only=False)
        got = reference.forward(weights, piece, poisoned, position, last_only=False)
        assert torch.equal(got, wanted), f"at position {position}"
        position += len(piece)


@few
def test_only_the_cache_entries_of_the_new_tokens_are_written(name: str) -> None:
    _, weights = build(name)
    ids = random_token_ids(weights.config.vocab_size, PROMPT, seed=7)
    cache = new_cache(weights, PROMPT + 5)
    reference.forward(weights, ids, cache, 0)
    cache.k[:, :, PROMPT:] = cache.v[:, :, PROMPT:] = 7.0
    before = [cache.k.clone(), cache.v.clone()]
    reference.forward(weights, ids[:2], cache, PROMPT)
    for tensor, old in zip((cache.k, cache.v), before, strict=True):
        unchanged = (tensor == old).all(dim=(0, 1, 3))
        assert unchanged.tolist() == [True] * PROMPT + [False] * 2 + [True] * 3


@grid
def test_float64_agrees_with_a_double_model(name: str) -> None:
    """How close a `.double()` model is to the truth: not to 1e-15, because transformers computes some parts in float32
    whatever the model's dtype. Angles are float32 on both sides, but their cosines and sines are float32 there
    and float64 here: 6e-8. LlamaRMSNorm casts its input to float32: another 6e-8 for each norm. Without a rotary
    embedding, GPT-NeoX has neither and must agree to float64's own precision."""
    family, options = GRID[name]
    model = tiny_model(family, **options).double()  # "sdpa": the written-out softmax is float32 too
    weights = weights_of(model)
    ids = random_token_ids(weights.config.vocab_size, PROMPT + STEPS, seed=8)
    got = all_rows(weights, ids)
    assert got.dtype == torch.float64
    exact = family == "gpt_neox" and weights.config.rotary.dim == 0
    assert relative_error(got, transformers_logits(model, ids)) < (1e-13 if exact else 1e-6)


@few
def test_float64_operands_over_float32_weights_equal_a_float64_copy_of_them(name: str) -> None:
    family, options = GRID[name]
    single, double = weights_of(tiny_model(family, **options)), weights_of(tiny_model(family, **options).double())
    ids = random_token_ids(single.config.vocab_size, PROMPT, seed=9)
    got = prefill_and_steps(single, ids, prompt=5, dtype=torch.float64)
    assert got.dtype == torch.float64
    assert relative_error(got, prefill_and_steps(double, ids, prompt=5)) < 1e-13


@few
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_is_at_least_as_accurate_as_transformers(name: str, dtype: torch.dtype) -> None:
    """Both sides run the same rounded weights; the truth is float64 arithmetic over those."""
    family, options = GRID[name]
    model = tiny_model(family, **options).to(dtype)
    weights = weights_of(model)
    assert weights.dtype == dtype
    ids = random_token_ids(weights.config.vocab_size, PROMPT + STEPS, seed=10)
    truth = all_rows(weights, ids, dtype=torch.float64)[PROMPT - 1 :]
    got = prefill_and_steps(weights, ids)
    assert got.dtype == torch.float32
    ours = (got - truth).abs().mean().item()
    theirs = (transformers_logits(model, ids)[PROMPT - 1 :] - truth).abs().mean().item()
    assert 0 < ours <= 1.25 * theirs
    # The dtype of operands, not of the weights, decides: float32 over the same weights is nearly exact.
    assert relative_error(prefill_and_steps(weights, ids, dtype=torch.float32), truth) < TOLERANCE


ROTARY_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "pythia-2.8b": ("gpt_neox", {"hidden_size": 160, "num_attention_heads": 2}),
    "redpajama-3b": ("gpt_neox", {"hidden_size": 160, "num_attention_heads": 2, "rotary_pct": 1.0}),
    "odd": ("gpt_neox", {"hidden_size": 20, "num_attention_heads": 1, "rotary_emb_base": 500}),
    "llama-2": ("llama", {"head_dim": 128}),
    "llama-3": ("llama", {"head_dim": 128, "rope_theta": 500000.0}),
    "linear": ("llama", {"head_dim": 128, "rope_scaling": {"type": "linear", "factor": 3.0}}),
    "llama-3.1": (
        "llama",
        {
            "head_dim": 128,
            "rope_theta": 500000.0,
            "rope_scaling": LLAMA3_SCALING | {"original_max_position_embeddings": 8192},
        },
    ),
    "llama-3.2": (
        "llama",
        {
            "head_dim": 64,
            "rope_theta": 500000.0,
            "rope_scaling": LLAMA3_SCALING | {"factor": 32.0, "original_max_position_embeddings": 8192},
        },
    ),
}


@pytest.mark.parametrize("name", ROTARY_MODELS)
def test_rotary_tables_equal_those_of_transformers_to_the_bit(name: str) -> None:
    family, options = ROTARY_MODELS[name]
    model = tiny_model(family, num_hidden_layers=1, **options)
    rotary = DecoderConfig.from_dict(model.config.to_dict()).rotary
    positions = torch.cat((torch.arange(4096), torch.arange(130_000, 131_072)))
    module = model.base_model.rotary_emb
    cos, sin = reference.rotary_tables(rotary, positions, torch.float32)
    wanted_cos, wanted_sin = module(torch.empty(0), positions[None])
    half = rotary.dim // 2
    assert torch.equal(reference.rotary_frequencies(rotary), module.inv_freq)
    assert torch.equal(cos, wanted_cos[0, :, :half]) and torch.equal(cos, wanted_cos[0, :, half:])
    assert torch.equal(sin, wanted_sin[0, :, :half]) and torch.equal(sin, wanted_sin[0, :, half:])


@pytest.mark.parametrize("name", ROTARY_MODELS)
def test_float64_rotary_tables_are_exact_functions_of_float32_angles(name: str) -> None:
    """Rounding an angle of 1e5 to float32 moves it by up to 4e-3: the models run with that, so the truth has it too."""
    family, options = ROTARY_MODELS[name]
    model = tiny_model(family, num_hidden_layers=1, **options)
    rotary = DecoderConfig.from_dict(model.config.to_dict()).rotary
    positions = torch.tensor([0, 1, 4095, 131_071])
    angles = (positions[:, None].float() * model.base_model.rotary_emb.inv_freq).double()
    cos, sin = reference.rotary_tables(rotary, positions, torch.float64)
    assert torch.equal(cos, angles.cos()) and torch.equal(sin, angles.sin())


def storage_span(tensor: Tensor) -> tuple[int, int]:
    """The storage a tensor is a view of, and where in it the tensor starts."""
    return tensor.untyped_storage().data_ptr(), tensor.data_ptr()


@grid
def test_assembled_weights_are_views_of_the_models_tensors(name: str) -> None:
    model, weights = build(name)
    c = weights.config
    tensors = dict(model.named_parameters(remove_duplicate=False))
    prefix = {"gpt_neox": "gpt_neox.layers", "llama": "model.layers"}[c.family]
    owners = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    assert weights.lm_head.data_ptr() == tensors["lm_head.weight"].data_ptr()
    assert (weights.lm_head.data_ptr() == weights.embedding.data_ptr()) == c.tied_embeddings
    for tensor in (weights.embedding, weights.final_norm_weight, weights.final_norm_bias):
        assert tensor is None or tensor.untyped_storage().data_ptr() in owners
    for i, layer in enumerate(weights.layers):
        for field, tensor in vars(layer).items():
            assert tensor is None or tensor.untyped_storage().data_ptr() in owners, f"{field} of layer {i} is a copy"
        if c.fused_qkv:
            _check_fused_views(c, layer, tensors, f"{prefix}.{i}.attention.query_key_value")
        else:
            for part in "qkv":
                _check_separate_views(c, layer, tensors, f"{prefix}.{i}.self_attn.{part}_proj", part)


def _check_fused_views(c: DecoderConfig, layer: LayerWeights, tensors: dict[str, Any], name: str) -> None:
    fused, bias = tensors[f"{name}.weight"], tensors.get(f"{name}.bias")
    assert layer.qkv_weight is not None and layer.qkv_weight.data_ptr() == fused.data_ptr()
    assert (layer.qkv_bias is None) == (bias is None) == (not c.attention_bias)
    for head in range(c.num_heads):
        for part, letter in enumerate("qkv"):
            row = (3 * head + part) * c.head_dim
            view = getattr(layer, f"{letter}_weight")[head]
            assert view.is_contiguous() and storage_span(view) == storage_span(fused[row])
            if bias is not None:
                view = getattr(layer, f"{letter}_bias")[head]
                assert view.is_contiguous() and storage_span(view) == storage_span(bias[row : row + 1])


def _check_separate_views(
    c: DecoderConfig, layer: LayerWeights, tensors: dict[str, Any], name: str, letter: str
) -> None:
    heads = c.num_heads if letter == "q" else c.num_kv_heads
    view, bias = getattr(layer, f"{letter}_weight"), getattr(layer, f"{letter}_bias")
    assert layer.qkv_weight is None and layer.qkv_bias is None
    assert view.shape == (heads, c.head_dim, c.hidden_size)
    assert storage_span(view) == storage_span(tensors[f"{name}.weight"])
    assert (bias is not None) == c.attention_bias
    if bias is not None:
        assert bias.shape == (heads, c.head_dim)
        assert storage_span(bias) == storage_span(tensors[f"{name}.bias"])


@st.composite
def small_models(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A family and options for it: any combination, not only the neighbours of one default that the grid holds.

    Widths are 16 or more: a LayerNorm over two or three elements subtracts nearly equal numbers, and float32 on either
    side is then no measure of the other.
    """
    family = draw(st.sampled_from(["gpt_neox", "llama"]))
    heads = draw(st.integers(1, 6))
    options: dict[str, Any] = {
        "seed": draw(st.integers(0, 2**16)),
        "num_attention_heads": heads,
        "num_hidden_layers": draw(st.integers(1, 3)),
        "intermediate_size": draw(st.integers(1, 70)),
        "vocab_size": draw(st.integers(4, 120)),
        "tie_word_embeddings": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
        "rope_scaling": draw(st.sampled_from([None, {"type": "linear", "factor": 2.5}, LLAMA3_SCALING])),
    }
    theta, eps = draw(st.sampled_from([100.0, 10000.0, 1e6])), draw(st.sampled_from([1e-6, 1e-5, 1e-3]))
    if family == "gpt_neox":
        activations = ["gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python"]
        options |= {
            "hidden_size": heads * 2 * draw(st.integers(-(-8 // heads), 12)),
            "rotary_pct": draw(st.sampled_from([0.0, 0.25, 0.3, 0.5, 1.0])),
            "rotary_emb_base": theta,
            "layer_norm_eps": eps,
            "use_parallel_residual": draw(st.booleans()),
            "hidden_act": draw(st.sampled_from(activations)),
        }
    else:
        options |= {
            "hidden_size": heads * draw(st.integers(-(-16 // heads), 24)),
            "head_dim": 2 * draw(st.integers(1, 12)),
            "num_key_value_heads": draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0])),
            "rope_theta": theta,
            "rms_norm_eps": eps,
            "mlp_bias": draw(st.booleans()),
        }
    return family, options


@settings(max_examples=20, deadline=None)
@given(small_models(), st.data())
def test_any_small_model_agrees_with_transformers(model_of: tuple[str, dict[str, Any]], data: st.DataObject) -> None:
    family, options = model_of
    model = tiny_model(family, attn_implementation="eager", **options)
    weights = weights_of(model)
    count = data.draw(st.integers(2, 24), "tokens")
    first = data.draw(st.integers(1, count - 1), "of which in the first prefill")
    second = data.draw(st.integers(0, count - first), "of which in the second")
    ids = random_token_ids(weights.config.vocab_size, count, seed=options["seed"])
    wanted = transformers_logits(model, ids)
    cache = new_cache(weights, count)
    rows, position = [], 0
    for piece in ids.split([first, second] + [1] * (count - first - second)):
        if len(piece):
            rows.append(reference.forward(weights, piece, cache, position, last_only=False))
            position += len(piece)
    assert relative_error(torch.cat(rows), wanted) < TOLERANCE
