"""Random weights: the right distribution, and the same bits for the same seed wherever they are made."""

from __future__ import annotations

import hashlib

import pytest
import torch

import clusterfusion
from clusterfusion import random_weights
from clusterfusion.errors import ArgumentError
from clusterfusion.named_shapes import named_shape
from clusterfusion.weights import DecoderWeights

CPU = torch.device("cpu")


def make(seed: int, dtype: torch.dtype = torch.float32) -> DecoderWeights:
    return random_weights.random_weights(named_shape("pythia-14m"), seed=seed, dtype=dtype, device=CPU)


def digest(weights: DecoderWeights) -> str:
    layer = weights.layers[3]
    tensors = (weights.lm_head, layer.up_weight, layer.down_bias, layer.input_norm_weight)
    return hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in tensors)).hexdigest()


def test_bits_are_fixed_by_the_seed() -> None:
    """The digest is a constant: figures measured on these weights stay comparable from version to version."""
    assert digest(make(0)) == digest(make(0))
    assert digest(make(0)) != digest(make(1))
    assert digest(make(0)) == "38ae1ab8cc1e8b666f4446764bcc1e0107425e060b886263df2f263140c8a77f"


def test_a_16_bit_tensor_is_the_float32_one_rounded() -> None:
    assert torch.equal(make(5, torch.float16).lm_head, make(5).lm_head.to(torch.float16))


def test_values_do_not_depend_on_how_the_work_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (7, 1001)
    whole = random_weights.uniform(shape, 0.5, 0.1, 99, torch.float32, CPU)
    monkeypatch.setitem(random_weights._CHUNK, "cpu", 64)
    assert torch.equal(random_weights.uniform(shape, 0.5, 0.1, 99, torch.float32, CPU), whole)


def test_distribution() -> None:
    weights = make(3)
    up = torch.stack([layer.up_weight for layer in weights.layers])
    assert abs(up.mean().item()) < 1e-4
    assert up.std().item() == pytest.approx(random_weights.MATRIX_STD, rel=0.01)
    assert up.abs().max().item() <= random_weights.MATRIX_STD * 3**0.5 * 1.0001
    neighbours = torch.corrcoef(torch.stack((up.flatten()[:-1], up.flatten()[1:])))[0, 1]
    layers = torch.corrcoef(torch.stack((up[0].flatten(), up[1].flatten())))[0, 1]
    assert abs(neighbours.item()) < 5 / up.numel() ** 0.5, "neighbouring elements are correlated"
    assert abs(layers.item()) < 5 / up[0].numel() ** 0.5, "layers are correlated"
    norms = torch.stack([layer.post_norm_weight for layer in weights.layers])
    assert norms.mean().item() == pytest.approx(1, abs=0.02)
    assert norms.std().item() == pytest.approx(0.1, rel=0.1)
    assert all(layer.o_bias is not None and layer.o_bias.std() > 0.02 for layer in weights.layers)


@pytest.mark.parametrize("seed", [-1, 2**32, 0.5, "0", True, None])
def test_bad_seeds(seed: object) -> None:
    with pytest.raises(ArgumentError, match="seed is"):
        clusterfusion.load(random_weights="pythia-14m", seed=seed)  # type: ignore[arg-type]


def test_load_by_shape_name() -> None:
    engine = clusterfusion.load(random_weights="pythia-14m", device="cpu", seed=4)
    assert engine.config == named_shape("pythia-14m")
    assert engine.dtype == torch.float32
    assert torch.equal(engine.weights.lm_head, make(4).lm_head)
    assert len(engine.generate([1, 2, 3], 5).token_ids) == 5
    with pytest.raises(ArgumentError, match="named shape 'pythia-3b' is unknown"):
        clusterfusion.load(random_weights="pythia-3b")
