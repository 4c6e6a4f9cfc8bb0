"""The schedule of the whole step, followed on the CPU: in each order of a layer's matrices it computes the model, with the same
bits in every order in which CTAs go on; and what is missing from it shows in the results."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from plan.orders import ORDERS, TILE_A_STAGE, in_two_groups
from plan.step_interpreter import StepInterpreter, check_computes
from tiny_models import random_token_ids, relative_error, tiny_gpt_neox, weights_of
from torch import Tensor

from clusterfusion import reference
from clusterfusion.plan import H200, BlockPlan, check_plan, check_step, plan_block, step
from clusterfusion.plan.block import ROLES, Order, Role
from clusterfusion.plan.step import Action
from clusterfusion.weights import DecoderWeights


@dataclasses.dataclass(frozen=True)
class Case:
    """A tiny model, a device and where the step stands. `plan` changes what plan_block chose."""

    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    ctas: int = 16
    position: int = 45
    plan: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def orders(self) -> tuple[Order, ...]:
        """Of a layer's matrices, that the model allows."""
        return ("up_first", "qkv_first") if self.model.get("use_parallel_residual", True) else ("sequential",)

    def build(
        self, order: Order, dtype: torch.dtype = torch.float32
    ) -> tuple[BlockPlan, DecoderWeights, reference.KVCache, Tensor]:
        """The plan, the weights, a cache of `position` tokens, and the ids, the new one last."""
        weights = weights_of(tiny_gpt_neox(**self.model).to(dtype))
        plan = plan_block(weights.config, dataclasses.replace(H200, multiprocessors=self.ctas))
        plan = dataclasses.replace(plan, **self.plan, up_first=order == "up_first")
        if "head_groups" not in self.plan:
            plan = in_two_groups(plan)
        assert plan.order == order
        check_plan(plan)
        ids = random_token_ids(weights.config.vocab_size, self.position + 1)
        cache = reference.KVCache.allocate(weights.config, self.position + 1, dtype, "cpu")
        if self.position:
            reference.forward(weights, ids[:-1], cache, 0)
        return plan, weights, cache, ids


SEQUENTIAL = {"use_parallel_residual": False}
WIDE = {"hidden_size": 320, "intermediate_size": 1280, "num_hidden_layers": 3, "hidden_act": "gelu_fast"}
CASES = {
    "parallel": Case(),
    "sequential": Case(SEQUENTIAL),
    "no biases": Case({"attention_bias": False}),
    "all of a head rotates": Case({"rotary_pct": 1.0}),
    "nothing rotates": Case(SEQUENTIAL | {"rotary_pct": 0.0}),
    "head_dim 80, lanes that take two vectors": Case(WIDE | {"rotary_pct": 0.25}),
    "sequential head_dim 80": Case(WIDE | SEQUENTIAL, ctas=14, position=101),
    "parallel head_dim 80": Case(WIDE, ctas=14, position=101),
    "one CTA a head": Case(ctas=6, position=101),
    "one cluster a head, CTAs without a head": Case(ctas=10),
    "h in two groups": Case(SEQUENTIAL | {"intermediate_size": 1024}, ctas=12, plan=TILE_A_STAGE),
    "h in three groups": Case(SEQUENTIAL | {"intermediate_size": 1536}, position=101, plan=TILE_A_STAGE),
    "h in four groups, a row or two a CTA": Case(
        SEQUENTIAL | {"intermediate_size": 2048, "num_hidden_layers": 3}, ctas=40, plan=TILE_A_STAGE
    ),
    "h in two groups of two tiles": Case(
        SEQUENTIAL | {"intermediate_size": 2048}, plan=TILE_A_STAGE | {"stage_tiles": 2, "warps": 4}
    ),
    "heads in four groups": Case(SEQUENTIAL, position=101, plan={"head_groups": 4}),
    "heads in one group": Case(SEQUENTIAL, position=101, plan={"head_groups": 1}),
    "rows of down in three parts, sequential": Case(SEQUENTIAL | {"intermediate_size": 1040}, ctas=12),
    "rows of down in three parts": Case({"intermediate_size": 1040}, ctas=12),
    "a row or two a CTA": Case(SEQUENTIAL | {"num_hidden_layers": 3}, ctas=40, position=101),
    "a row or two a CTA, parallel": Case({"num_hidden_layers": 3}, ctas=40, position=101),
    "several tiles a warp": Case(
        {"hidden_size": 128},
        ctas=8,
        position=101,
        plan={"tile_tokens": 8, "warps": 2, "stages": 4, "window_stages": 2, "early_stages": 1, "stage_tiles": 1},
    ),
    "several clusters with cached tokens": Case(
        position=101,
        plan={"tile_tokens": 8, "warps": 2, "stages": 4, "window_stages": 2, "early_stages": 1, "stage_tiles": 1},
    ),
    "cached tokens ahead of down": Case(position=101, plan={"fifths_before_cached": 0}),
    "cached tokens behind down": Case(position=101, plan={"fifths_before_cached": 5}),
    "nothing cached": Case(position=0),
    "one token cached": Case(position=1),
}


