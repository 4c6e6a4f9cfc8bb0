"""Bytes that a step reads, against tensors that exist; and the floor that follows."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from clusterfusion.bench.costs import floor_ms, kv_bytes, layer_weight_bytes, step_bytes, weight_bytes
from clusterfusion.named_shapes import named_shape
from clusterfusion.random_weights import random_weights
from clusterfusion.reference import KVCache

SHAPES = ("pythia-14m", "pythia-70m")


@pytest.mark.parametrize("name", SHAPES)
def test_weights_are_those_of_the_layers(name: str) -> None:
    """Biases and norms count, embedding, final norm and head do not."""
    config = dataclasses.replace(named_shape(name), num_layers=2, vocab_size=64)
    weights = random_weights(config, dtype=torch.float16, device=torch.device("cpu"))
    views = {"q_weight", "k_weight", "v_weight", "q_bias", "k_bias", "v_bias"}  # of the fused matrix
    held = [
        sum(tensor.nbytes for key, tensor in vars(layer).items() if tensor is not None and key not in views)
        for layer in weights.layers
    ]
    assert held == [layer_weight_bytes(config)] * 2
    assert weight_bytes(config) == sum(held)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("context", [0, 1, 513])
def test_kv_bytes_are_those_of_a_cache_of_that_length(name: str, context: int) -> None:
    config = named_shape(name)
    cache = KVCache.allocate(config, context, torch.float16, "cpu")
    assert kv_bytes(config, context) == cache.k.nbytes + cache.v.nbytes
    assert step_bytes(config, context) == weight_bytes(config) + kv_bytes(config, context)


def test_a_pythia_of_2_8_billion() -> None:
    config = named_shape("pythia-2.8b")
    assert layer_weight_bytes(config) == 2 * (12 * 2560**2 + 13 * 2560)
    assert kv_bytes(config, 1920) == 2 * 32 * 2560 * 1920 * 2
    assert floor_ms(step_bytes(config, 0), 4.55e12) == pytest.approx(1.107, abs=0.001)
