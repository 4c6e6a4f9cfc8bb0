"""The fused decoder layer: true against float64, the same bits in every launch form and every run."""

from __future__ import annotations

import concurrent.futures
import dataclasses
from typing import Any

import pytest
import torch
from tiny_models import random_token_ids, real_gpt_neox, tiny_gpt_neox
from torch import Tensor
from transformers import GPTNeoXForCausalLM

import clusterfusion
from clusterfusion import reference
from clusterfusion.engine.block_decoder import BlockDecoder
from clusterfusion.engine.loading import demo_folder
from clusterfusion.engine.step_decoder import StepDecoder
from clusterfusion.errors import ArgumentError
from clusterfusion.named_shapes import NAMED_SHAPES, named_shape
from clusterfusion.random_weights import random_weights, uniform
from clusterfusion.weights import DecoderWeights

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)
MODES = ("split", "fused", "graph", "model")

TINY: dict[str, dict[str, Any]] = {
    "parallel": {},
    "sequential": {"use_parallel_residual": False},
    "two head groups": {"hidden_size": 2048, "num_attention_heads": 16, "use_parallel_residual": False},
    "full rotary, sequential": {"rotary_pct": 1.0, "use_parallel_residual": False},
    "no rotary": {"rotary_pct": 0.0},
    "rotary 0.3": {"rotary_pct": 0.3},
    "no attention biases": {"attention_bias": False},
    "tanh GELU": {"hidden_act": "gelu_new"},
    "tied, odd vocabulary": {"tie_word_embeddings": True, "vocab_size": 257},
    "heads of 8": {"hidden_size": 64, "num_attention_heads": 8},
    "heads of 24": {"hidden_size": 72, "num_attention_heads": 3},
    "heads of 40, seven of them": {"hidden_size": 280, "num_attention_heads": 7, "intermediate_size": 296},
    "heads of 80": {"hidden_size": 160, "num_attention_heads": 2},
    "heads of 96": {"hidden_size": 192, "num_attention_heads": 2},
    "heads of 256": {"hidden_size": 512, "num_attention_heads": 2},
    "one head": {"hidden_size": 64, "num_attention_heads": 1},
    "narrow MLP": {"hidden_size": 128, "intermediate_size": 8},
    "large eps": {"layer_norm_eps": 0.1},
    "many heads": {"hidden_size": 1600, "num_attention_heads": 100, "intermediate_size": 1600},
}


def steps(model: Any, mode: str, ids: Tensor, prompt: int) -> Tensor:
    """Logits [steps, vocab] of the ids after the first `prompt`, one step each."""
    session = clusterfusion.load(model, mode=mode).session()
    if prompt:
        session.prefill(ids[:prompt])
    return torch.stack([session.step(int(token)) for token in ids[prompt:]])


def truth(model: Any, ids: Tensor, prompt: int) -> Tensor:
    weights = clusterfusion.load(model, mode="reference").weights
    cache = reference.KVCache.allocate(weights.config, len(ids), torch.float64, GPU)
    return reference.forward(weights, ids.to(GPU), cache, 0, dtype=torch.float64, last_only=False)[prompt:]


