"""The cluster norms against float64, beside PyTorch's own in the same dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import clusterfusion
import clusterfusion.ops.norm
from clusterfusion.errors import ArgumentError
from clusterfusion.jit.cluster_norm import ClusterNorm, choose_cluster_norm

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)
HIDDEN = (1, 7, 128, 224, 2560, 4096, 5120, 6144, 8191, 16384)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FORMS = ((1, "direct"), (2, "direct"), (4, "direct"), (4, "tree"), (8, "direct"), (8, "tree"))


def row_data(dtype: torch.dtype, rows: int, hidden: int, mean: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(GPU).manual_seed(rows * 100_003 + hidden)
    x = mean + torch.randn(rows, hidden, device=GPU, generator=generator)
    weight = 1 + 0.3 * torch.randn(hidden, device=GPU, generator=generator)
    bias = 0.3 * torch.randn(hidden, device=GPU, generator=generator)
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


def assert_as_good(ours: Tensor, theirs: Tensor, exact: Tensor) -> None:
    assert ours.shape == exact.shape
    if not exact.numel():
        return
    our_error, their_error = ((got.double() - exact).abs() for got in (ours, theirs))
    assert our_error.isfinite().all()
    # Both are dominated by the one rounding of the output, which is the same for both but for a few ties.
    assert our_error.mean() <= 1.001 * their_error.mean() + 1e-12, (
        f"mean {our_error.mean()}, PyTorch {their_error.mean()}"
    )
    assert our_error.max() <= 1.25 * their_error.max() + 1e-12, (
        f"max {our_error.max():.3e} against {their_error.max():.3e}"
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("cluster_size", "exchange"), FORMS)
def test_16_bit_norms_are_as_close_to_float64_as_pytorch(dtype: torch.dtype, cluster_size: int, exchange: str) -> None:
    for hidden in HIDDEN:
        for rows in (0, 1, 3, 133):
            x, weight, bias = row_data(dtype, rows, hidden)
            options = {"cluster_size": cluster_size, "exchange": exchange}
            exact = F.layer_norm(x.double(), (hidden,), weight.double(), bias.double(), 1e-5)
            theirs = F.layer_norm(x, (hidden,), weight, bias, 1e-5)
            assert_as_good(clusterfusion.layer_norm(x, weight, bias, 1e-5, **options), theirs, exact)  # type: ignore[arg-type]
            exact = F.rms_norm(x.double(), (hidden,), weight.double(), 1e-6)
            theirs = F.rms_norm(x, (hidden,), weight, 1e-6)
            assert_as_good(clusterfusion.rms_norm(x, weight, 1e-6, **options), theirs, exact)  # type: ignore[arg-type]


@pytest.mark.parametrize(("cluster_size", "exchange"), FORMS)
@pytest.mark.parametrize("mean", [0.5, 1000.0])
def test_float32_norms_against_float64(cluster_size: int, exchange: str, mean: float) -> None:
    """Each element within a few roundings: of x - mean (its digits shrink with a large mean), scale, weight and bias."""
    for hidden in HIDDEN:
        for rows in (1, 3, 133):
            x, weight, bias = row_data(torch.float32, rows, hidden, mean)
            options = {"cluster_size": cluster_size, "exchange": exchange}
            exact = F.layer_norm(x.double(), (hidden,), weight.double(), bias.double(), 1e-5)
            ours = clusterfusion.layer_norm(x, weight, bias, 1e-5, **options)  # type: ignore[arg-type]
            theirs = F.layer_norm(x, (hidden,), weight, bias, 1e-5)
            our_error, their_error = ((got.double() - exact).abs() for got in (ours, theirs))
            if hidden > 1:
                assert our_error.max() <= max(1.25 * their_error.max().item(), 2e-6), f"{hidden} x {rows}"
            exact = F.rms_norm(x.double(), (hidden,), weight.double(), 1e-6)
            ours = clusterfusion.rms_norm(x, weight, 1e-6, **options)  # type: ignore[arg-type]
            assert (ours.double() - exact).abs().max() <= 2e-6 * exact.abs().max().clamp_min(1.0)


def test_wide_output_and_mixed_dtypes() -> None:
    x, _, _ = row_data(torch.float16, 5, 2560)
    _, weight, bias = row_data(torch.float32, 5, 2560)
    exact = F.layer_norm(x.double(), (2560,), weight.double(), bias.double(), 1e-5)
    out = clusterfusion.layer_norm(x, weight, bias, 1e-5, out_dtype=torch.float32)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), exact, rtol=2e-6, atol=2e-6)


def test_strided_rows_and_unaligned_tensors() -> None:
    x, weight, bias = row_data(torch.float16, 6, 512)
    exact = F.layer_norm(x[:, 3:260].double(), (257,), weight[3:260].double(), bias[3:260].double(), 1e-5)
    out = clusterfusion.layer_norm(x[:, 3:260], weight[3:260], bias[3:260], 1e-5)
    torch.testing.assert_close(out.double(), exact, rtol=2e-3, atol=2e-3)
    wide = torch.randn(6, 1024, device=GPU).half()
    out = clusterfusion.rms_norm(wide[:, :512], weight, 1e-6)
    assert torch.equal(out, clusterfusion.rms_norm(wide[:, :512].contiguous(), weight, 1e-6))
    with pytest.raises(ArgumentError, match="strides"):
        clusterfusion.rms_norm(wide.t(), weight[:6], 1e-6)


def test_the_bits_depend_on_the_form_and_on_nothing_else() -> None:
    x, weight, bias = row_data(torch.float32, 40, 5120)
    stream = torch.cuda.Stream()
    for cluster_size, exchange in FORMS:
        first = clusterfusion.layer_norm(x, weight, bias, 1e-5, cluster_size=cluster_size, exchange=exchange)  # type: ignore[arg-type]
        for _ in range(50):
            again = clusterfusion.layer_norm(x, weight, bias, 1e-5, cluster_size=cluster_size, exchange=exchange)  # type: ignore[arg-type]
            assert torch.equal(again, first)
        one_row = clusterfusion.layer_norm(x[7:8], weight, bias, 1e-5, cluster_size=cluster_size, exchange=exchange)  # type: ignore[arg-type]
        assert torch.equal(one_row[0], first[7])
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            elsewhere = clusterfusion.layer_norm(
                x * 1, weight, bias, 1e-5, cluster_size=cluster_size, exchange=exchange
            )  # type: ignore[arg-type]
        stream.synchronize()
        assert torch.equal(elsewhere, first)


def test_special_values() -> None:
    weight = torch.ones(64, device=GPU)
    constant = torch.full((2, 64), 3.25, device=GPU)
    assert torch.equal(clusterfusion.layer_norm(constant, weight, None, 1e-5), torch.zeros(2, 64, device=GPU))
    broken = torch.randn(3, 64, device=GPU)
    broken[1, 5] = torch.nan
    out = clusterfusion.layer_norm(broken, weight, None, 1e-5)
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()


def test_an_unaligned_base_takes_the_scalar_instance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both instances see the same values, so that only the widths of their loads differ."""
    widths = []

    def noted(*arguments: Any, **options: Any) -> ClusterNorm:
        chosen = choose_cluster_norm(*arguments, **options)
        widths.append(chosen.vector_width)
        return chosen

    monkeypatch.setattr(clusterfusion.ops.norm, "choose_cluster_norm", noted)
    for dtype in DTYPES:
        x, weight, bias = row_data(dtype, 3, 2560)
        shifted = torch.empty(3 * 2560 + 1, dtype=dtype, device=GPU)[1:].view(3, 2560)
        shifted.copy_(x)
        spaced = torch.full((3, 2560 + 1), torch.nan, dtype=dtype, device=GPU)[:, :2560]
        spaced.copy_(x)
        widths.clear()
        aligned, unaligned, uneven = (
            clusterfusion.layer_norm(rows, weight, bias, 1e-5) for rows in (x, shifted, spaced)
        )
        assert widths == [16 // x.element_size(), 1, 1]
        assert torch.equal(unaligned, uneven)
        tolerance = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(unaligned, aligned, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("hidden", [hidden for hidden in HIDDEN if hidden >= 128])
@pytest.mark.parametrize(("cluster_size", "exchange"), FORMS)
def test_float32_mean_error_is_at_most_pytorchs(cluster_size: int, exchange: str, hidden: int) -> None:
    options = {"cluster_size": cluster_size, "exchange": exchange}
    for mean in (0.5, 1000.0):
        x, weight, bias = row_data(torch.float32, 133, hidden, mean)
        exact = F.layer_norm(x.double(), (hidden,), weight.double(), bias.double(), 1e-5)
        ours = clusterfusion.layer_norm(x, weight, bias, 1e-5, **options)  # type: ignore[arg-type]
        theirs = F.layer_norm(x, (hidden,), weight, bias, 1e-5)
        our_error, their_error = ((got.double() - exact).abs().mean().item() for got in (ours, theirs))
        assert our_error <= their_error, f"mean of x {mean}: {our_error:.3e}, PyTorch {their_error:.3e}"