def model_of(order: Order) -> dict[str, Any]:
    return {"num_hidden_layers": 3, "use_parallel_residual": order != "sequential"}


IN_ORDERS = {f"{name}, {order}": (case, order) for name, case in CASES.items() for order in case.orders}
ONE_OF_EACH = [(CASES["parallel"], "up_first"), (CASES["parallel"], "qkv_first"), (CASES["sequential"], "sequential")]


def test_the_cases_have_every_order_both_deals_of_up_and_groups() -> None:
    seen, groups, of_heads = set(), collections.defaultdict(set), collections.defaultdict(set)
    for case, order in IN_ORDERS.values():
        plan, *_ = case.build(order)
        up = plan.config.intermediate_size
        as_the_rest = all(sum(map(len, plan.up_groups(cta))) == len(plan.rows(up, cta)) for cta in range(plan.ctas))
        seen.add((order, as_the_rest))
        groups[order].add(plan.hidden_groups)
        of_heads[order].add(plan.head_groups)
    assert seen == {(order, as_the_rest) for order in ORDERS for as_the_rest in (True, False)}
    assert groups == {"up_first": {1}, "qkv_first": {1}, "sequential": {1, 2, 3, 4}}
    assert of_heads == {"up_first": {1}, "qkv_first": {1}, "sequential": {1, 2, 4}}


@pytest.mark.parametrize(("case", "order"), IN_ORDERS.values(), ids=IN_ORDERS)
def test_the_schedule_computes_the_model(case: Case, order: Order) -> None:
    plan, weights, cache, ids = case.build(order)
    check_step(plan)
    check_computes(StepInterpreter(plan, weights, cache, int(ids[-1]), case.position), ids, cache)


@pytest.mark.parametrize("case", [case for case in CASES.values() if len(case.orders) > 1])
def test_the_order_of_the_matrices_changes_no_bit(case: Case) -> None:
    """With the same clusters at work on the cached tokens: how many they are depends on it."""
    plans = [case.build(order)[0] for order in case.orders]
    if len({plan.active_splits(case.position) for plan in plans}) > 1:
        case = dataclasses.replace(case, position=plans[0].tile_tokens)  # one tile, one cluster
        assert {plan.active_splits(case.position) for plan in plans} == {plans[0].merged_ctas}
    seen = []
    for order in case.orders:
        plan, weights, cache, ids = case.build(order)
        interpreter = StepInterpreter(plan, weights, cache, int(ids[-1]), case.position)
        seen.append((*interpreter.run(seed=0), interpreter.new_keys, interpreter.new_values))
    first, *others = seen
    for other in others:
        assert all(np.array_equal(mine, theirs) for mine, theirs in zip(other, first, strict=True))


@pytest.mark.parametrize(
    ("case", "order"),
    [
        (CASES["parallel"], "up_first"),
        (CASES["parallel head_dim 80"], "qkv_first"),
        (CASES["sequential head_dim 80"], "sequential"),
    ],
    ids=ORDERS,
)
def test_the_schedule_computes_the_model_in_float64(case: Case, order: Order) -> None:
    plan, weights, cache, ids = case.build(order, torch.float64)
    logits, _ = StepInterpreter(plan, weights, cache, int(ids[-1]), case.position, dtype=np.float64).run(seed=0)
    assert relative_error(torch.from_numpy(logits), reference.forward(weights, ids[-1:], cache, case.position)) < 1e-12