@torch.no_grad()
def of_transformers(model: Any, ids: Tensor, prompt: int) -> Tensor:
    ids = ids.to(GPU)[None]
    logits, cache = [], None
    if prompt:
        cache = model(ids[:, :prompt], use_cache=True).past_key_values
    for at in range(prompt, ids.shape[1]):
        out = model(ids[:, at : at + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits[0, -1].float())
    return torch.stack(logits)


def assert_closer_to_truth(ours: Tensor, theirs: Tensor, exact: Tensor) -> None:
    our_error, their_error = ((got.double() - exact).abs() for got in (ours, theirs))
    assert torch.isfinite(ours).all()
    assert our_error.mean() <= their_error.mean(), f"mean {our_error.mean():.3e}, transformers {their_error.mean():.3e}"
    assert our_error.max() <= 1.25 * their_error.max(), (
        f"max {our_error.max():.3e}, transformers {their_error.max():.3e}"
    )


CASES = [(name, torch.float16) for name in TINY]
CASES += [(name, torch.bfloat16) for name in ("parallel", "sequential", "heads of 80")]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_tiny_models_in_every_mode(name: str, dtype: torch.dtype) -> None:
    model = tiny_gpt_neox(**TINY[name]).to(GPU, dtype)
    ids = random_token_ids(model.config.vocab_size, 45)
    results = {mode: steps(model, mode, ids, 13) for mode in MODES}
    for mode in MODES:
        assert torch.equal(results[mode], results["split"]), f"{mode} and split differ in their bits"
    assert_closer_to_truth(results["graph"], of_transformers(model, ids, 13), truth(model, ids, 13))


@pytest.mark.parametrize("name", ["parallel", "sequential"])
def test_rows_with_a_large_mean_among_others(name: str) -> None:
    """Deviation 1 about a mean of 1000, whose squares have no digits left for it: LayerNorm takes another way than for other rows, and
    the two take turns from step to step."""
    model = tiny_gpt_neox(**TINY[name]).to(GPU, torch.float16)
    model.get_input_embeddings().weight.data[::2] += 1000.0
    ids = torch.arange(12) + 40
    results = {mode: steps(model, mode, ids, 0) for mode in MODES}
    for mode in MODES:
        assert torch.equal(results[mode], results["split"]), f"{mode} and split differ in their bits"
    exact = truth(model, ids, 0)
    for got, expected in zip(results["graph"], exact, strict=True):
        assert (got - expected).abs().max() <= 0.01 * expected.std()


@pytest.mark.parametrize("name", [n for n in NAMED_SHAPES if named_shape(n).family == "gpt_neox"])
def test_named_shapes_against_truth(name: str) -> None:
    """Two layers of every GPT-NeoX shape, real widths, at contexts from none to the model's limit."""
    config = dataclasses.replace(named_shape(name), num_layers=2, vocab_size=1001)
    model = real_gpt_neox(config, GPU)
    for context in (0, 1, 17, 511, 1024, config.max_position - 3):
        ids = random_token_ids(config.vocab_size, context + 3, seed=context)
        results = {mode: steps(model, mode, ids, context) for mode in MODES}
        for mode in MODES:
            assert torch.equal(results[mode], results["split"]), f"{mode} and split differ at {context}"
        assert_closer_to_truth(results["graph"], of_transformers(model, ids, context), truth(model, ids, context))


def one_step(decoder: BlockDecoder | StepDecoder, position: int) -> Tensor:
    return decoder.step(7, position)


def make_decoder(weights: DecoderWeights, cache: reference.KVCache, mode: str) -> BlockDecoder | StepDecoder:
    return StepDecoder(weights, cache) if mode == "model" else BlockDecoder(weights, cache, mode)


def layers_of(name: str, layers: int) -> DecoderWeights:
    config = dataclasses.replace(named_shape(name), num_layers=layers, vocab_size=1024)
    return random_weights(config, seed=1, dtype=torch.float16, device=GPU)


def noisy_cache(weights: DecoderWeights, *, token_major: bool = False) -> reference.KVCache:
    """A full cache of random keys and values, in either layout."""
    c = weights.config
    shape = (c.num_layers, c.num_kv_heads, c.max_position, c.head_dim)
    k, v = (uniform(shape, 0.0, 1.0, stream, torch.float16, GPU) for stream in (5, 6))
    if token_major:
        k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (k, v))
    return reference.KVCache(k, v)


@pytest.mark.parametrize("name", ["pythia-2.8b", "pythia-6.9b", "redpajama-incite-3b"])
def test_a_thousand_repeats_have_the_same_bits(name: str) -> None:
    check_repeats(layers_of(name, 2))


def check_repeats(weights: DecoderWeights) -> None:
    """Every mode, a thousand times beside someone else's kernel, but `split`, which takes longest."""
    other, a = torch.cuda.Stream(), torch.randn(2048, 2048, device=GPU)
    for mode, repeats in (("model", 1000), ("fused", 1000), ("graph", 1000), ("split", 200)):
        decoder = make_decoder(weights, noisy_cache(weights), mode)
        first = one_step(decoder, 1500)
        for repeat in range(repeats):
            if repeat % 10 == 0:
                with torch.cuda.stream(other):
                    a @ a
            assert torch.equal(one_step(decoder, 1500), first), f"{mode}: repeat {repeat} differs"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "steps"), [("pythia-70m", 3000), ("pythia-2.8b", 600)])
