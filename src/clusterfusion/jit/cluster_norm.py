"""Host twin of `cuda/programs/cluster_norm.cu`: which instance a norm needs, and its launch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from clusterfusion.jit.compiler import KernelSource
from clusterfusion.jit.launch import LaunchShape

PROGRAM = "programs/cluster_norm.cu"
CLUSTER_SIZES = (1, 2, 4, 8)
MAX_HIDDEN = 16384

ElementType = Literal["float16", "bfloat16", "float32"]
Norm = Literal["layer_norm", "rms_norm"]
Exchange = Literal["direct", "tree"]

ELEMENT_BYTES: dict[str, int] = {"float16": 2, "bfloat16": 2, "float32": 4}
_CPP_TYPES: dict[str, str] = {"float16": "__half", "bfloat16": "__nv_bfloat16", "float32": "float"}

VECTOR_BYTES = 16  # the widest load of one thread
# Threads a CTA and elements a thread, smallest first: the first that holds a CTA's share of the row is taken.
_SHAPES = ((128, 8), (512, 8), (512, 16), (512, 32))


@dataclass(frozen=True)
class ClusterNorm:
    """One instance of the program. `vector_width` is in elements: 1, or as many as fill `VECTOR_BYTES` of x."""

    norm: Norm
    x_type: ElementType
    weight_type: ElementType
    out_type: ElementType
    cluster_size: int
    exchange: Exchange
    threads: int
    items: int
    vector_width: int

    @property
    def instance(self) -> str:
        types = ", ".join(_CPP_TYPES[name] for name in (self.x_type, self.weight_type, self.out_type))
        # With one CTA there is nothing to exchange: both names are the same kernel.
        exchange = self.exchange if self.cluster_size > 1 else "direct"
        return (
            f"clusterfusion::cluster_norm<{types}, clusterfusion::Norm::{self.norm}, {self.cluster_size}, "
            f"clusterfusion::Exchange::{exchange}, {self.threads}, {self.items}, {self.vector_width}>"
        )

    @property
    def source(self) -> KernelSource:
        return KernelSource(PROGRAM, (self.instance,))

    def launch_shape(self, rows: int) -> LaunchShape:
        return LaunchShape(clusters=rows, threads=self.threads, cluster_size=self.cluster_size)


def choose_cluster_norm(
    norm: Norm,
    hidden: int,
    x_type: ElementType,
    weight_type: ElementType,
    out_type: ElementType,
    cluster_size: int,
    exchange: Exchange,
    *,
    aligned: bool,
) -> ClusterNorm:
    """The instance for rows of `hidden` elements, at most MAX_HIDDEN. `aligned`: every row of x, and the start of weight,
    bias and out, lie on VECTOR_BYTES, and `hidden` is a multiple of the vector."""
    width = VECTOR_BYTES // ELEMENT_BYTES[x_type] if aligned else 1
    share = -(-hidden // (cluster_size * width)) * width
    threads, items = next(shape for shape in _SHAPES if shape[0] * shape[1] >= share)
    return ClusterNorm(norm, x_type, weight_type, out_type, cluster_size, exchange, threads, items, width)


def all_shapes() -> tuple[tuple[int, int], ...]:
    """Every (threads, items) that `choose_cluster_norm` can choose."""
    return _SHAPES
