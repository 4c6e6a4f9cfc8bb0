"""The engine's prefill on a GPU: its two kernels against PyTorch, the whole against float64 beside transformers."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from tiny_models import random_token_ids, real_gpt_neox, tiny_gpt_neox, tiny_llama, weights_of
from torch import Tensor

import clusterfusion
from clusterfusion import reference
from clusterfusion.architecture import DecoderConfig
from clusterfusion.engine.prefill import Prefill
from clusterfusion.named_shapes import named_shape
from clusterfusion.ops.residual_norms import ResidualNorms
from clusterfusion.ops.rotary_to_cache import RotaryToCache
from clusterfusion.weights import DecoderWeights

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")
PROMPTS = (1, 16, 17, 512, 2047)
ROOM = 2048
DTYPES = (torch.float16, torch.bfloat16)

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "neox": ("gpt_neox", {"hidden_size": 256, "intermediate_size": 1024}),
    "neox, heads of 80, sequential": (
        "gpt_neox",
        {"hidden_size": 320, "num_attention_heads": 4, "use_parallel_residual": False},
    ),
    "neox, full rotary, tanh GELU": ("gpt_neox", {"hidden_size": 256, "rotary_pct": 1.0, "hidden_act": "gelu_new"}),
    "neox, no rotary, no attention biases": ("gpt_neox", {"rotary_pct": 0.0, "attention_bias": False}),
    "llama": ("llama", {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}),
    "llama, all biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, heads of 20": ("llama", {"head_dim": 20}),  # which FlashAttention does not take
}


def model_of(name: str, dtype: torch.dtype) -> Any:
    family, options = MODELS[name]
    make = {"gpt_neox": tiny_gpt_neox, "llama": tiny_llama}[family]
    return make(max_position_embeddings=ROOM, **options).to(GPU, dtype)


def cache_for(weights: DecoderWeights, dtype: torch.dtype | None = None) -> reference.KVCache:
    return reference.KVCache.allocate(weights.config, ROOM, dtype or weights.dtype, GPU)


def ids_for(weights: DecoderWeights, tokens: int) -> Tensor:
    return random_token_ids(weights.config.vocab_size, tokens, seed=tokens).to(GPU)


def mean_error(got: Tensor, truth: Tensor) -> float:
    difference = (got.double() - truth).abs()
    assert difference.isfinite().all()
    return difference.mean().item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_cache_are_as_close_to_float64_as_transformers(name: str, dtype: torch.dtype) -> None:
    model = model_of(name, dtype)
    weights = weights_of(model)
    prefill_cache = cache_for(weights)
    prefill = Prefill(weights, prefill_cache)
    for tokens in PROMPTS:
        check_truth(model, weights, prefill, prefill_cache, tokens, name)


def test_a_wide_model_is_as_close_to_float64_as_transformers() -> None:
    config = dataclasses.replace(named_shape("pythia-2.8b"), num_layers=2, vocab_size=5003)
    model = real_gpt_neox(config, GPU)
    weights = weights_of(model)
    cache = cache_for(weights)
    prefill = Prefill(weights, cache)
    for tokens in (16, 512):
        check_truth(model, weights, prefill, cache, tokens, "pythia-2.8b")


def check_truth(
    model: Any, weights: DecoderWeights, prefill: Prefill, cache: reference.KVCache, tokens: int, name: str
) -> None:
    ids = ids_for(weights, tokens)
    true_cache = cache_for(weights, torch.float64)
    truth = reference.forward(weights, ids, true_cache, 0, dtype=torch.float64, last_only=False)
    got = prefill.run(ids, 0, last_only=False)
    assert got.dtype == torch.float32 and got.shape == truth.shape
    with torch.no_grad():
        out = model(ids[None], use_cache=True)
    layers = (out.cache if "cache" in out else out.past_key_values).layers
    # Values of the first layer come of the same roundings on both sides. Of one token chance decides: on a CPU, where these
    # ratios are from 0.2 to 1.00 with 16 tokens, they are from 0.6 to 1.38 with one.
    slack = 1.02 if tokens >= 16 else 1.6
    ours, theirs = mean_error(got, truth), mean_error(out.logits[0], truth)
    assert 0 < ours <= slack * theirs, f"{name}, {tokens} tokens: logits {ours:.3e}, transformers {theirs:.3e}"
    for what, mine, true, peers in (
        ("keys", cache.k, true_cache.k, [layer.keys[0] for layer in layers]),
        ("values", cache.v, true_cache.v, [layer.values[0] for layer in layers]),
    ):
        for i, other in enumerate(peers):
            ours, theirs = mean_error(mine[i, :, :tokens], true[i, :, :tokens]), mean_error(other, true[i, :, :tokens])
            assert ours <= slack * theirs, (
                f"{name}, {tokens} tokens: {what} of layer {i} {ours:.3e}, theirs {theirs:.3e}"
            )
    last = prefill.run(ids, 0)
    assert last.shape == truth.shape[1:]
    assert mean_error(last, truth[-1]) <= 2 * mean_error(out.logits[0, -1], truth[-1]) + 1e-3


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("chunk_tokens", [64, 2048])
def test_pieces_and_chunks_stay_within_rounding(name: str, chunk_tokens: int) -> None:
    weights = weights_of(model_of(name, torch.float16))
    ids = ids_for(weights, 700)
    true_cache = cache_for(weights, torch.float64)
    truth = reference.forward(weights, ids, true_cache, 0, dtype=torch.float64, last_only=False)
    whole = mean_error(Prefill(weights, cache_for(weights)).run(ids, 0, last_only=False), truth)
    cache = cache_for(weights)
    prefill = Prefill(weights, cache, chunk_tokens)
    rows, position = [], 0
    for piece in ids.split([300, 1, 17, 382]):
        rows.append(prefill.run(piece, position, last_only=False))
        position += len(piece)
    assert mean_error(torch.cat(rows), truth) <= 1.1 * whole
    prefill.run(ids[:1], 0)  # a shorter prompt anew: what stands behind it is not touched
    assert mean_error(cache.k[:, :, :700], true_cache.k[:, :, :700]) < 1e-2


@pytest.mark.parametrize("name", ["neox", "llama"])
def test_entries_from_the_position_on_are_never_read_and_only_new_ones_written(name: str) -> None:
    weights = weights_of(model_of(name, torch.float16))
    ids = ids_for(weights, 200)
    clean, poisoned = cache_for(weights), cache_for(weights)
    poisoned.k.fill_(torch.nan)
    poisoned.v.fill_(torch.nan)
    for one, other in ((0, 130), (130, 200)):
        runs = [Prefill(weights, cache).run(ids[one:other], one) for cache in (clean, poisoned)]
        assert torch.equal(*runs), "the same bits in every run"
    for tensor, plain in ((poisoned.k, clean.k), (poisoned.v, clean.v)):
        assert torch.equal(tensor[:, :, :200], plain[:, :, :200])
        assert tensor[:, :, 200:].isnan().all()


@pytest.mark.parametrize("mode", ["split", "fused", "graph", "model"])
def test_steps_go_on_from_a_prompt(mode: str) -> None:
    model = model_of("neox", torch.float16)
    engine, plain = (clusterfusion.load(model, mode=one) for one in (mode, "reference"))
    ids = ids_for(engine.weights, 60).tolist()
    session, other = engine.session(), plain.session()
    truth = reference.forward(
        engine.weights, torch.tensor(ids, device=GPU), cache_for(engine.weights, torch.float64), 0,
        dtype=torch.float64, last_only=False,
    )  # fmt: skip
    session.prefill(ids[:50])
    other.prefill(ids[:50])
    ours = torch.stack([session.step(token) for token in ids[50:]])
    theirs = torch.stack([other.step(token) for token in ids[50:]])
    session.check()
    assert mean_error(ours, truth[50:]) <= 1.1 * mean_error(theirs, truth[50:])
    session.rewind(10)
    twin = session.fork()
    assert torch.equal(session.prefill(ids[10:50]), twin.prefill(ids[10:50]))


def test_memory_beside_the_cache_is_bounded_by_the_chunk() -> None:
    config = dataclasses.replace(named_shape("pythia-410m"), num_layers=4, vocab_size=1000, max_position=16384)
    weights = clusterfusion.load(random_weights=config, dtype="float16", mode="reference").weights
    cache = reference.KVCache.allocate(config, 16000, torch.float16, GPU)
    prefill = Prefill(weights, cache)
    peaks = []
    for tokens in (2048, 16000):
        ids = ids_for(weights, tokens)
        prefill.run(ids[:16], 0)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        prefill.run(ids, 0)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[0] < 40 * 2048 * config.hidden_size
    assert peaks[1] < 1.1 * peaks[0]


# --- the two kernels


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("hidden", [7, 40, 1024, 2560, 5120, 8190, 8192, 16383, 16384])
def test_residual_norms_are_pytorchs(hidden: int, norm: str, dtype: torch.dtype) -> None:
    config = dataclasses.replace(named_shape("pythia-14m"), hidden_size=hidden, norm=norm)  # type: ignore[arg-type]
    ours, plain = ResidualNorms(config, dtype, GPU), ResidualNorms(config, dtype, CPU)
    for rows, deltas, norms, fresh in ((1, 1, 1, True), (3, 2, 2, False), (2000, 2, 1, False), (700, 1, 2, True)):
        x = 0.5 + torch.randn(rows, hidden, device=GPU)
        added = [torch.randn(rows, hidden, device=GPU).to(dtype) for _ in range(deltas)]
        weights = [(1 + 0.2 * torch.randn(hidden, device=GPU)).to(dtype) for _ in range(norms)]
        biases = [torch.randn(hidden, device=GPU).to(dtype) if norm == "layer_norm" else None for _ in range(norms)]
        results = []
        for operation in (ours, plain):
            sums, outs = x.clone(), [torch.full_like(added[0], torch.nan) for _ in range(norms)]
            operation(sums, added, list(zip(weights, biases, outs, strict=True)), fresh=fresh)
            results.append((sums, outs))
        (sums, outs), (plain_sums, plain_outs) = results
        torch.testing.assert_close(sums, plain_sums, rtol=1e-6, atol=1e-6)
        for out, plain_out in zip(outs, plain_outs, strict=True):
            tolerance = 2 * torch.finfo(dtype).eps
            torch.testing.assert_close(out, plain_out, rtol=tolerance, atol=tolerance)


ROTARY_SHAPES = {  # heads, kv_heads, head_dim, rotary dimensions
    "pythia-2.8b": (32, 32, 80, 20),
    "pythia-6.9b": (32, 32, 128, 32),
    "llama-3-8b": (32, 8, 128, 128),
    "odd": (3, 3, 20, 6),
    "none": (2, 2, 64, 0),
    "scalars": (2, 1, 5, 2),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ROTARY_SHAPES)
@pytest.mark.parametrize("tokens", [1, 17, 1500])
def test_rotary_to_cache_is_pytorchs(shape: str, tokens: int, dtype: torch.dtype) -> None:
    heads, kv_heads, head_dim, rotary_dim = ROTARY_SHAPES[shape]
    config = rotary_config(heads, kv_heads, head_dim, rotary_dim)
    cos, sin = reference.rotary_tables(config.rotary, torch.arange(1600, device=GPU), torch.float32)
    for fused in (True, False) if heads == kv_heads else (False,):
        if fused:
            q, k, v = torch.randn(tokens, heads, 3, head_dim, device=GPU).to(dtype).unbind(2)
        else:
            q, k, v = (torch.randn(tokens, n, head_dim, device=GPU).to(dtype) for n in (heads, kv_heads, kv_heads))
        results = []
        for place in (GPU, CPU):
            mine = torch.empty_strided(q.size(), q.stride(), dtype=dtype, device=GPU).copy_(q)
            caches = [torch.full((3, kv_heads, 1600, head_dim), 7.0, dtype=dtype, device=GPU) for _ in range(2)]
            written = [cache[:, :, 50 : 50 + tokens] for cache in caches]
            tables = cos[50 : 50 + tokens], sin[50 : 50 + tokens]
            RotaryToCache(config, dtype, place).bind(mine, k, v, written[0], written[1], *tables)(1)
            results.append((mine, *caches))
        (q_ours, k_ours, v_ours), (q_plain, k_plain, v_plain) = results
        tolerance = torch.finfo(dtype).eps
        torch.testing.assert_close(q_ours, q_plain, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(k_ours, k_plain, rtol=tolerance, atol=tolerance)
        assert torch.equal(v_ours, v_plain)


def rotary_config(heads: int, kv_heads: int, head_dim: int, rotary_dim: int) -> DecoderConfig:
    base = named_shape("pythia-14m")
    rotary = dataclasses.replace(base.rotary, nominal_dim=rotary_dim)
    return dataclasses.replace(base, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, rotary=rotary)
