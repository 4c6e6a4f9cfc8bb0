"""What tests of plans share: plans in each order of a layer's matrices, whichever the planner chose; plans with h or heads in groups; edits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from clusterfusion.plan import BlockPlan
from clusterfusion.plan.block import MATRICES, Order
from clusterfusion.plan.ring import tells_uses_apart
from clusterfusion.plan.sizes import BARRIER_BYTES, ELEMENT_BYTES, fixed_shared_bytes
from clusterfusion.plan.step import Action

ORDERS: tuple[Order, ...] = tuple(MATRICES)


def in_order(plan: BlockPlan, order: Order) -> BlockPlan:
    config = dataclasses.replace(plan.config, parallel_residual=order != "sequential")
    plan = dataclasses.replace(plan, config=config, up_first=order == "up_first")
    assert plan.order == order
    return plan


Edit = Callable[[int, list[Action]], list[Action]]  # of what a CTA's role does
# A part of a row of down is a group of h.
TILE_A_STAGE = {"stage_tiles": 1, "warps": 2, "stages": 6, "window_stages": 3, "early_stages": 1}


def in_head_groups(plan: BlockPlan, groups: int) -> BlockPlan:
    """With so many head groups, and a ring that leaves room for them."""
    c, p = plan.config, plan
    fixed = fixed_shared_bytes(c, p.ctas, p.queries, p.tile_bytes, p.warps, groups)
    stage_room, teams = p.stage_bytes + BARRIER_BYTES, p.warps // p.stage_tiles
    stages = min(p.stages, (p.limits.shared_bytes_per_block - fixed) // stage_room)
    while not tells_uses_apart(stages, teams, min(p.window_stages, stages)):
        stages -= 1
    return dataclasses.replace(
        plan,
        head_groups=groups,
        stages=stages,
        window_stages=min(p.window_stages, stages),
        early_stages=min(p.early_stages, stages),
        shared_bytes=fixed + stages * stage_room,
    )


def in_two_groups(plan: BlockPlan) -> BlockPlan:
    """With two head groups, where there can be two: a small model's parts of a row of o are less than the planner's least."""
    c = plan.config
    fits = c.num_kv_heads % 2 == 0 and c.q_size // 2 * ELEMENT_BYTES <= plan.tile_bytes
    return dataclasses.replace(plan, head_groups=2) if fits and not c.parallel_residual else plan


def move(actions: list[Action], what: tuple[str, str], ahead_of: tuple[str, str]) -> list[Action]:
    """In every layer, puts the first action of the one kind and name before the last of the other ahead of it."""
    moved: list[Action] = []
    for action in actions:
        at = len(moved)
        if (action.kind, action.name) == what:
            at = max((i for i, a in enumerate(moved) if (a.kind, a.name) == ahead_of), default=at)
        moved.insert(at, action)
    return moved
