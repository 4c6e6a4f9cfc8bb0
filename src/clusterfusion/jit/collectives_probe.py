"""Host twin of `cuda/programs/collectives_probe.cu`: names the instances with which the tests check the collectives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from clusterfusion.jit.compiler import KernelSource
from clusterfusion.jit.launch import LaunchShape

PROGRAM = "programs/collectives_probe.cu"

_TEAM_THREADS = 96
_BYSTANDER_THREADS = 32

ProbeType = Literal["float16", "bfloat16", "float32", "float64", "int32", "affine"]
_CPP_TYPES: dict[str, str] = {
    "float16": "__half",
    "bfloat16": "__nv_bfloat16",
    "float32": "float",
    "float64": "double",
    "int32": "int",
    "affine": "clusterfusion::Affine",
}
_CPP_OPERATORS: dict[str, str] = {
    "sum": "clusterfusion::Sum",
    "max": "clusterfusion::Max",
    "compose": "clusterfusion::Compose",
}


@dataclass(frozen=True)
class CollectivesProbe:
    """One instance. `operator` None gathers, and only such, of 32-bit values, may have the exchange "async"; `team` "partial" and
    "joined" leave a warp of every CTA out of it."""

    element: ProbeType
    length: int
    cluster_size: int
    exchange: Literal["direct", "tree", "async"]
    team: Literal["whole", "partial", "joined"] = "whole"
    operator: Literal["sum", "max", "compose"] | None = None

    @property
    def instance(self) -> str:
        if self.exchange == "async":
            return (
                f"clusterfusion::async_gather_probe<{_CPP_TYPES[self.element]}, {self.length}, {self.cluster_size}, "
                f"clusterfusion::TeamKind::{self.team}>"
            )
        kernel = "gather_probe" if self.operator is None else "reduce_probe"
        types = [_CPP_TYPES[self.element]] + ([_CPP_OPERATORS[self.operator]] if self.operator else [])
        return (
            f"clusterfusion::{kernel}<{', '.join(types)}, {self.length}, {self.cluster_size}, "
            f"clusterfusion::Exchange::{self.exchange}, clusterfusion::TeamKind::{self.team}>"
        )

    def launch_shape(self, clusters: int) -> LaunchShape:
        threads = _TEAM_THREADS + (_BYSTANDER_THREADS if self.team != "whole" else 0)
        return LaunchShape(clusters=clusters, threads=threads, cluster_size=self.cluster_size)


def probe_source(probes: list[CollectivesProbe]) -> KernelSource:
    """One program with all of `probes`: the headers, most of the compiler's work, are read once."""
    return KernelSource(PROGRAM, tuple(probe.instance for probe in probes))
