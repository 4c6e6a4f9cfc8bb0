"""What a plan must fit into, and three devices to plan for without having them."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class PlanLimits:
    """The facts of a GPU that decide a plan. `shared_bytes_per_block` is the most a block can opt in to."""

    name: str
    multiprocessors: int
    shared_bytes_per_block: int
    compute_capability: tuple[int, int]

    @property
    def holds_tiles(self) -> bool:
        """Whether a warp has a tile's weights in registers before it multiplies them. The compiler spills them on Blackwell, whose kernels do
        not (kMostHeld in cuda/ops/gemv.cuh)."""
        return self.compute_capability < (10, 0)


H200 = PlanLimits("H200", 132, 232448, (9, 0))
B200 = PlanLimits("B200", 148, 232448, (10, 0))
RTX_5090 = PlanLimits("RTX 5090", 170, 101376, (12, 0))
