"""LLaMA models in every mode: true against float64, the same bits in every mode and run, long caches split over all CTAs."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import pytest
import torch
from gpu.test_decoder_block import (
    GPU,
    MODES,
    assert_closer_to_truth,
    check_repeats,
    make_decoder,
    noisy_cache,
    of_transformers,
    one_step,
    steps,
    truth,
)
from tiny_models import random_token_ids, real_llama, tiny_llama, weights_of

import clusterfusion
from clusterfusion import reference
from clusterfusion.engine.step_decoder import StepDecoder
from clusterfusion.errors import DeviceError
from clusterfusion.named_shapes import named_shape
from clusterfusion.random_weights import random_weights
from clusterfusion.weights import DecoderWeights

pytestmark = pytest.mark.gpu


def heads(count: int, kv: int, size: int, hidden: int | None = None, **more: Any) -> dict[str, Any]:
    sizes = {"num_attention_heads": count, "num_key_value_heads": kv, "head_dim": size}
    return sizes | {"hidden_size": hidden or count * size} | more


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
TINY: dict[str, dict[str, Any]] = {
    "two heads a K/V head": {},
    "a head a K/V head": {"num_key_value_heads": 4},
    "three heads a K/V head": heads(9, 3, 64),
    "eight heads a K/V head": heads(16, 2, 64),
    "one K/V head, four bundles": heads(32, 1, 64, 128),
    "eleven heads a K/V head, each alone": heads(11, 1, 16),
    "heads of 8": heads(8, 4, 8),
    "heads of 80": heads(4, 2, 80),
    "heads of 96": heads(4, 1, 96),
    "heads of 128": heads(4, 1, 128),
    "heads of 256": heads(4, 2, 256),
    "heads longer than the residual": heads(4, 2, 128, 64),
    "heads shorter than the residual": heads(4, 2, 8, 256),
    "rows of o longer than a stage": heads(16, 4, 128, 48),
    "two head groups": heads(16, 2, 128, 1024),
    "two head groups of many heads": heads(34, 34, 64, 1088, attention_bias=True),
    "attention biases": {"attention_bias": True},
    "MLP biases": {"mlp_bias": True},
    "llama3 rotary, tied": {"rope_parameters": LLAMA3, "tie_word_embeddings": True},
    "linear rotary, odd vocabulary": {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        "vocab_size": 257,
    },
    "large eps": {"rms_norm_eps": 0.1},
    "narrow MLP": {"hidden_size": 128, "intermediate_size": 8},
    "wide MLP": {"intermediate_size": 4096},
}
CASES = [(name, torch.float16) for name in TINY]
CASES += [
    (name, torch.bfloat16) for name in ("two heads a K/V head", "heads of 80", "two head groups", "attention biases")
]


def check_everything(model: Any, length: int, prompt: int) -> None:
    ids = random_token_ids(model.config.vocab_size, length)
    results = {mode: steps(model, mode, ids, prompt) for mode in MODES}
    for mode in MODES:
        assert torch.equal(results[mode], results["split"]), f"{mode} and split differ in their bits"
    assert_closer_to_truth(results["model"], of_transformers(model, ids, prompt), truth(model, ids, prompt))


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_tiny_models_in_every_mode(name: str, dtype: torch.dtype) -> None:
    check_everything(tiny_llama(**TINY[name]).to(GPU, dtype), 45, 13)


@pytest.mark.parametrize("seed", range(20))
def test_random_small_models(seed: int) -> None:
    choose = random.Random(seed)
    kv, group = choose.choice((1, 2, 3, 4, 8)), choose.choice((1, 2, 3, 4, 7, 8))
    count = kv * group
    hidden = math.lcm(count, 8)  # transformers wants whole heads in the residual, whatever they are long
    hidden *= choose.randrange(1, max(2, 640 // hidden))
    options = heads(count, kv, choose.choice((16, 40, 64, 80, 96, 128, 256)), hidden)
    options["intermediate_size"] = 8 * choose.randrange(1, 200)
    options["num_hidden_layers"] = choose.randrange(1, 5)
    options["attention_bias"], options["mlp_bias"] = (choose.random() < 0.3 for _ in range(2))
    options["tie_word_embeddings"] = choose.random() < 0.3
    options["max_position_embeddings"] = 512
    dtype = choose.choice((torch.float16, torch.bfloat16))
    check_everything(tiny_llama(seed=seed, **options).to(GPU, dtype), choose.randrange(20, 300), choose.randrange(15))


REAL = ["llama-3.2-1b", "llama-3.1-8b", "llama-2-7b", "tinyllama-1.1b", "smollm-135m", "llama-3.2-3b", "smollm-360m"]


@pytest.mark.parametrize("name", REAL)
def test_named_shapes_against_truth(name: str) -> None:
    """Two layers of real widths in the published dtype, at contexts from none to thousands."""
    config = dataclasses.replace(named_shape(name), num_layers=2, vocab_size=1001)
    dtype = getattr(torch, config.dtype or "float16")
    model = real_llama(config, dtype, GPU)
    for context in (0, 1, 17, 511, 1024, min(config.max_position, 4096) - 3):
        ids = random_token_ids(config.vocab_size, context + 3, seed=context)
        results = {mode: steps(model, mode, ids, context) for mode in MODES}
        for mode in MODES:
            assert torch.equal(results[mode], results["split"]), f"{mode} and split differ at {context}"
        assert_closer_to_truth(results["graph"], of_transformers(model, ids, context), truth(model, ids, context))


def layers_of(name: str, layers: int, **changes: Any) -> DecoderWeights:
    config = dataclasses.replace(named_shape(name), num_layers=layers, vocab_size=1024, **changes)
    return random_weights(config, seed=1, dtype=torch.float16, device=GPU)


@pytest.mark.parametrize("name", ["llama-3.2-1b", "llama-3.1-8b", "tinyllama-1.1b", "smollm-135m"])
def test_a_thousand_repeats_have_the_same_bits(name: str) -> None:
    check_repeats(layers_of(name, 2, max_position=2048))


@pytest.mark.parametrize("name", ["llama-3.2-1b", "llama-3.1-8b", "smollm-135m"])
def test_what_lies_beyond_the_position_is_never_read(name: str) -> None:
    """Nor are partials of clusters that no cached token has reached: those of an earlier, longer step are still there."""
    weights = layers_of(name, 1, max_position=4096)
    for mode in ("fused", "model"):
        used = make_decoder(weights, noisy_cache(weights), mode)
        for position in (4000, 1001, 100, 33, 17, 1, 0):
            clean, poisoned = noisy_cache(weights), noisy_cache(weights)
            for tensor in (poisoned.k, poisoned.v):
                tensor[:, :, position:] = torch.nan
            logits = [one_step(make_decoder(weights, cache, mode), position) for cache in (clean, poisoned)]
            assert torch.equal(*logits)
            assert torch.isfinite(logits[0]).all()
            assert torch.equal(one_step(used, position), logits[0])


@pytest.mark.parametrize("name", ["llama-3.1-8b", "llama-3.2-1b"])
def test_a_cache_of_131072_tokens(name: str) -> None:
    """One layer against float64 over the same cache, at the far end and where CTAs run out of tokens."""
    weights = layers_of(name, 1)
    assert weights.config.max_position == 131072
    cache = noisy_cache(weights)
    decoders = {mode: make_decoder(weights, cache, mode) for mode in ("model", "fused")}
    for position in (131071, 100_000, 8193):
        logits = {mode: one_step(decoder, position) for mode, decoder in decoders.items()}
        assert torch.equal(logits["model"], logits["fused"])
        wide = reference.KVCache(cache.k.clone(), cache.v.clone())
        exact = reference.forward(weights, torch.tensor([7], device=GPU), wide, position, dtype=torch.float64)
        error = (logits["model"].double() - exact).norm() / exact.norm()
        assert error < 2e-3, f"relative error {error:.2e} at {position}"


@pytest.mark.parametrize("pairing", ["halves", "neighbours"])
@pytest.mark.parametrize(
    "name", ["two heads a K/V head", "heads of 80", "attention biases", "heads longer than the residual"]
)
def test_the_general_call(name: str, pairing: str) -> None:
    """One layer by itself: both forms and both cache layouts give the same bits, near the reference's in float64."""
    weights = weights_of(tiny_llama(**TINY[name]).to(GPU, torch.float16))
    c, layer, room = weights.config, weights.layers[0], 300
    cos, sin = reference.rotary_tables(c.rotary, torch.arange(room, device=GPU), torch.float32)
    config = dataclasses.replace(c, rotary=dataclasses.replace(c.rotary, neighbours=pairing == "neighbours"))
    for position in (0, 1, 100, 299):
        x = torch.randn(c.hidden_size, device=GPU)
        noise = torch.randn(2, c.num_kv_heads, room, c.head_dim, device=GPU).half()
        results = []
        for form in ("split", "fused"):
            for token_major in (False, True):
                k, v = (t.transpose(0, 1).flatten(1).contiguous() if token_major else t.clone() for t in noise)
                out, k_new, v_new = clusterfusion.decoder_layer(
                    x, layer, k, v, position, cos, sin, rotary_dim=c.rotary.dim, eps=c.norm_eps, activation="silu",
                    parallel_residual=False, form=form, pairing=pairing,
                )  # fmt: skip
                row = k[position].view(k_new.shape) if token_major else k[:, position]
                assert torch.equal(row, k_new)
                results.append((out, k_new, v_new))
        assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))
        k, v = (t.double() for t in noise)
        row_cos, row_sin = (t[position : position + 1].double() for t in (cos, sin))
        exact = reference.decoder_layer(
            config, layer, x[None].double(), row_cos, row_sin, k, v, position, dtype=torch.float64
        )
        assert (results[0][0].double() - exact[0]).norm() < 2e-3 * exact.norm()
        for new, cache in zip(results[0][1:], (k, v), strict=True):
            row = cache[:, position]
            assert (new.double() - row).norm() < 1e-3 * row.norm()


