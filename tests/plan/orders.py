"""What tests of plans share: plans in each order of a layer's matrices, whichever the planner chose; plans with h in groups; edits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from clusterfusion.plan import BlockPlan
from clusterfusion.plan.block import MATRICES, Order
from clusterfusion.plan.step import Action

ORDERS: tuple[Order, ...] = tuple(MATRICES)


def in_order(plan: BlockPlan, order: Order) -> BlockPlan:
    config = dataclasses.replace(plan.config, parallel_residual=order != "sequential")
    plan = dataclasses.replace(plan, config=config, up_first=order == "up_first")
    assert plan.order == order
    return plan


Edit = Callable[[int, list[Action]], list[Action]]  # of what a CTA's role does
# A part of a row of down is a group of h.
TILE_A_STAGE = {"stage_tiles": 1, "warps": 2, "stages": 6, "window_stages": 3}