def test_two_streams_of_overlapping_launches(name: str, steps: int, mode: str) -> None:
    """Chains of launches that start before the one ahead has ended, two at once, from two threads: nobody starves."""
    weights = layers_of(name, 4)
    positions = (100, 1500)
    expected = [one_step(make_decoder(weights, noisy_cache(weights), mode), at) for at in positions]
    torch.cuda.synchronize()
    wrong: list[str] = []

    def run(which: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            decoder = make_decoder(weights, noisy_cache(weights), mode)
            unlike = torch.zeros((), dtype=torch.int64, device=GPU)
            for _ in range(steps):
                unlike += (one_step(decoder, positions[which]) != expected[which]).any()
            torch.cuda.current_stream().synchronize()
            decoder.check_error()
            if unlike.item():
                wrong.append(f"{int(unlike)} of {steps} steps of thread {which} differ")

    with concurrent.futures.ThreadPoolExecutor() as pool:
        for done in [pool.submit(run, which) for which in range(2)]:
            done.result()
    assert not wrong


@pytest.mark.parametrize("mode", ["split", "fused", "graph"])
def test_token_major_caches_give_the_same_bits(mode: str) -> None:
    weights = layers_of("pythia-2.8b", 2)
    plain, token_major = noisy_cache(weights), noisy_cache(weights, token_major=True)
    assert token_major.k.stride(2) == 2560
    for position in (0, 5, 900, 2047):
        logits = [one_step(BlockDecoder(weights, cache, mode), position) for cache in (plain, token_major)]
        assert torch.equal(*logits)
        assert torch.equal(plain.k, token_major.k)
        assert torch.equal(plain.v, token_major.v)


@pytest.mark.parametrize("mode", ["fused", "model"])
def test_what_lies_beyond_the_position_is_never_read(mode: str) -> None:
    weights = layers_of("pythia-1.4b", 1)
    for position in (0, 1, 100, 1001):
        clean, poisoned = noisy_cache(weights), noisy_cache(weights)
        for tensor in (poisoned.k, poisoned.v):
            tensor[:, :, position:] = torch.nan
        logits = [one_step(make_decoder(weights, cache, mode), position) for cache in (clean, poisoned)]
        assert torch.equal(*logits)
        assert torch.isfinite(logits[0]).all()


def test_one_captured_graph_serves_every_position_and_token() -> None:
    session = clusterfusion.load("demo", mode="graph").session()
    other = clusterfusion.load("demo", mode="fused").session()
    ids = random_token_ids(257, 60)
    for token in ids.tolist():
        assert torch.equal(session.step(token), other.step(token))
    session.rewind(10)
    other.rewind(10)
    assert torch.equal(session.step(3), other.step(3))
    twin = session.fork()
    assert torch.equal(twin.step(9), session.step(9))
    session.reset()
    fresh = clusterfusion.load("demo", mode="fused").session()
    assert torch.equal(session.step(65), fresh.step(65))


def test_demo_text_is_the_same_in_every_mode() -> None:
    prompt = "The morning was fine, and Elizabeth"
    texts = {mode: clusterfusion.load("demo", mode=mode).generate(prompt, 200).text for mode in MODES}
    assert texts["split"] == texts["fused"] == texts["graph"] == texts["model"]
    sampled = {
        mode: clusterfusion.load("demo", mode=mode).generate(prompt, 200, temperature=0.8, seed=3).text
        for mode in MODES
    }
    assert sampled["split"] == sampled["fused"] == sampled["graph"] == sampled["model"]


def test_demo_is_closer_to_the_truth_than_transformers() -> None:
    text = (
        "She had been long aware of the pleasure of his company, and could not but feel some surprise that he should "
        "have chosen to leave the neighbourhood at so early an hour; but her mother, who had no doubt of his return, "
    )
    model = GPTNeoXForCausalLM.from_pretrained(str(demo_folder()), dtype=torch.float16).to(GPU).eval()
    ids = torch.tensor(clusterfusion.load("demo").encode(text * 8))
    for context in (16, 512, 1024, len(ids) - 20):
        window = ids[: context + 20]
        ours = steps(model, "graph", window, context)
        assert_closer_to_truth(ours, of_transformers(model, window, context), truth(model, window, context))


def test_auto_takes_the_fastest_and_says_why() -> None:
    engine = clusterfusion.load("demo")
    assert (engine.mode, engine.mode_reason) == ("model", "the fastest mode")
    assert clusterfusion.load("demo", dtype="float32").mode == "reference"
    with pytest.raises(ArgumentError, match="16-bit weights"):
        clusterfusion.load("demo", dtype="float32", mode="fused")
    assert clusterfusion.load(random_weights="smollm-135m").mode == "model"


def test_device_memory_beside_weights_and_cache() -> None:
    weights = layers_of("pythia-6.9b", 2)
    cache = noisy_cache(weights)
    BlockDecoder(weights, cache, "fused").step(1, 5)  # libraries take their workspaces once
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    decoder = BlockDecoder(weights, cache, "fused")
    rotary = 2 * 4 * 2048 * weights.config.rotary.dim // 2
    logits = 4 * weights.config.vocab_size
    stated = decoder.plan.scratch_bytes + 2 * 4 * weights.config.hidden_size + rotary + logits
    assert torch.cuda.memory_allocated() - before <= stated + 12 * 512  # the allocator rounds up to 512 bytes
    assert stated < 0.02 * weights.num_bytes
