"""The counter-based generator against its published vectors, and the noise made of it."""

from __future__ import annotations

import numpy as np
import pytest

from clusterfusion.engine.gumbel import gumbel_noise, philox, uniforms


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_published_words(counter: str, key: str, words: str) -> None:
    """kat_vectors of Random123, philox4x32 with 10 rounds."""
    blocks = np.array([[int(word, 16)] * 3 for word in counter.split()], dtype=np.uint64)
    low, high = (int(word, 16) for word in key.split())
    assert philox(blocks, (low, high)).T.tolist() == [[int(word, 16) for word in words.split()]] * 3


def test_an_ids_noise_is_that_of_its_own_counter() -> None:
    seed, position = 0x123456789ABCDEF, 77
    u = uniforms(seed, position, 11)
    for token in (0, 3, 4, 10):
        counter = np.array([[token // 4], [position], [0], [0]], dtype=np.uint64)
        word = int(philox(counter, (seed & 0xFFFFFFFF, seed >> 32))[token % 4, 0])
        assert u[token] == ((word >> 9) + 0.5) / 2**23
    assert np.array_equal(uniforms(seed, position, 11), uniforms(seed, position, 50304)[:11]), "whatever the vocabulary"


def test_no_uniform_rounds_to_zero_or_one() -> None:
    ends = np.array([0, 0xFFFFFFFF], dtype=np.uint64) >> np.uint64(9)
    u = (ends.astype(np.float32) + np.float32(0.5)) * np.float32(2**-23)
    assert u.tolist() == [2**-24, 1 - 2**-24]
    g = -np.log(-np.log(u.astype(np.float64)))
    assert g == pytest.approx([-2.8115, 16.6355], abs=1e-3)


def test_the_noise_is_gumbels() -> None:
    """Quantiles of a sample of a million: 25 standard errors of a wrong tail would show, four of a right one pass."""
    g = np.concatenate([gumbel_noise(5, position, 50_000) for position in range(20)])
    for x in (-2.0, -1.0, 0.0, 1.0, 3.0, 6.0, 9.0):
        wanted = np.exp(-np.exp(-x))
        assert (g <= x).mean() == pytest.approx(wanted, abs=4 * np.sqrt(wanted * (1 - wanted) / len(g)))


def test_positions_and_seeds_are_independent() -> None:
    count = 40_000
    rows = [
        uniforms(seed, position, count) for seed, position in ((1, 0), (1, 1), (2, 0), (1 + 2**32, 0), (1, 2**32 - 1))
    ]
    correlation = np.corrcoef(np.array(rows, dtype=np.float64))
    assert np.abs(correlation - np.eye(len(rows))).max() < 4.5 / np.sqrt(count)
