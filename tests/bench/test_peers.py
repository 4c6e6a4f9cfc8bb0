"""transformers on our tensors: shared, and computing what the reference computes; its failures stay with it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from clusterfusion import reference
from clusterfusion.architecture import DecoderConfig
from clusterfusion.bench import peers
from clusterfusion.bench.peers import FEWEST_SAMPLES, PEERS, Peers, StaticCacheStep, affordable_samples, shared_model
from clusterfusion.named_shapes import named_shape
from clusterfusion.random_weights import random_weights, uniform
from clusterfusion.weights import DecoderWeights

CPU = torch.device("cpu")
SMALL = {"num_layers": 2, "vocab_size": 64}
CONFIGS = {
    "parallel": dataclasses.replace(named_shape("pythia-14m"), **SMALL),
    "sequential, tanh": dataclasses.replace(
        named_shape("pythia-14m"), parallel_residual=False, activation="gelu_tanh", **SMALL
    ),
}


def setting(config: DecoderConfig) -> tuple[DecoderWeights, reference.KVCache, Tensor]:
    weights = random_weights(config, dtype=torch.float32, device=CPU)
    shape = (config.num_layers, config.num_heads, 64, config.head_dim)
    k, v = (uniform(shape, 0.0, 1.0, stream, torch.float32, CPU) for stream in (1, 2))
    return weights, reference.KVCache(k, v), uniform((config.hidden_size,), 0.0, 1.0, 3, torch.float32, CPU)


def layers_of_the_reference(weights: DecoderWeights, kv: reference.KVCache, x: Tensor, context: int) -> Tensor:
    """The residual vector after the last layer [hidden], leaving `kv` as it is."""
    config = weights.config
    cos, sin = reference.rotary_tables(config.rotary, torch.tensor([context]), torch.float32)
    x = x[None]
    for i, layer in enumerate(weights.layers):
        k, v = kv.k[i].clone(), kv.v[i].clone()
        x = reference.decoder_layer(config, layer, x, cos, sin, k, v, context, dtype=torch.float32)
    return x[0]


def test_parameters_are_our_tensors() -> None:
    weights, _, _ = setting(CONFIGS["parallel"])
    model = shared_model(weights)
    ours = {weights.embedding.data_ptr(), weights.final_norm_weight.data_ptr()}
    ours |= {
        tensor.data_ptr() for layer in weights.layers for tensor in vars(layer).values() if isinstance(tensor, Tensor)
    }
    assert weights.final_norm_bias is not None
    ours.add(weights.final_norm_bias.data_ptr())
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() in ours, name
    assert not any(buffer.is_meta for buffer in model.buffers())


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("context", [0, 15, 40])
def test_a_step_is_the_references_and_can_be_repeated(name: str, context: int) -> None:
    weights, kv, x = setting(CONFIGS[name])
    expected = layers_of_the_reference(weights, kv, x, context)
    expected = reference.norm(weights.config, expected, weights.final_norm_weight, weights.final_norm_bias)
    step = StaticCacheStep(shared_model(weights), kv, x, context)
    for _ in range(3):
        step.prepare()
        torch.testing.assert_close(step.run().flatten(), expected, rtol=1e-4, atol=1e-5)
    assert step.cache.layers[0].keys.shape[2] == -(-(context + 1) // 16) * 16


def test_the_cache_is_passed_by_the_name_that_forward_knows() -> None:
    class Newer:
        def forward(self, input_ids: Tensor, cache: object = None) -> None: ...

    class Older:
        def forward(self, input_ids: Tensor, past_key_values: object = None) -> None: ...

    assert (peers.cache_keyword(Newer()), peers.cache_keyword(Older())) == ("cache", "past_key_values")


def test_failures_are_reported_and_go_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the CUDA graph fails by itself; the others are made to work and to fail."""
    weights, kv, x = setting(CONFIGS["parallel"])
    expected = layers_of_the_reference(weights, kv, x, 20)
    monkeypatch.setattr(peers, "_seconds", lambda *_: 0.05)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: 1 / 0)
    made = Peers(weights, kv, x)
    eager, compiled, graph = (made.set_up(name, 20, expected, 100) for name in PEERS)
    assert eager.error is None
    assert eager.candidate is not None
    assert (eager.candidate.samples, eager.candidate.may_fail) == (40, True)
    assert eager.difference is not None
    assert eager.difference < 1e-4
    for setup in (graph, compiled):
        assert setup.candidate is None
        assert setup.error
        assert "\n" not in setup.error
    assert compiled.error == "ZeroDivisionError: division by zero"
    wrong = made.set_up(PEERS[0], 20, -expected, 100)
    assert wrong.candidate is None
    assert "differs from ours" in str(wrong.error)


def test_a_missing_transformers_is_every_peers_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(weights: DecoderWeights) -> None:
        raise ImportError("No module named 'transformers'")

    monkeypatch.setattr(peers, "shared_model", missing)
    made = Peers(*setting(CONFIGS["parallel"]))
    errors = {made.set_up(name, 4, torch.zeros(1), 100).error for name in PEERS}
    assert errors == {"ImportError: No module named 'transformers'"}


def test_slow_peers_get_fewer_samples() -> None:
    assert affordable_samples(0.001, 100) == 100
    assert affordable_samples(0.05, 100) == 40
    assert affordable_samples(10.0, 100) == FEWEST_SAMPLES
