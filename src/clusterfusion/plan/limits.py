"""What a plan must fit into, and three devices to plan for without having them."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class PlanLimits:
    """The facts of a GPU that decide a plan. `shared_bytes_per_block` is the most a block can opt in to."""

    name: str
    multiprocessors: int
    shared_bytes_per_block: int


H200 = PlanLimits("H200", multiprocessors=132, shared_bytes_per_block=232448)
B200 = PlanLimits("B200", multiprocessors=148, shared_bytes_per_block=232448)
RTX_5090 = PlanLimits("RTX 5090", multiprocessors=170, shared_bytes_per_block=101376)
