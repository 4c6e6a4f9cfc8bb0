"""Who reads what, in which order, and which buffers exist: immutable data, made and checked without a GPU."""

from clusterfusion.plan.block import BlockPlan, check_plan, plan_block
from clusterfusion.plan.limits import B200, H200, RTX_5090, PlanLimits
from clusterfusion.plan.step import balance, step_schedule
from clusterfusion.plan.step_check import check_step

__all__ = [
    "B200",
    "H200",
    "RTX_5090",
    "BlockPlan",
    "PlanLimits",
    "balance",
    "check_plan",
    "check_step",
    "plan_block",
    "step_schedule",
]