@pytest.mark.parametrize("parallel", [False, True], ids=["sequential", "parallel"])
@pytest.mark.parametrize("gated", [False, True], ids=["without a gate", "gated"])
def test_other_layers_with_rms_norm(gated: bool, parallel: bool) -> None:
    """What decoder_layer takes and no model has: both forms give the same bits, near the reference's in float64."""
    weights = weights_of(tiny_llama(**TINY["attention biases"]).to(GPU, torch.float16))
    layer = weights.layers[0] if gated else dataclasses.replace(weights.layers[0], gate_weight=None, gate_bias=None)
    c = dataclasses.replace(weights.config, gated_mlp=gated, parallel_residual=parallel)
    room = 300
    cos, sin = reference.rotary_tables(c.rotary, torch.arange(room, device=GPU), torch.float32)
    for position in (0, 1, 100, 299):
        x = torch.randn(c.hidden_size, device=GPU)
        noise = torch.randn(2, c.num_kv_heads, room, c.head_dim, device=GPU).half()
        split, fused = (
            clusterfusion.decoder_layer(
                x, layer, *(t.clone() for t in noise), position, cos, sin, rotary_dim=c.rotary.dim, eps=c.norm_eps,
                activation="silu", parallel_residual=parallel, form=form,
            )
            for form in ("split", "fused")
        )  # fmt: skip
        assert all(torch.equal(a, b) for a, b in zip(split, fused, strict=True))
        k, v = (t.double() for t in noise)
        row_cos, row_sin = (t[position : position + 1].double() for t in (cos, sin))
        exact = reference.decoder_layer(
            c, layer, x[None].double(), row_cos, row_sin, k, v, position, dtype=torch.float64
        )
        assert (split[0].double() - exact[0]).norm() < 2e-3 * exact.norm()


