"""The schedule of the whole step: sound for every GPT-NeoX shape and device class; the check that says so can tell when it is
not; and followed on the CPU, it computes the model, with the same bits in every order."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plan.step_interpreter import StepInterpreter
from tiny_models import random_token_ids, relative_error, tiny_gpt_neox, weights_of
from torch import Tensor

from clusterfusion import reference
from clusterfusion.architecture import DecoderConfig
from clusterfusion.errors import UnsupportedModelError
from clusterfusion.named_shapes import NAMED_SHAPES, named_shape
from clusterfusion.plan import (
    B200,
    H200,
    RTX_5090,
    BlockPlan,
    PlanLimits,
    balance,
    check_plan,
    check_step,
    plan_block,
    step,
)
from clusterfusion.plan.block import ROLES, Role
from clusterfusion.plan.step import Action
from clusterfusion.plan.step_check import _check_waits, buffers_needed, prove, run_step
from clusterfusion.weights import DecoderWeights

GPT_NEOX = [name for name in NAMED_SHAPES if named_shape(name).family == "gpt_neox"]
DEVICES = {limits.name: limits for limits in (H200, B200, RTX_5090)}


def plan_or_skip(name: str, limits: PlanLimits) -> BlockPlan:
    try:
        return plan_block(named_shape(name), limits)
    except UnsupportedModelError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("limits", DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize("name", GPT_NEOX)
def test_every_named_shape_has_a_sound_step(name: str, limits: PlanLimits) -> None:
    check_step(plan_or_skip(name, limits))


@pytest.mark.parametrize("limits", DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize("name", GPT_NEOX)
def test_bytes_are_dealt_evenly(name: str, limits: PlanLimits) -> None:
    plan = plan_or_skip(name, limits)
    c = plan.config
    rows = {
        "qkv": 3 * c.hidden_size,
        "up": c.intermediate_size,
        "o": c.hidden_size,
        "down": c.hidden_size,
        "lm_head": c.vocab_size,
    }
    share = balance(plan)
    for matrix, total in rows.items():
        even = total % plan.ctas == 0
        assert 1 <= share[matrix] <= (1.01 if even else -(-total // plan.ctas) * plan.ctas / total + 1e-9), matrix
    assert share["kv"] == 1, "nothing is cached"
    worst = {"H200": 1.036, "B200": 1.054, "RTX 5090": 1.1}[limits.name]
    assert 1 <= share["step"] <= worst


def test_balance_of_cached_tokens() -> None:
    plan = plan_block(named_shape("pythia-2.8b"), H200)
    share = balance(plan, position=16 * plan.tile_tokens)
    assert share["kv"] == pytest.approx(132 / 128), "128 of 132 CTAs share the heads, evenly"
    assert balance(plan, position=1)["kv"] == pytest.approx(132 / 32), "one tile a head"


# -- the check sees faults ---------------------------------------------------------------------------------------------

Edit = Callable[[int, list[Action]], list[Action]]


def small_plan(parallel: bool = True, hidden: int = 96, heads: int = 3, layers: int = 4, ctas: int = 12) -> BlockPlan:
    config = DecoderConfig.from_dict(
        {
            "model_type": "gpt_neox",
            "vocab_size": 99,
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "intermediate_size": 3 * hidden,
            "num_hidden_layers": layers,
            "max_position_embeddings": 2048,
            "use_parallel_residual": parallel,
        }
    )
    return plan_block(config, dataclasses.replace(H200, multiprocessors=ctas))


@pytest.fixture
def edited(monkeypatch: pytest.MonkeyPatch) -> Callable[[Edit], None]:
    """Puts an edit between the schedule and whoever asks for it."""
    original = step.step_schedule

    def use(edit: Edit) -> None:
        def schedule(plan: BlockPlan, cta: int, role: Role, position: int = 0) -> Iterator[Action]:
            yield from edit(cta, list(original(plan, cta, role, position)))

        monkeypatch.setattr(step, "step_schedule", schedule)

    return use


def kinds(plan: BlockPlan, kind: str) -> list[str]:
    roles = [(cta, role) for cta in range(plan.ctas) for role in ROLES]
    return sorted({a.name for cta, role in roles for a in step.step_schedule(plan, cta, role, 99) if a.kind == kind})


# Each wait, and what is found wrong in a run without it, other than that layers are not alike.
WAITS = {
    "attention": "partials of layer . is complete before its use",
    "exchange": "exchange of layer . is complete before its use",
    "hidden": "h of layer . is complete before its use",
    "middle": "x of layer . is complete before its use",
    "qkv": "qkv of layer . is complete before its use",
    "x": "x of layer . is complete before its use",
}
AWAITS = {
    "attended": "x1 of CTA .* holds",
    "down_sums": "down_sums of CTA .* holds|x[12] of CTA .* is not written over",
    # Counters say as much when all is well; these two matter to a CTA that has given up waiting for one.
    "expanded": "expanded of CTA .* is awaited in every layer",
    "projected": "projected of CTA .* is awaited in every layer",
    "hidden": "x2 of CTA .* holds",
    "middle_normed": "x2 of CTA .* holds",
    "normed": "x1 of CTA .* holds|1 buffers of h suffice",
    "output_sums": "o_sums of CTA .* holds",
}


@pytest.mark.parametrize("parallel", [True, False])
def test_the_check_sees_a_missing_wait(parallel: bool, edited: Callable[[Edit], None]) -> None:
    plan = small_plan(parallel)
    check_step(plan)
    for kind, complaints in (("wait", WAITS), ("await", AWAITS)):
        only_sequential = {"middle", "middle_normed", "output_sums"}
        names = kinds(plan, kind)
        assert set(names) == (complaints.keys() - only_sequential if parallel else complaints.keys())
        for name in names:
            edited(lambda cta, actions, each=(kind, name): [a for a in actions if (a.kind, a.name) != each])  # type: ignore[misc]
            with pytest.raises(AssertionError, match="step: "):
                check_step(plan)
            with pytest.raises(AssertionError, match=complaints[name]):
                prove(plan, 999)


@pytest.mark.parametrize("parallel", [True, False])
def test_the_check_sees_anything_else_missing(parallel: bool, edited: Callable[[Edit], None]) -> None:
    plan = small_plan(parallel)
    names = [(kind, name) for kind in ("arrive", "publish", "read", "signal") for name in kinds(plan, kind)]
    assert len(names) == (18 if parallel else 21)
    for each in names:
        edited(
            lambda cta, actions, each=each: [a for a in actions if cta not in (4, 5) or (a.kind, a.name) != each]  # type: ignore[misc]
        )
        with pytest.raises(AssertionError, match="step: "):
            check_step(plan)


def move(actions: list[Action], what: tuple[str, str], ahead_of: tuple[str, str]) -> list[Action]:
    """In every layer, puts the first action of the one kind and name before the last of the other ahead of it."""
    moved: list[Action] = []
    for action in actions:
        at = len(moved)
        if (action.kind, action.name) == what:
            at = max((i for i, a in enumerate(moved) if (a.kind, a.name) == ahead_of), default=at)
        moved.insert(at, action)
    return moved


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize(
    ("what", "ahead_of", "complaint"),
    [
        (("arrive", "hidden"), ("read", "up"), "h of layer 0 is complete before its use"),
        (("signal", "normed"), ("place", "normed"), "x1 of CTA .* holds"),
        (("signal", "down_sums"), ("read", "down"), "down_sums of CTA .* holds|x[12] of CTA .* is not written over"),
        (("place", "normed"), ("await", "down_sums"), "."),
    ],
)
def test_the_check_sees_word_ahead_of_its_work(
    parallel: bool, what: tuple[str, str], ahead_of: tuple[str, str], complaint: str, edited: Callable[[Edit], None]
) -> None:
    """Which changes no count."""
    edited(lambda cta, actions: move(actions, what, ahead_of))
    with pytest.raises(AssertionError, match=complaint):
        prove(small_plan(parallel), 99)


def test_the_check_sees_a_circle_of_waits(edited: Callable[[Edit], None]) -> None:
    edited(lambda cta, actions: move(actions, ("await", "hidden"), ("read", "up")))
    with pytest.raises(AssertionError, match="no deadlock"):
        run_step(small_plan(), 99)


def test_the_check_sees_a_count_reached_by_the_next_layer(edited: Callable[[Edit], None]) -> None:
    """With nothing but its own CTA to wait for, a fast CTA's arrival of layer 1 could stand in for a slow one's of layer 0,
    though in an even run every count would be right."""
    edited(lambda cta, actions: [a for a in actions if a.kind != "wait" or a.name == "exchange"])
    with pytest.raises(AssertionError, match="arrivals at .* of layer 1 come after all of layer 0"):
        _check_waits(run_step(small_plan(), 99))


@pytest.mark.parametrize("parallel", [True, False])
def test_one_buffer_of_everything_suffices(parallel: bool) -> None:
    """Everyone has read the residual stream before anyone's next wait of a layer is over."""
    needed = buffers_needed(run_step(small_plan(parallel), 99))
    assert needed == {"x": 1, "qkv": 1, "exchange": 1, "partials": 1, "h": 1}


