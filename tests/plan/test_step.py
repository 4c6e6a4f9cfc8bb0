"""The schedule of the whole step: sound for every GPT-NeoX shape and device class, and the check that says so can tell when it
is not. test_step_followed.py follows it."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan.orders import ORDERS, Edit, in_order, move

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
    check_step,
    plan_block,
    step,
)
from clusterfusion.plan.block import MATRICES, ROLES, Order
from clusterfusion.plan.step import Action
from clusterfusion.plan.step_check import _check_shared, _check_waits, buffers_needed, prove, run_step

GPT_NEOX = [name for name in NAMED_SHAPES if named_shape(name).family == "gpt_neox"]
DEVICES = {limits.name: limits for limits in (H200, B200, RTX_5090)}
UNEVENED = {"pythia-14m", "pythia-31m"}  # too few rows of up a CTA (test_block.py)


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
    rows = {"qkv": 3 * c.hidden_size, "o": c.hidden_size, "down": c.hidden_size, "lm_head": c.vocab_size}
    if name in UNEVENED:
        rows["up"] = c.intermediate_size
    share = balance(plan)
    for matrix, total in rows.items():
        even = total % plan.ctas == 0
        assert 1 <= share[matrix] <= (1 if even else -(-total // plan.ctas) * plan.ctas / total + 1e-9), matrix
    assert share["kv"] == 1, "nothing is cached"
    if name in UNEVENED:
        worst = {"H200": 1.0102, "B200": 1.0293, "RTX 5090": 1.0586}[limits.name]
    else:
        # Of a layer, and of the LM head, less than a row more than the mean.
        mean = (c.num_layers * layer_elements(plan) + c.vocab_size * c.hidden_size) / plan.ctas
        assert share["step"] < 1 + (c.num_layers + 1) * c.hidden_size / mean
        worst = 1.0103
    assert 1 <= share["step"] <= worst


def layer_elements(plan: BlockPlan) -> int:
    hidden, up = plan.config.hidden_size, plan.config.intermediate_size
    return 4 * hidden * hidden + 2 * up * hidden


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["pythia-31m", "pythia-160m", "pythia-2.8b", "pythia-12b"])
def test_the_balance_is_that_of_the_schedule(name: str, order: Order) -> None:
    """What CTAs read by their schedules, all matrices and cached tokens, in every layer; and the even layer of each of them."""
    plan = in_order(plan_block(named_shape(name), H200), order)
    position, layers = 100, plan.config.num_layers
    read = [dict.fromkeys((*MATRICES[order], "kv", "lm_head"), 0) for _ in range(plan.ctas)]
    for cta, mine in enumerate(read):
        for role in ROLES:
            for action in step.step_schedule(plan, cta, role, position):
                if action.kind == "read":
                    cached = plan.tile_tokens * 2 * plan.config.head_dim
                    elements = cached if action.name == "kv" else step.columns(plan, action.name)
                    if action.name == "down":  # a part of each row
                        elements = len(plan.hidden_group(action.group))
                    mine[action.name] += len(action.rows) * elements
        layer = sum(mine[name] for name in MATRICES[order])
        off = abs(layer - layers * layer_elements(plan) / plan.ctas)
        if name not in UNEVENED:
            assert off < layers * plan.config.hidden_size, cta
        streamed = sum(tile.bytes for tile in step.producer_order(plan, cta, position))
        assert streamed == (layer + mine["kv"] + mine["lm_head"]) * step.ELEMENT_BYTES
    wanted = {name: max(mine[name] for mine in read) * plan.ctas / sum(mine[name] for mine in read) for name in read[0]}
    totals = [sum(mine.values()) for mine in read]
    assert balance(plan, position) == pytest.approx(wanted | {"step": max(totals) * plan.ctas / sum(totals)})


def test_balance_of_cached_tokens() -> None:
    plan = plan_block(named_shape("pythia-2.8b"), H200)
    share = balance(plan, position=16 * plan.tile_tokens)
    assert share["kv"] == pytest.approx(132 / 128), "128 of 132 CTAs share the heads, evenly"
    assert balance(plan, position=1)["kv"] == pytest.approx(132 / 32), "one tile a head"


# -- the check sees faults ---------------------------------------------------------------------------------------------


def small_plan(
    order: Order = "up_first", hidden: int = 96, heads: int = 3, layers: int = 4, ctas: int = 12
) -> BlockPlan:
    config = DecoderConfig.from_dict(
        {
            "model_type": "gpt_neox",
            "vocab_size": 99,
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "intermediate_size": 3 * hidden,
            "num_hidden_layers": layers,
            "max_position_embeddings": 2048,
        }
    )
    return in_order(plan_block(config, dataclasses.replace(H200, multiprocessors=ctas)), order)


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
# Of signals, likewise.
AWAITS = {
    "attended": r"x1 of CTA .* holds \('attended', 0\)",
    # Counters say as much when all is well; these two matter to a CTA that has given up waiting for one.
    "expanded": "expanded of CTA .* is awaited in every layer",
    "queries": r"queries of CTA .* holds \('queries', 0\)",
    "slots": r"slots of CTA .* holds \('kv', 0\)",
    "projected": "projected of CTA .* is awaited in every layer",
    "hidden": r"x2 of CTA .* holds \('hidden', 0\)",
    "normed": r"x1 of CTA .* holds \('normed', 0\)",
    # With parallel residual it says that o and down are summed, and that both have done with their vectors.
    "output_sums": r"x1 of CTA .* is not written over while \('attended', 0\) is read",
}
AWAITS_OF: dict[Order, dict[str, str]] = {
    "up_first": AWAITS,
    "qkv_first": AWAITS | {"normed": "1 buffers of h suffice"},
    "sequential": AWAITS
    | {
        "output_sums": r"o_sums of CTA .* holds \('o', 0\)|x1 of CTA .* is not written over while \('attended', 0\)",
        "slots": r"x2.* of CTA .* holds \('kv', 0\)",  # where h will be
        "middle_normed": r"x1 of CTA .* holds \('middle_normed', 0\)",
        "down_sums": r"down_sums of CTA .* holds \('down', 0\)",
    },
}


@pytest.mark.parametrize("order", ORDERS)
def test_the_check_sees_a_missing_wait(order: Order, edited: Callable[[Edit], None]) -> None:
    plan = small_plan(order)
    check_step(plan)
    for kind, complaints in (("wait", WAITS), ("await", AWAITS_OF[order])):
        names = kinds(plan, kind)
        assert set(names) == complaints.keys() - ({"middle"} if order != "sequential" else set())
        for name in names:
            edited(lambda cta, actions, each=(kind, name): [a for a in actions if (a.kind, a.name) != each])  # type: ignore[misc]
            with pytest.raises(AssertionError, match="step: "):
                check_step(plan)
            with pytest.raises(AssertionError, match=complaints[name]):
                prove(plan, 999)
        edited(lambda cta, actions: actions)


@pytest.mark.parametrize("order", ORDERS)
def test_the_check_sees_anything_else_missing(order: Order, edited: Callable[[Edit], None]) -> None:
    plan = small_plan(order)
    names = [(kind, name) for kind in ("arrive", "publish", "read", "signal") for name in kinds(plan, kind)]
    assert len(names) == (23 if order == "sequential" else 20)
    assert {name for kind, name in names if kind == "signal"} == AWAITS_OF[order].keys()
    for each in names:
        edited(
            lambda cta, actions, each=each: [a for a in actions if cta not in (4, 5) or (a.kind, a.name) != each]  # type: ignore[misc]
        )
        with pytest.raises(AssertionError, match="step: "):
            check_step(plan)


IN_ANY_ORDER = [
    (("arrive", "hidden"), ("read", "up"), "h of layer 0 is complete before its use"),
    (("arrive", "attention"), ("wait", "exchange"), "exchange of layer 0 is complete before its use"),
    (("signal", "normed"), ("place", "normed"), r"x1 of CTA .* holds \('normed', 0\)"),
    (("signal", "attended"), ("place", "attended"), r"x1 of CTA .* holds \('attended', 0\)"),
    (("signal", "hidden"), ("place", "hidden"), r"x2 of CTA .* holds \('hidden', 0\)"),
]
# Cached tokens may come between two parts of down, of which the first is there.
DOWN_IS_NOT_ALL_THERE = r"(holds \('down', 0\)|is not written over while \('down', 0\) is read)"
# One signal for the sums of o and of down.
IF_PARALLEL = [
    (("signal", "output_sums"), ("read", "o"), r"x1 of CTA .* is not written over while \('attended', 0\) is read"),
    (("signal", "output_sums"), ("read", "down"), r"x1 of CTA .* is not written over while \('attended', 0\) is read"),
    (("publish", "x"), ("await", "output_sums"), "down_sums of CTA .* " + DOWN_IS_NOT_ALL_THERE),
    (
        ("place", "normed"),
        ("await", "output_sums"),
        r"x1 of CTA .* is not written over while \('attended', 0\) is read",
    ),
]
IF_SEQUENTIAL = [
    (
        ("signal", "output_sums"),
        ("read", "o"),
        r"o_sums of CTA .* holds \('o', 0\)|x1 of CTA .* is not written over while \('attended', 0\) is read",
    ),
    (("signal", "middle_normed"), ("place", "middle_normed"), r"x1 of CTA .* holds \('middle_normed', 0\)"),
    (("signal", "down_sums"), ("read", "down"), r"down_sums of CTA .* holds \('down', 0\)"),
    (("publish", "x"), ("await", "down_sums"), r"down_sums of CTA .* holds \('down', 0\)"),
    (("place", "normed"), ("await", "down_sums"), r"biases of CTA .* holds \('biases', 0\)"),
]


@pytest.mark.parametrize(
    ("order", "what", "ahead_of", "complaint"),
    [
        (order, *each)
        for order in ORDERS
        for each in (*IN_ANY_ORDER, *(IF_SEQUENTIAL if order == "sequential" else IF_PARALLEL))
    ],
)
def test_the_check_sees_word_ahead_of_its_work(
    order: Order, what: tuple[str, str], ahead_of: tuple[str, str], complaint: str, edited: Callable[[Edit], None]
) -> None:
    """Which changes no count."""
    edited(lambda cta, actions: move(actions, what, ahead_of))
    with pytest.raises(AssertionError, match=complaint):
        prove(small_plan(order), 99)


def faults_of_places(plan: BlockPlan) -> dict[str, str]:
    """What is found wrong with a place in the CTAs' shared memory, looking at that place alone. Nothing is cached."""
    run = run_step(plan, 0)
    faults = {}
    for place in ("x1", "x2", "o_sums", "down_sums"):
        alone = {key: accesses for key, accesses in run.shared.items() if key[1] == place}
        assert len(alone) == plan.ctas
        try:
            _check_shared(dataclasses.replace(run, shared=alone))
        except AssertionError as error:
            said = re.fullmatch(rf"step: {place} of CTA \d+ (.+?): .*", str(error))
            faults[place] = said[1] if said else str(error)
    return faults