@pytest.mark.parametrize("order", ORDERS)
def test_one_buffer_of_x_would_do(order: Order, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everyone has arrived for h, and so read x, before anyone writes the next one."""
    plan, weights, cache, ids = Case(model_of(order), ctas=40).build(order)
    logits, _ = StepInterpreter(plan, weights, cache, int(ids[-1]), 45).run(seed=0)
    monkeypatch.setattr(step, "X_BUFFERS", 1)
    check_step(plan)
    for seed in range(4):
        assert np.array_equal(StepInterpreter(plan, weights, cache, int(ids[-1]), 45).run(seed)[0], logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("case", "order"), ONE_OF_EACH, ids=ORDERS)
def test_sixteen_bit_weights_round_h_and_the_cache(case: Case, order: Order, dtype: torch.dtype) -> None:
    plan, weights, cache, ids = case.build(order, dtype)
    logits, _ = StepInterpreter(plan, weights, cache, int(ids[-1]), 45).run(seed=0)
    truth = reference.forward(weights, ids[-1:], cache, 45, dtype=torch.float64)
    assert relative_error(torch.from_numpy(logits), truth) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("order", ORDERS)
def test_a_missing_wait_shows_in_the_results(order: Order) -> None:
    """In one CTA alone: what it should have waited for is not there, in some order at least."""
    # Of few rows, one fifth would be none.
    case = Case(model_of(order) | {"intermediate_size": 1024}, ctas=10, plan=TILE_A_STAGE | {"fifths_before_cached": 2})
    plan, weights, cache, ids = case.build(order)
    assert plan.hidden_groups == (2 if order == "sequential" else 1)
    waits = {
        (action.kind, action.label)
        for role in ROLES
        for action in step.step_schedule(plan, 4, role, 45)
        if action.kind in ("wait", "await")
    }
    # Which say what others have said, but for the last: that shows in one order of a hundred.
    waits -= {("await", name) for name in ("expanded", "expanded 1", "projected", "projected 1")}
    if order == "sequential":
        assert {("wait", "middle"), ("await", "middle_normed"), ("await", "down_sums")} <= waits
        assert {("wait", "hidden"), ("wait", "hidden 1"), ("await", "hidden"), ("await", "hidden 1")} <= waits
        assert {("wait", "attention"), ("wait", "attention 1"), ("await", "attended 1")} <= waits
    assert len(waits) == (18 if order == "sequential" else 11)
    for each in sorted(waits):

        def schedule(
            plan: BlockPlan, cta: int, role: Role, position: int, each: tuple[str, str] = each
        ) -> Iterator[Action]:
            actions = step.step_schedule(plan, cta, role, position)
            return (a for a in actions if cta != 4 or (a.kind, a.label) != each)

        interpreter = StepInterpreter(plan, weights, cache, int(ids[-1]), case.position, schedule=schedule)
        assert any(_goes_wrong(interpreter, seed) for seed in range(20)), each


def _goes_wrong(interpreter: StepInterpreter, seed: int) -> bool:
    """NaN, or a CTA that missed a round and waits for ever."""
    try:
        return bool(np.isnan(interpreter.run(seed)[0]).any())
    except AssertionError:
        return True


@pytest.mark.parametrize("order", ORDERS)
def test_a_missing_arrival_is_a_deadlock(order: Order) -> None:
    plan, weights, cache, ids = Case(model_of(order), ctas=10).build(order)

    def schedule(plan: BlockPlan, cta: int, role: Role, position: int) -> Iterator[Action]:
        actions = step.step_schedule(plan, cta, role, position)
        return (a for a in actions if cta != 4 or (a.kind, a.name) != ("arrive", "hidden"))

    with pytest.raises(AssertionError, match="deadlock"):
        StepInterpreter(plan, weights, cache, int(ids[-1]), 45, schedule=schedule).run(seed=0)