def test_the_check_sees_a_producer_with_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    original = step.producer_order

    def swapped(plan: BlockPlan, cta: int) -> Iterator[step.Tile]:
        order = list(original(plan, cta))
        if cta == 3:
            order[5], order[6] = order[6], order[5]
        yield from order

    monkeypatch.setattr(step, "producer_order", swapped)
    with pytest.raises(AssertionError, match="CTA 3: the producer brings what is taken next"):
        check_step(small_plan())


def test_a_ring_of_one_stage_makes_progress_too() -> None:
    run_step(dataclasses.replace(small_plan(), stages=1), 999)


@given(
    heads=st.integers(1, 40),
    eighths=st.integers(1, 16),
    intermediate=st.integers(1, 300),
    vocab=st.integers(1, 400),
    layers=st.integers(1, 5),
    parallel=st.booleans(),
    multiprocessors=st.integers(2, 60),
)
@settings(max_examples=40, deadline=None)
def test_any_shape_that_has_a_plan_has_a_sound_step(
    heads: int, eighths: int, intermediate: int, vocab: int, layers: int, parallel: bool, multiprocessors: int
) -> None:
    config = DecoderConfig.from_dict(
        {
            "model_type": "gpt_neox",
            "vocab_size": vocab,
            "hidden_size": heads * eighths * 8,
            "num_attention_heads": heads,
            "intermediate_size": intermediate * 8,
            "num_hidden_layers": layers,
            "max_position_embeddings": 640,
            "use_parallel_residual": parallel,
        }
    )
    try:
        plan = plan_block(config, dataclasses.replace(H200, multiprocessors=multiprocessors))
    except UnsupportedModelError:
        return
    check_step(plan)