@pytest.mark.parametrize("order", ["up_first", "qkv_first"])
def test_one_signal_is_for_the_sums_of_o_and_of_down(
    order: Order, edited: Callable[[Edit], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = small_plan(order)
    down_early = "is not written over while ('down', 0) is read" if order == "up_first" else "holds ('down', 0)"
    assert not faults_of_places(plan)
    edited(lambda cta, actions: [a for a in actions if (a.kind, a.name) != ("await", "output_sums")])
    assert faults_of_places(plan) == {
        "x1": "is not written over while ('attended', 0) is read",
        "x2": "is not written over while ('hidden', 0) is read",
        "o_sums": "holds ('o', 0)",
        "down_sums": down_early,
    }

    def o_before_down(cta: int, actions: list[Action]) -> list[Action]:
        cached = (("await", "queries"), ("read", "kv"), ("signal", "slots")) if order == "up_first" else ()
        for of in (*cached, ("await", "attended"), ("read", "o"), ("signal", "output_sums")):
            actions = move(actions, of, ("await", "hidden"))
        return actions

    # Were down the last one, a signal behind o would not do.
    edited(o_before_down)
    monkeypatch.setitem(MATRICES, order, (*MATRICES[order][:2], "o", "down"))
    assert faults_of_places(plan) == {
        "x2": "is not written over while ('hidden', 0) is read",
        "down_sums": "holds ('down', 0)",
    }


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("what", "ahead_of"), [("hidden", "up"), ("attended", "qkv")])
def test_the_check_sees_a_circle_of_waits(
    order: Order, what: str, ahead_of: str, edited: Callable[[Edit], None]
) -> None:
    edited(lambda cta, actions: move(actions, ("await", what), ("read", ahead_of)))
    with pytest.raises(AssertionError, match="no deadlock"):
        run_step(small_plan(order), 99)


@pytest.mark.parametrize("order", ORDERS)
def test_the_check_sees_a_count_reached_by_the_next_layer(order: Order, edited: Callable[[Edit], None]) -> None:
    """With nothing but its own CTA to wait for, a fast CTA's arrival of layer 1 could stand in for a slow one's of layer 0,
    though in an even run every count would be right."""
    edited(lambda cta, actions: [a for a in actions if a.kind != "wait" or a.name == "exchange"])
    with pytest.raises(AssertionError, match="arrivals at .* of layer 1 come after all of layer 0"):
        _check_waits(run_step(small_plan(order), 99))


@pytest.mark.parametrize("order", ORDERS)
def test_the_check_sees_a_step_that_goes_on_after_its_end(order: Order, edited: Callable[[Edit], None]) -> None:
    """In a launch of several steps whoever knows the choice of the token takes all CTAs to have done with the step."""
    complaint = "CTA .* arrives for the choice of the token at its end"
    plan = small_plan(order)
    last = Action("load", "x", plan.config.num_layers)
    for edit in (
        lambda cta, actions: move(actions, ("arrive", "token"), ("read", "lm_head")),
        lambda cta, actions: [*actions, last] if cta == 5 and actions[-1].kind == "signal" else actions,
    ):
        edited(edit)
        with pytest.raises(AssertionError, match=complaint):
            prove(plan, 99)
    edited(lambda cta, actions: [a for a in actions if cta != 5 or a.name != "token"])
    with pytest.raises(AssertionError, match="every CTA arrives for the choice of the token"):
        prove(plan, 99)


@pytest.mark.parametrize("order", ORDERS)
def test_one_buffer_of_everything_suffices(order: Order) -> None:
    """Everyone has read the residual stream before anyone's next wait of a layer is over."""
    needed = buffers_needed(run_step(small_plan(order), 99))
    assert needed == {"x": 1, "qkv": 1, "exchange": 1, "partials": 1, "h": 1}


@pytest.mark.parametrize("order", ORDERS)
def test_the_producer_brings_the_matrices_in_order(order: Order) -> None:
    plan = small_plan(order, layers=2)
    for cta in range(plan.ctas):
        tiles = [(tile.layer, tile.name) for tile in step.producer_order(plan, cta)]
        assert list(dict.fromkeys(tiles)) == [(i, name) for i in range(2) for name in MATRICES[order]] + [
            (2, "lm_head")
        ]


@pytest.mark.parametrize(("order", "other"), list(itertools.permutations(ORDERS, 2)))
def test_the_check_sees_a_producer_with_the_order_of_other_plans(
    order: Order, other: Order, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = step.producer_order
    monkeypatch.setattr(step, "producer_order", lambda plan, *of: original(in_order(plan, other), *of))
    with pytest.raises(AssertionError, match="CTA .*: the producer brings what is taken next"):
        check_step(small_plan(order))


def test_the_check_sees_a_producer_with_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    original = step.producer_order

    def swapped(plan: BlockPlan, cta: int, position: int) -> Iterator[step.Stage]:
        order = list(original(plan, cta, position))
        if cta == 3:
            order[5], order[6] = order[6], order[5]
        yield from order

    monkeypatch.setattr(step, "producer_order", swapped)
    with pytest.raises(AssertionError, match="CTA 3: the producer brings what is taken next"):
        check_step(small_plan())


@pytest.mark.parametrize("order", ORDERS)
def test_a_ring_of_one_stage_makes_progress_too(order: Order) -> None:
    run_step(dataclasses.replace(small_plan(order), stages=1), 999)


@given(
    heads=st.integers(1, 40),
    eighths=st.integers(1, 16),
    intermediate=st.integers(1, 300),
    vocab=st.integers(1, 400),
    layers=st.integers(1, 5),
    order=st.sampled_from(ORDERS),
    multiprocessors=st.integers(2, 60),
)
@settings(max_examples=40, deadline=None)
def test_any_shape_that_has_a_plan_has_a_sound_step(
    heads: int, eighths: int, intermediate: int, vocab: int, layers: int, order: Order, multiprocessors: int
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
            "use_parallel_residual": order != "sequential",
        }
    )
    try:
        plan = plan_block(config, dataclasses.replace(H200, multiprocessors=multiprocessors))
    except UnsupportedModelError:
        return
    check_step(in_order(plan, order))
