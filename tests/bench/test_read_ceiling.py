"""How much is read for the ceiling, and the fold that proves it. The kernels' own test is a compilation; they check
themselves in every run."""

from __future__ import annotations

import functools
import operator

import pytest
import torch

from clusterfusion.bench.read_ceiling import LEAST_BYTES, MOST_BYTES, data_bytes, xor_of


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 1001])
def test_xor_of_all_words(count: int) -> None:
    words = torch.randint(-(2**31), 2**31 - 1, (count,), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    kept = words.clone()
    expected = functools.reduce(operator.xor, words.tolist()) & 0xFFFFFFFF
    assert xor_of(words) == expected
    assert xor_of(words.view(torch.float16)) == expected
    assert torch.equal(words, kept)


def test_xor_of_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    words = torch.arange(1, 1000, dtype=torch.int32) * 2654435
    whole = xor_of(words)
    monkeypatch.setattr("clusterfusion.bench.read_ceiling._FOLD_WORDS", 64)
    assert xor_of(words) == whole


def test_as_much_as_the_layers_within_bounds() -> None:
    assert data_bytes(1000) == LEAST_BYTES
    assert data_bytes(5_000_000_017) == 5_000_000_016
    assert data_bytes(10**12) == MOST_BYTES
    assert LEAST_BYTES % 16 == MOST_BYTES % 16 == 0