# -- the schedule, followed --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """A tiny model, a device and where the step stands. `plan` changes what plan_block chose."""

    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    ctas: int = 16
    position: int = 45
    plan: dict[str, int] = dataclasses.field(default_factory=dict)

    def build(self, dtype: torch.dtype = torch.float32) -> tuple[BlockPlan, DecoderWeights, reference.KVCache, Tensor]:
        """The plan, the weights, a cache of `position` tokens, and the ids, the new one last."""
        weights = weights_of(tiny_gpt_neox(**self.model).to(dtype))
        plan = plan_block(weights.config, dataclasses.replace(H200, multiprocessors=self.ctas))
        plan = dataclasses.replace(plan, **self.plan)
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
    "one CTA a head": Case(ctas=6, position=101),
    "one cluster a head, CTAs without a head": Case(ctas=10),
    "rows of down in three parts": Case({"intermediate_size": 1040}, ctas=12),
    "a row or two a CTA": Case(SEQUENTIAL | {"num_hidden_layers": 3}, ctas=40, position=101),
    "a row or two a CTA, parallel": Case({"num_hidden_layers": 3}, ctas=40, position=101),
    "several tiles a warp": Case(
        {"hidden_size": 128}, ctas=8, position=101, plan={"tile_tokens": 8, "vector_warps": 2, "cache_stages": 4}
    ),
    "nothing cached": Case(position=0),
    "one token cached": Case(position=1),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_schedule_computes_the_model(case: Case) -> None:
    plan, weights, cache, ids = case.build()
    check_step(plan)
    interpreter = StepInterpreter(plan, weights, cache, int(ids[-1]), case.position)
    logits, token = interpreter.run(seed=0)
    wanted = reference.forward(weights, ids[-1:], cache, case.position)
    assert relative_error(torch.from_numpy(logits), wanted) < 1e-5
    assert token == int(wanted.argmax())
    for new, cached in ((interpreter.new_keys, cache.k), (interpreter.new_values, cache.v)):
        assert relative_error(torch.from_numpy(new), cached[:, :, case.position]) < 1e-5
    for seed in range(1, 4):
        again, token_again = interpreter.run(seed)
        assert np.array_equal(again, logits) and token_again == token, f"other bits in another order, {seed}"


