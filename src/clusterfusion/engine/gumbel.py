"""Gumbel noise from a counter-based generator: sampling that every device can repeat.

The token with the highest score + g, g standard Gumbel noise of its own, is a draw from softmax(score) (Gumbel 1954;
Maddison et al. 2014). Here g of a token depends on the seed, the position and the token's id alone, through Philox4x32-10
(Salmon et al. 2011), so it can be computed anywhere, in any order, without a state.

For id i: word i % 4 of Philox of counter (i // 4, position, 0, 0), key (low, high 32 bits of the seed);
u = ((word >> 9) + 0.5) * 2^-23; g = -log(-log(u)). 23 bits, because u must not round to 1, where g is infinite: that and
every other u is a float32 exactly.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def gumbel_noise(seed: int, position: int, count: int) -> NDArray[np.float64]:
    """g [count] of the ids 0 to count - 1, for the token at `position` (the number of tokens before it).

    seed in [0, 2^64), position in [0, 2^32). Values are from -2.82 to 16.64.
    """
    return -np.log(-np.log(uniforms(seed, position, count).astype(np.float64)))


def uniforms(seed: int, position: int, count: int) -> NDArray[np.float32]:
    """u [count] in (0, 1), at 2^-24 from both ends: what `gumbel_noise` takes the logarithms of."""
    blocks = -(-count // 4)
    counter = np.zeros((4, blocks), dtype=np.uint64)
    counter[0] = np.arange(blocks, dtype=np.uint64)
    counter[1] = position
    words = philox(counter, (seed & 0xFFFFFFFF, seed >> 32)).T.reshape(-1)[:count]
    return ((words >> np.uint64(9)).astype(np.float32) + np.float32(0.5)) * np.float32(2**-23)


def philox(counter: NDArray[np.uint64], key: tuple[int, int]) -> NDArray[np.uint64]:
    """Philox4x32-10: four 32-bit words for each column of `counter` [4, n], whose words are 32-bit too; `key` is two."""
    c0, c1, c2, c3 = counter
    for round_ in range(_ROUNDS):
        k0, k1 = (np.uint64((word + round_ * step) & 0xFFFFFFFF) for word, step in zip(key, _KEY_STEPS, strict=True))
        first, second = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (second >> _HALF) ^ c1 ^ k0, second & _LOW, (first >> _HALF) ^ c3 ^ k1, first & _LOW
    return np.stack((c0, c1, c2, c3))
