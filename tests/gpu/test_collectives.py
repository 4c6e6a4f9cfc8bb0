"""ClusterReduce, ClusterGather and AsyncGather: every bit on every rank, for every size, dtype, exchange and team."""

from __future__ import annotations

import ctypes
import functools
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from clusterfusion.jit.collectives_probe import CollectivesProbe, ProbeType, probe_source
from clusterfusion.jit.launch import load_kernel

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda", 0)
SIZES = (1, 2, 4, 8)
EXCHANGES: tuple[Literal["direct", "tree"], ...] = ("direct", "tree")
TEAMS: tuple[Literal["whole", "partial"], ...] = ("whole", "partial")
LENGTHS = (1, 7, 96, 200)  # less than, as many as, and more than the team's 96 threads
CLUSTERS, ROUNDS, SKEW_NS = 9, 30, 2000
TYPES: dict[ProbeType, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
    "int32": torch.int32,
}
ASYNC_TYPES: tuple[ProbeType, ...] = ("float32", "int32")
MASK = 0xFFFFFFFF


@functools.cache
def all_probes() -> list[CollectivesProbe]:
    probes = []
    for size in SIZES:
        for exchange in EXCHANGES:
            for number, element in enumerate(TYPES):
                for at, length in enumerate(LENGTHS):
                    team = TEAMS[(number + at) % 2]
                    operators: tuple[Any, ...] = ("sum", "max", None) if length == 7 else ("sum", None)
                    probes += [CollectivesProbe(element, length, size, exchange, team, op) for op in operators]
            probes += [CollectivesProbe("affine", 7, size, exchange, team, "compose") for team in TEAMS]
        probes += [
            CollectivesProbe(element, length, size, "async", team)
            for element in ASYNC_TYPES
            for length in LENGTHS
            for team in TEAMS
        ]
    return probes


def run(probe: CollectivesProbe, data: Tensor, out: Tensor, skew_ns: int = SKEW_NS) -> None:
    """data [rounds, clusters, size, length, ...] through the probe into out, which comes poisoned."""
    expired = torch.zeros(1, dtype=torch.int32, device=GPU)
    source = probe_source(
        [p for p in all_probes() if (p.cluster_size, p.exchange) == (probe.cluster_size, probe.exchange)]
    )
    kernel = load_kernel(source, probe.instance, 0)
    shape = probe.launch_shape(data.shape[1])
    kernel.launch(shape, data, out, expired, ctypes.c_int32(data.shape[0]), ctypes.c_uint32(skew_ns))
    assert expired.item() == 0


def random_data(element: ProbeType, *shape: int) -> Tensor:
    if element in ("int32", "affine"):
        return torch.randint(-(2**31), 2**31, shape, device=GPU, dtype=torch.int32)
    return torch.randn(shape, device=GPU, dtype=torch.float64).mul(100).to(TYPES[element])


def fold(values: list[Any], exchange: str, op: Any) -> Any:
    """The documented order: direct from the left, tree by pairs of neighbours."""
    if exchange == "direct":
        return functools.reduce(op, values)
    while len(values) > 1:
        values = [op(a, b) for a, b in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def maximum(a: Tensor, b: Tensor) -> Tensor:
    return torch.maximum(a, b)


def compose(first: Tensor, second: Tensor) -> Tensor:
    """Affine maps [..., 2] as int64 holding 32 bits: first, then second."""
    scale = (first[..., 0] * second[..., 0]) & MASK
    offset = (first[..., 1] * second[..., 0] + second[..., 1]) & MASK
    return torch.stack((scale, offset), -1)


def accumulator(element: ProbeType) -> torch.dtype:
    return torch.float32 if element in ("float16", "bfloat16") else TYPES[element]


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("element", TYPES)
def test_reduce_is_exact_on_every_rank(element: ProbeType, size: int, exchange: str) -> None:
    """Thirty exchanges back to back, ranks arriving up to 2 us apart; sums of 16-bit floats are folded in float32."""
    seen = 0
    for probe in all_probes():
        if (probe.element, probe.cluster_size, probe.exchange) != (element, size, exchange) or probe.operator is None:
            continue
        seen += 1
        data = random_data(element, ROUNDS, CLUSTERS, size, probe.length)
        values = [v.to(accumulator(element)) for v in data.unbind(2)]
        wanted = fold(values, exchange, torch.add if probe.operator == "sum" else maximum)
        out = torch.full(data.shape, -77, dtype=accumulator(element), device=GPU)
        run(probe, data, out)
        for rank in range(size):
            assert torch.equal(out[:, :, rank], wanted), f"{probe}, rank {rank}"
    assert seen == len(LENGTHS) + 1


@pytest.mark.parametrize(
    ("element", "exchange"),
    [(element, exchange) for exchange in EXCHANGES for element in TYPES] + [(e, "async") for e in ASYNC_TYPES],
)
@pytest.mark.parametrize("size", SIZES)
def test_gather_moves_every_value_to_every_rank(element: ProbeType, size: int, exchange: str) -> None:
    seen = 0
    for probe in all_probes():
        if (probe.element, probe.cluster_size, probe.exchange) != (element, size, exchange) or probe.operator:
            continue
        seen += 1
        data = random_data(element, ROUNDS, CLUSTERS, size, probe.length)
        out = torch.full((ROUNDS, CLUSTERS, size, size * probe.length), -77, dtype=TYPES[element], device=GPU)
        run(probe, data, out)
        for rank in range(size):
            assert torch.equal(out[:, :, rank], data.flatten(2)), f"{probe}, rank {rank}"
    assert seen == len(LENGTHS) * (len(TEAMS) if exchange == "async" else 1)


@pytest.mark.parametrize("team", TEAMS)
@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("size", SIZES)
def test_operands_come_in_rank_order(
    size: int, exchange: Literal["direct", "tree"], team: Literal["whole", "partial"]
) -> None:
    """An operator that does not commute."""
    probe = CollectivesProbe("affine", 7, size, exchange, team, "compose")
    data = random_data("affine", ROUNDS, CLUSTERS, size, 7, 2)
    out = torch.full_like(data, -77)
    run(probe, data, out)
    values = [v.to(torch.int64) & MASK for v in data.unbind(2)]
    wanted = fold(values, exchange, compose)
    for rank in range(size):
        assert torch.equal(out[:, :, rank].to(torch.int64) & MASK, wanted)


def test_nan_is_not_lost_in_a_maximum() -> None:
    probe = CollectivesProbe("float32", 7, 4, "tree", TEAMS[(2 + 1) % 2], "max")
    data = random_data("float32", ROUNDS, CLUSTERS, 4, 7)
    data[:, :, 2, 3] = torch.nan
    out = torch.zeros_like(data)
    run(probe, data, out)
    assert out[..., 3].isnan().all()
    assert out[..., :3].isfinite().all()


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("size", SIZES[1:])
def test_two_hundred_runs_have_the_same_bits(size: int, exchange: Literal["direct", "tree"]) -> None:
    for length, team in ((96, TEAMS[0]), (200, TEAMS[1])):
        probe = CollectivesProbe("float32", length, size, exchange, team, "sum")
        data = random_data("float32", 10, 14, size, length)
        first = torch.zeros_like(data)
        run(probe, data, first)
        for repeat in range(200):
            out = torch.full_like(data, torch.nan)
            run(probe, data, out, skew_ns=37 * repeat)
            assert torch.equal(out, first)