@pytest.mark.parametrize("case", [CASES["parallel"], CASES["sequential head_dim 80"]], ids=["parallel", "sequential"])
def test_the_schedule_computes_the_model_in_float64(case: Case) -> None:
    plan, weights, cache, ids = case.build(torch.float64)
    logits, _ = StepInterpreter(plan, weights, cache, int(ids[-1]), case.position, dtype=np.float64).run(seed=0)
    assert relative_error(torch.from_numpy(logits), reference.forward(weights, ids[-1:], cache, case.position)) < 1e-12


@pytest.mark.parametrize("model", [{}, SEQUENTIAL], ids=["parallel", "sequential"])
def test_one_buffer_of_x_would_do(model: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Everyone has arrived for h, and so read x, before anyone writes the next one."""
    plan, weights, cache, ids = Case(model | {"num_hidden_layers": 3}, ctas=40).build()
    logits, _ = StepInterpreter(plan, weights, cache, int(ids[-1]), 45).run(seed=0)
    monkeypatch.setattr(step, "X_BUFFERS", 1)
    check_step(plan)
    for seed in range(4):
        assert np.array_equal(StepInterpreter(plan, weights, cache, int(ids[-1]), 45).run(seed)[0], logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_weights_round_h_and_the_cache(dtype: torch.dtype) -> None:
    plan, weights, cache, ids = CASES["parallel"].build(dtype)
    logits, _ = StepInterpreter(plan, weights, cache, int(ids[-1]), 45).run(seed=0)
    truth = reference.forward(weights, ids[-1:], cache, 45, dtype=torch.float64)
    assert relative_error(torch.from_numpy(logits), truth) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("parallel", [True, False])
def test_a_missing_wait_shows_in_the_results(parallel: bool) -> None:
    """In one CTA alone: what it should have waited for is not there, in some order at least."""
    case = Case({"use_parallel_residual": parallel, "num_hidden_layers": 3}, ctas=10)
    plan, weights, cache, ids = case.build()
    awaits = [name for name in kinds(plan, "await") if name not in ("expanded", "projected")]
    for each in [*(("wait", name) for name in kinds(plan, "wait")), *(("await", name) for name in awaits)]:

        def schedule(
            plan: BlockPlan, cta: int, role: Role, position: int, each: tuple[str, str] = each
        ) -> Iterator[Action]:
            actions = step.step_schedule(plan, cta, role, position)
            return (a for a in actions if cta != 4 or (a.kind, a.name) != each)

        interpreter = StepInterpreter(plan, weights, cache, int(ids[-1]), case.position, schedule=schedule)
        assert any(_goes_wrong(interpreter, seed) for seed in range(20)), each


def _goes_wrong(interpreter: StepInterpreter, seed: int) -> bool:
    """NaN, or a CTA that missed a round and waits for ever."""
    try:
        return bool(np.isnan(interpreter.run(seed)[0]).any())
    except AssertionError:
        return True


def test_a_missing_arrival_is_a_deadlock() -> None:
    plan, weights, cache, ids = Case(ctas=10).build()

    def schedule(plan: BlockPlan, cta: int, role: Role, position: int) -> Iterator[Action]:
        actions = step.step_schedule(plan, cta, role, position)
        return (a for a in actions if cta != 4 or (a.kind, a.name) != ("arrive", "hidden"))

    with pytest.raises(AssertionError, match="deadlock"):
        StepInterpreter(plan, weights, cache, int(ids[-1]), 45, schedule=schedule).run(seed=0)
