"""Whether two caches share elements, against their elements."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clusterfusion.ops.layer_checks import _overlaps_itself, _share_elements


def elements(cache: Tensor) -> list[int]:
    """Where they lie, of a cache in memory that counts its elements."""
    return cache.flatten().tolist()


@settings(max_examples=400, deadline=None)
@given(
    heads=st.integers(1, 3),
    tokens=st.integers(1, 4),
    head_dim=st.integers(1, 4),
    steps=st.tuples(st.integers(0, 24), st.integers(0, 24)),
    offset=st.integers(-60, 60),
)
def test_caches_share_elements_or_not(
    heads: int, tokens: int, head_dim: int, steps: tuple[int, int], offset: int
) -> None:
    """Whatever the stride of a dimension of size 1, which says nothing."""
    memory = torch.arange(256, dtype=torch.int32)
    k, v = (memory.as_strided((heads, tokens, head_dim), (*steps, 1), 64 + at) for at in (0, offset))
    where = elements(k)
    if len(set(where)) < len(where):
        assert _overlaps_itself(k)
    if not _overlaps_itself(k):
        assert _share_elements(k, v) == _share_elements(v, k) == (not set(where).isdisjoint(elements(v)))


def test_a_dimension_of_size_1_may_have_any_stride() -> None:
    memory = torch.zeros(2048)
    for stride in (1, 64, 104, 999):
        k, near, far = (memory.as_strided((1, 12, 64), (stride, 64, 1), at) for at in (0, 128, 768))
        assert _share_elements(k, near) and not _share_elements(k, far)
