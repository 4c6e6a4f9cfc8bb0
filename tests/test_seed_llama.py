"""The seed's LLaMA names on the CPU, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

import clusterfusion
from clusterfusion.errors import ArgumentError


def data(batch: int = 3, hidden: int = 40) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(hidden)
    x = torch.randn(batch, hidden, generator=generator)
    return {"input": x.half(), "weight": torch.randn(hidden, generator=generator).half()}


@pytest.mark.parametrize("hidden", [1, 40, 4096, 16384])
@pytest.mark.parametrize("eps", [None, 0.1])
def test_rmsnorm_against_float64(hidden: int, eps: float | None) -> None:
    arguments = data(hidden=hidden)
    got = clusterfusion.rmsnorm(**arguments) if eps is None else clusterfusion.rmsnorm(**arguments, eps=eps)
    x, weight = (tensor.double() for tensor in arguments.values())
    exact = F.rms_norm(x, (hidden,), weight, eps or 1e-6)
    assert got.dtype == torch.float16
    torch.testing.assert_close(got.double(), exact, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"input": torch.ones(40).half()}, r"input is of shape \[40\]; it must be \[batch, hidden\]"),
        ({"input": torch.ones(2, 16385).half()}, "hidden from 1 to 16384"),
        ({"input": torch.ones(2, 40)}, "input is torch.float32; it must be torch.float16"),
        ({"input": [1.0]}, "input is a list"),
        ({"weight": torch.ones(40)}, "weight is torch.float32"),
        ({"weight": torch.ones(41).half()}, r"weight is of shape \[41\]"),
        ({"weight": torch.ones(80).half()[::2]}, "weight is of strides"),
        ({"weight": None}, "weight is a NoneType"),
        ({"eps": -1.0}, "eps is -1.0"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ArgumentError, match=complaint):
        clusterfusion.rmsnorm(**(data() | changes))
