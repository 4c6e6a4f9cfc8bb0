"""The whole decode step in one launch: the choice of the token, running ahead, sessions, memory, and a fault."""

from __future__ import annotations

import concurrent.futures
import dataclasses

import pytest
import torch
from tiny_models import random_token_ids, tiny_gpt_neox

import clusterfusion
from clusterfusion import reference
from clusterfusion.engine.sampling import Sampler, SamplingOptions
from clusterfusion.engine.step_decoder import LAUNCHES, MOST_STEPS, StepDecoder
from clusterfusion.errors import ArgumentError, ContextLengthError, DeviceError
from clusterfusion.named_shapes import named_shape
from clusterfusion.ops.layer_launch import plan_for
from clusterfusion.random_weights import random_weights
from clusterfusion.weights import DecoderWeights

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)


def small(layers: int = 3, vocab: int = 5003) -> DecoderWeights:
    config = dataclasses.replace(named_shape("pythia-410m"), num_layers=layers, vocab_size=vocab)
    return random_weights(config, seed=2, dtype=torch.float16, device=GPU)


def empty_cache(weights: DecoderWeights, room: int) -> reference.KVCache:
    return reference.KVCache.allocate(weights.config, room, weights.dtype, GPU)


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0, 5.0])
def test_the_gpu_chooses_what_the_host_would(temperature: float) -> None:
    weights = small()
    one, other = (StepDecoder(weights, empty_cache(weights, 300)) for _ in range(2))
    sampler = Sampler(SamplingOptions(temperature=temperature, seed=2**40 + 7), [])
    chosen = list(one.stream(11, 0, 200, temperature, sampler.seed))
    token, expected = 11, []
    for position in range(200):
        token = sampler.choose(other.step(token, position), position + 1)
        expected.append(token)
    assert chosen == expected
    assert len(set(chosen)) > 3 or temperature == 0


@pytest.mark.parametrize("shape", ["pythia-410m", "pythia-1.4b", "llama-3.2-1b"])
def test_clusters_may_join_in_between_the_steps_of_a_launch(shape: str) -> None:
    """With an odd number of layers, so that the parity of a layer's signals is another in every step."""
    config = dataclasses.replace(named_shape(shape), num_layers=3)
    weights = random_weights(config, seed=4, dtype=torch.float16, device=GPU)
    plan = plan_for(config, GPU.index)
    joins = next(at for at in range(20, 2000) if plan.active_splits(at) > plan.active_splits(at - 1))
    first, count = joins - 8, 3 * MOST_STEPS  # in the middle of a launch of several
    cache = empty_cache(weights, first + count)
    for half in (cache.k, cache.v):
        half[:, :, :first] = torch.randn_like(half[:, :, :first])
    before = cache.k.clone(), cache.v.clone()
    streamed = list(StepDecoder(weights, cache).stream(11, first, count))
    written = cache.k.clone(), cache.v.clone()
    for half, old in zip((cache.k, cache.v), before, strict=True):
        half.copy_(old)
    decoder, token = StepDecoder(weights, cache), 11
    for step, chosen in enumerate(streamed):
        token = int(decoder.step(token, first + step).argmax())
        assert token == chosen, step
    assert torch.equal(cache.k, written[0]) and torch.equal(cache.v, written[1])


@pytest.mark.parametrize(("stages", "window", "early"), [(9, 9, 9), (9, 9, 1), (9, 1, 1), (18, 2, 1)])
@pytest.mark.parametrize("name", ["pythia-1.4b", "llama-3.2-1b"])
def test_a_small_ring_and_a_small_window_have_the_same_bits(name: str, stages: int, window: int, early: int) -> None:
    """With as many stages in flight as there are, or one: what is in flight when is nobody's condition for anything."""
    config = dataclasses.replace(named_shape(name), num_layers=3)
    weights = random_weights(config, seed=4, dtype=torch.float16, device=GPU)
    plan = plan_for(config, GPU.index)
    assert plan.warps == 9 and plan.early_stages < plan.window_stages
    small = dataclasses.replace(plan, stages=stages, window_stages=window, early_stages=early)
    tokens = [list(StepDecoder(weights, empty_cache(weights, 64), plan=p).stream(11, 0, 40)) for p in (plan, small)]
    assert tokens[0] == tokens[1]


def test_ties_go_to_the_lowest_token() -> None:
    weights = small(layers=1)
    weights.lm_head[17] = weights.lm_head[4001]  # in rows of other CTAs
    decoder = StepDecoder(weights, empty_cache(weights, 64))
    for token in range(40):
        logits = decoder.step(token, token)
        assert logits[17] == logits[4001]
        best = int((logits == logits.max()).nonzero()[0])
        assert next(iter(decoder.stream(token, token, 1))) == best


