"""Plans in each order of a layer's matrices, whichever the planner chose."""

from __future__ import annotations

import dataclasses

from clusterfusion.plan import BlockPlan
from clusterfusion.plan.block import MATRICES, Order

ORDERS: tuple[Order, ...] = tuple(MATRICES)


def in_order(plan: BlockPlan, order: Order) -> BlockPlan:
    config = dataclasses.replace(plan.config, parallel_residual=order != "sequential")
    plan = dataclasses.replace(plan, config=config, up_first=order == "up_first")
    assert plan.order == order
    return plan