def test_a_shared_model_is_not_copied() -> None:
    config = dataclasses.replace(named_shape("llama-3.2-1b"), num_layers=2)
    model = real_llama(config, torch.bfloat16, GPU)
    session = clusterfusion.load(model, mode="model", max_seq_len=256).session()
    session.step(1)  # libraries take their workspaces once
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    other = clusterfusion.load(model, mode="model", max_seq_len=256).session()
    other.step(1)
    weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    cache_bytes = 2 * 256 * config.num_layers * config.kv_size * 2
    assert torch.cuda.memory_allocated() - before <= cache_bytes + 0.02 * weight_bytes


def test_generation_is_that_of_the_reference() -> None:
    """The same tokens in every mode, each of them in the reference's opinion, in float64, the likeliest or as good as that."""
    model = tiny_llama(eos_token_id=None).to(GPU, torch.bfloat16)
    ids = random_token_ids(model.config.vocab_size, 9).tolist()
    first, *others = (clusterfusion.load(model, mode=mode).generate(ids, 60).token_ids for mode in MODES)
    assert len(first) == 60 and all(tokens == first for tokens in others)
    exact = clusterfusion.load(model.to(torch.float64), mode="reference").session()
    logits = exact.prefill(torch.tensor(ids))
    for token in first:
        assert logits.max() - logits[token] < 0.05 * logits.std(), "a token that is not the likeliest"
        logits = exact.step(token)


def test_a_cta_that_stops_arriving_is_an_error_and_no_hang() -> None:
    weights = layers_of("llama-3.2-1b", 2, max_position=256)
    cache = noisy_cache(weights)
    decoder = StepDecoder(weights, cache, fault_cta=5)
    with pytest.raises(DeviceError, match="gave up waiting for the MLP's hidden vector"):
        list(decoder.stream(1, 0, 1))
    assert StepDecoder(weights, cache).step(1, 0).isfinite().all(), "the device is well"
