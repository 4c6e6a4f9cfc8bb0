"""layer_norm and rms_norm on the CPU, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

import clusterfusion
from clusterfusion.errors import ArgumentError

HIDDEN = 24


def row_data(dtype: torch.dtype, *shape: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    x = 3 + 2 * torch.randn(*shape, generator=generator)
    weight, bias = torch.randn(2, shape[-1], generator=generator)
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(HIDDEN,), (3, HIDDEN), (2, 3, HIDDEN), (0, HIDDEN), (5, 1)])
def test_on_the_cpu_against_float64(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight, bias = row_data(dtype, *shape)
    exact = F.layer_norm(x.double(), shape[-1:], weight.double(), bias.double(), 1e-5)
    exact_rms = F.rms_norm(x.double(), shape[-1:], weight.double(), 1e-6)
    for got, wanted in (
        (clusterfusion.layer_norm(x, weight, bias, 1e-5), exact),
        (clusterfusion.rms_norm(x, weight, 1e-6), exact_rms),
        (clusterfusion.layer_norm(x, weight, None, 1e-5), exact - bias.double()),
    ):
        assert got.dtype == dtype
        assert got.shape == x.shape
        torch.testing.assert_close(
            got.double(), wanted, rtol=2 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps
        )
    wide = clusterfusion.layer_norm(x, weight, bias, 1e-5, out_dtype=torch.float32)
    assert wide.dtype == torch.float32
    torch.testing.assert_close(wide.double(), exact, rtol=1e-5, atol=2e-6)


def test_a_large_mean_costs_no_digits() -> None:
    x = 1000 + torch.randn(4, 4096, generator=torch.Generator().manual_seed(1))
    exact = F.layer_norm(x.double(), (4096,), eps=1e-5)
    got = clusterfusion.layer_norm(x, torch.ones(4096), None, 1e-5)
    assert (got - exact).abs().max() < 2e-4  # E[x^2] - E[x]^2 would be off by more than 1e-2


def arguments(**changes: Any) -> dict[str, Any]:
    x, weight, bias = row_data(torch.float32, 3, HIDDEN)
    return {"x": x, "weight": weight, "bias": bias, "eps": 1e-5} | changes


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"x": torch.ones(3, HIDDEN, dtype=torch.float64)}, "x is torch.float64; it must be one of"),
        ({"x": torch.ones(3, HIDDEN, dtype=torch.int32)}, "x is torch.int32"),
        ({"x": torch.tensor(1.0)}, r"x is \(\); it must be \[\.\.\., 1 to 16384\]"),
        ({"x": torch.ones(2, 16385)}, r"x is \(2, 16385\)"),
        ({"x": torch.ones(HIDDEN, 3).t()}, r"x of shape \(3, 24\) has strides \(1, 3\).* pass x.contiguous"),
        ({"weight": torch.ones(HIDDEN + 1)}, r"weight is \(25,\); it must be \[24\]"),
        ({"weight": torch.ones(1, HIDDEN)}, r"weight is \(1, 24\)"),
        ({"weight": torch.ones(2 * HIDDEN)[::2]}, "weight is of stride 2; it must be contiguous"),
        ({"weight": torch.ones(HIDDEN, dtype=torch.float64)}, "weight is torch.float64"),
        (
            {"bias": torch.ones(HIDDEN, dtype=torch.float16)},
            "bias is torch.float16; it must be torch.float32, as weight",
        ),
        ({"bias": torch.ones(3)}, r"bias is \(3,\)"),
        ({"weight": torch.ones(HIDDEN, device="meta")}, "weight is meta; it must be on cpu"),
        ({"eps": -1e-5}, "eps is -1e-05; it must be zero or a positive number"),
        ({"eps": float("nan")}, "eps is nan"),
        ({"eps": float("inf")}, "eps is inf; it must be zero or a positive number"),
        ({"eps": None}, "eps is None"),
        ({"eps": "1"}, "eps is '1'"),
        ({"eps": torch.ones(2)}, "eps is "),
        ({"eps": 10**400}, "eps is 1000"),
        ({"cluster_size": 3}, r"cluster_size is 3; it must be one of \(1, 2, 4, 8\)"),
        ({"exchange": "ring"}, "exchange is ring; it must be one of"),
        ({"out_dtype": torch.float16}, r"out_dtype is torch.float16; it must be x's dtype \(torch.float32\)"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ArgumentError, match=complaint):
        clusterfusion.layer_norm(**arguments(**changes))