def test_logits_that_are_not_finite_are_an_error() -> None:
    weights = small(layers=1)
    weights.lm_head[100:200] = torch.inf
    decoder = StepDecoder(weights, empty_cache(weights, 64))
    with pytest.raises(DeviceError, match="not finite"):
        list(decoder.stream(1, 0, 5))


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 2 * MOST_STEPS - 1, 2 * MOST_STEPS, (LAUNCHES + 2) * MOST_STEPS - 2])
def test_a_stream_may_end_anywhere(steps: int) -> None:
    weights = small()
    decoder = StepDecoder(weights, empty_cache(weights, 40))
    whole = list(decoder.stream(5, 0, 39))
    assert list(decoder.stream(5, 0, steps)) == whole[:steps]
    stream = decoder.stream(5, 0, 39)
    assert [next(stream) for _ in range(steps)] == whole[:steps]
    stream.close()  # launches that ran ahead are void
    assert list(decoder.stream(5, 0, 39)) == whole


def test_a_stream_does_not_go_on_after_others() -> None:
    weights = small()
    decoder = StepDecoder(weights, empty_cache(weights, 64))
    whole = list(decoder.stream(5, 0, 20))
    stream = decoder.stream(5, 0, 20)
    next(stream)
    decoder.step(3, 40)
    with pytest.raises(ArgumentError, match="other means"):
        next(stream)
    on, other = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(on):
        stream = decoder.stream(5, 0, 20)
        first = [next(stream) for _ in range(3)]
    with torch.cuda.stream(other):  # launches stay on the stream they began on
        assert first + list(stream) == whole
    with pytest.raises(ArgumentError, match="cannot be captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        decoder.step(1, 0)
    assert list(decoder.stream(5, 0, 20)) == whole


def test_two_streams_of_steps_at_once() -> None:
    weights = small(layers=4)
    expected = list(StepDecoder(weights, empty_cache(weights, 400)).stream(9, 0, 300))
    results: list[list[int]] = []

    def run() -> None:
        with torch.cuda.stream(torch.cuda.Stream(priority=-1 if results else 0)):
            results.append(list(StepDecoder(weights, empty_cache(weights, 400)).stream(9, 0, 300)))

    torch.cuda.synchronize()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for done in [pool.submit(run) for _ in range(2)]:
            done.result()
    assert results == [expected, expected]


def test_a_thousand_tokens_twice() -> None:
    weights = random_weights(
        dataclasses.replace(named_shape("pythia-1.4b"), num_layers=4), seed=0, dtype=torch.float16, device=GPU
    )
    runs = []
    for _ in range(2):
        decoder = StepDecoder(weights, empty_cache(weights, 1010))
        tokens = list(decoder.stream(3, 0, 1000))
        runs.append((tokens, decoder.step(tokens[-1], 1000)))
    assert runs[0][0] == runs[1][0]
    assert torch.equal(runs[0][1], runs[1][1])


def test_sessions_rewind_fork_and_go_on_after_generation() -> None:
    model = tiny_gpt_neox().to(GPU, torch.float16)
    ids = random_token_ids(model.config.vocab_size, 30).tolist()
    engine = clusterfusion.load(model, mode="model")
    fused = clusterfusion.load(model, mode="fused").session()
    session = engine.session()
    for one in (session, fused):
        one.prefill(ids[:9])
    for token in ids[9:20]:
        assert torch.equal(session.step(token), fused.step(token))
    sampler = Sampler(SamplingOptions(), ids)
    following = session.decode(ids[20], 6, sampler)
    first = [next(following) for _ in range(3)]
    following.close()
    assert session.position == 23
    session.rewind(20)
    assert list(session.decode(ids[20], 6, sampler))[:3] == first
    session.rewind(15)
    fused.rewind(15)
    assert torch.equal(session.step(1), fused.step(1))
    twin = session.fork()
    assert torch.equal(twin.step(2), session.step(2))
    with pytest.raises(ContextLengthError):
        list(session.decode(1, session.max_seq_len, sampler))
    long = engine.generate(ids[:5], max_new_tokens=40)
    again = engine.generate(ids[:5], max_new_tokens=40)
    assert long.token_ids == again.token_ids


def test_device_memory_is_as_stated() -> None:
    weights = small(layers=2)
    cache = empty_cache(weights, 500)
    StepDecoder(weights, cache).step(1, 0)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    decoder = StepDecoder(weights, cache)
    c = weights.config
    rotary = 2 * 4 * 500 * (c.rotary.dim // 2)
    stated = (
        decoder.plan.scratch_bytes + 2 * 4 * c.hidden_size + rotary + 4 * c.vocab_size + 16 * decoder.plan.ctas + 20
    )
    assert torch.cuda.memory_allocated() - before <= stated + 9 * 512  # the allocator rounds up to 512 bytes


def test_a_cta_that_stops_arriving_is_an_error_and_no_hang() -> None:
    weights = small(layers=2)
    cache = empty_cache(weights, 64)
    decoder = StepDecoder(weights, cache, fault_cta=5)
    with pytest.raises(DeviceError, match="gave up waiting for the MLP's hidden vector"):
        list(decoder.stream(1, 0, 1))
    with pytest.raises(DeviceError, match="Make a new session"):
        decoder.step(1, 0)
    assert StepDecoder(weights, cache).step(1, 0).isfinite().all(), "the device is well"
