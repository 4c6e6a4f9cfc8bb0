"""What the launches of a decoder layer ask of a K/V cache."""

from __future__ import annotations

import pytest
import torch

from clusterfusion.errors import UnsupportedModelError
from clusterfusion.ops.layer_launch import require_streamable_cache


def test_a_cache_that_cannot_be_streamed_is_named_with_its_cause() -> None:
    size = 4 * 8 * 64
    memory = torch.zeros(3 * size + 16, dtype=torch.float16)
    first = -(memory.data_ptr() // 2) % 8  # elements to the next multiple of 16 bytes
    good, other = (memory[first + i * size :][:size].view(4, 8, 64) for i in range(2))
    require_streamable_cache(good, other)
    shifted = memory[first + 2 * size + 1 :][:size].view(4, 8, 64)
    for name, caches in (("k_cache", (shifted, good)), ("v_cache", (good, shifted))):
        with pytest.raises(UnsupportedModelError, match=f"^{name} at address 0x.* a multiple of 16 bytes"):
            require_streamable_cache(*caches)
    odd = torch.zeros(4, 8, 65, dtype=torch.float16)[:, :, :64]
    for name, caches in (("k_cache", (odd, odd)), ("v_cache", (good, odd))):
        with pytest.raises(UnsupportedModelError, match=rf"^{name} of strides \(520, 65, 1\) cannot be streamed"):
            require_streamable_cache(*caches)
