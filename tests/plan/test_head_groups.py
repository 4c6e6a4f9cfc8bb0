"""With sequential residual K/V heads come in groups, one after another: how many, whose rows, and that the checks see what is missing of one
of them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan.orders import Edit, in_head_groups, move

from clusterfusion.architecture import DecoderConfig
from clusterfusion.named_shapes import named_shape
from clusterfusion.plan import H200, BlockPlan, balance, check_plan, check_step, plan_block, step
from clusterfusion.plan import block as planning
from clusterfusion.plan.block_check import ROLES, Role, of_group
from clusterfusion.plan.sizes import head_groups, qkv_rows
from clusterfusion.plan.step import Action
from clusterfusion.plan.step_check import buffers_needed, prove, run_step
from clusterfusion.plan.step_effects import shared

SHAPES = ["llama-3.1-8b", "llama-3.2-1b", "llama-2-7b"]


def small_plan(
    groups: int = 2, heads: int = 8, kv_heads: int = 4, ctas: int = 12, layers: int = 4, **changes: Any
) -> BlockPlan:
    config = DecoderConfig.from_dict(
        {
            "model_type": "llama",
            "vocab_size": 99,
            "hidden_size": 96,
            "head_dim": 16,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "intermediate_size": 288,
            "num_hidden_layers": layers,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
        }
    )
    config = dataclasses.replace(config, **changes)
    plan = in_head_groups(plan_block(config, dataclasses.replace(H200, multiprocessors=ctas)), groups)
    check_plan(plan)
    return plan


# -- how many, and whose rows --------------------------------------------------------------------------------------------


def test_heads_come_in_two_groups_where_nothing_hides_attention() -> None:
    names = dict.fromkeys([*SHAPES, "redpajama-incite-3b"], 2) | {"smollm-135m": 1, "pythia-2.8b": 1}
    assert {name: plan_block(named_shape(name), H200).head_groups for name in names} == names


@pytest.mark.parametrize(
    ("kv_heads", "tile_bytes", "groups"),
    [(32, 8192, 2), (31, 8192, 1), (30, 8192, 1), (34, 8192, 2), (32, 2048, 2), (34, 2048, 1)],
    ids=["as short as a part may be", "odd", "shorter", "longer", "a part as long as a tile", "longer than a tile"],
)
def test_when_heads_come_in_two_groups(kv_heads: int, tile_bytes: int, groups: int) -> None:
    """A part of a row of o has 64 bytes for each head of 64."""
    config = dataclasses.replace(named_shape("llama-3.2-1b"), num_heads=kv_heads, num_kv_heads=kv_heads)
    assert head_groups(config, tile_bytes) == groups


def test_the_check_sees_parts_of_another_group(monkeypatch: pytest.MonkeyPatch) -> None:
    original, plan = step.group_parts, small_plan()
    check_step(plan)

    def swapped(plan: BlockPlan, name: str, group: int) -> range:
        return original(plan, name, 1 - group if name == "o" else group)

    monkeypatch.setattr(step, "group_parts", swapped)
    with pytest.raises(AssertionError, match="step: what group 0 is multiplied by of a row of o"):
        check_step(plan)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("name", SHAPES)
def test_rows_of_q_k_and_v_are_dealt_group_by_group(name: str, groups: int) -> None:
    plan = in_head_groups(plan_block(named_shape(name), H200), groups)
    check_plan(plan)
    total = qkv_rows(plan.config)
    for group in range(groups):
        dealt = [row for cta in range(plan.ctas) for row in plan.qkv_groups(cta)[group]]
        assert dealt == list(plan.group_qkv(group)), "each row of a group once"
    for cta in range(plan.ctas):
        assert sum(map(len, plan.qkv_groups(cta))) == len(plan.rows(total, cta)), "as many as without groups"
        sizes = [len(rows) for rows in plan.qkv_groups(cta)]
        assert max(sizes) - min(sizes) <= 1
        if plan.attends(cta):
            of_group = plan.group_qkv(plan.head_group(cta))
            assert all(set(rows) <= set(of_group) for rows in plan.attended_rows(cta)), "a bundle is of one group"
    assert {plan.head_group(cta) for cta in range(plan.ctas) if plan.attends(cta)} == set(range(groups))


def test_rows_by_hand() -> None:
    """Of 256 rows in 2 groups, 12 CTAs."""
    plan = small_plan()
    assert plan.rows(256, 1) == range(21, 42)
    assert plan.qkv_groups(1) == (range(10, 21), range(128 + 11, 128 + 21))
    assert plan.qkv_groups(11) == (range(117, 128), range(128 + 117, 256))


@pytest.mark.parametrize("name", SHAPES)
def test_groups_change_no_ctas_bytes(name: str) -> None:
    plans = [in_head_groups(plan_block(named_shape(name), H200), groups) for groups in (1, 2, 4)]
    for cta in (0, 1, 77, 131):
        assert len({sum(stage.bytes for stage in step.producer_order(plan, cta, 99)) for plan in plans}) == 1
    shares = [balance(plan, 99) for plan in plans]
    assert shares[0] == shares[1] == shares[2]


def test_a_producer_brings_o_group_by_group() -> None:
    """Of LLaMA 8B two rows' parts a tile, one tile a stage."""
    plan = plan_block(named_shape("llama-3.1-8b"), H200)
    assert (plan.head_groups, plan.stage_tiles, step.rows_a_tile(plan, "o")) == (2, 1, 2)
    assert step.row_parts(plan, "o") == (2048, 2048)
    rows = plan.rows(4096, 5)
    assert len(rows) == 31
    brought = [stage for stage in step.producer_order(plan, 5) if (stage.layer, stage.name) == (1, "o")]
    wanted = [(group, row) for group in range(2) for row in range(rows.start, rows.stop, 2)]
    assert [(stage.part, stage.first) for stage in brought] == wanted
    assert [stage.bytes for stage in brought] == ([8192] * 15 + [4096]) * 2


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"head_groups": 3}, "head groups are alike: 3"),
        ({"head_groups": 0}, "a counter for each head group: 0"),
        ({"head_groups": 8}, "a counter for each head group: 8"),
        ({"tile_bytes": 3968}, "what a head group is for of a row of o fits a tile: 4096"),
    ],
)
def test_the_check_sees_head_groups_that_do_not_fit(change: dict[str, int], complaint: str) -> None:
    plan = plan_block(named_shape("llama-3.1-8b"), H200)
    with pytest.raises(AssertionError, match=complaint):
        check_plan(dataclasses.replace(plan, **change))


def test_the_check_sees_head_groups_with_parallel_residual() -> None:
    with pytest.raises(AssertionError, match="a counter for each head group: 2"):
        check_plan(dataclasses.replace(plan_block(named_shape("pythia-2.8b"), H200), head_groups=2))


# -- sound ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("name", SHAPES)
def test_the_steps_of_named_shapes_are_sound_in_any_groups(name: str, groups: int) -> None:
    """The planner's own, in two, are in test_llama.py."""
    plan = in_head_groups(plan_block(named_shape(name), H200), groups)
    check_plan(plan)
    check_step(plan)


@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "without a gate"])
@pytest.mark.parametrize("kv_heads", [4, 8], ids=["shared K/V heads", "a head a K/V head"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_steps_of_all_kinds_of_layers_are_sound(groups: int, kv_heads: int, gated: bool, norm: str) -> None:
    plan = small_plan(groups, kv_heads=kv_heads, ctas=20, gated_mlp=gated, norm=norm)
    check_step(plan)
    assert buffers_needed(run_step(plan, 999)) == dict.fromkeys(("x", "qkv", "exchange", "partials", "h"), 1)


@given(
    groups=st.integers(1, 4),
    kv_heads=st.integers(1, 4),
    shared=st.integers(1, 4),
    multiprocessors=st.integers(2, 60),
    layers=st.integers(1, 4),
)
@settings(max_examples=30, deadline=None)
def test_any_head_groups_are_sound(groups: int, kv_heads: int, shared: int, multiprocessors: int, layers: int) -> None:
    kv_heads *= groups
    ctas = max(multiprocessors, 2 * kv_heads * shared)
    check_step(small_plan(groups, kv_heads * shared, kv_heads, ctas, layers))


# -- the check of a step sees faults -------------------------------------------------------------------------------------

X1 = r"x1(?: \d)? of CTA .* "
EARLY = X1 + r"is not written over while \('normed', 0\) is read"
# Of a head group, what one role or the other does for it, and what is found wrong without it.
OF_A_GROUP = {
    ("wait", "attention"): r"partials of layer . is complete before its use",
    ("await", "attended"): r"x1 GROUP of CTA .* holds \('attended', 0\)",
    ("signal", "attended"): "no deadlock",
    ("signal", "projected"): "no deadlock",
    ("place", "attended"): r"x1 GROUP of CTA .* holds",
    ("read", "qkv"): "the producer brings",
    ("publish", "qkv"): "no deadlock",
    ("read", "o"): "the producer brings|holds",
}


@pytest.fixture(params=[2, 4], ids=["two groups", "four groups"])
def plan(request: pytest.FixtureRequest) -> BlockPlan:
    return small_plan(request.param)


def sees(plan: BlockPlan, complaint: str) -> None:
    with pytest.raises(AssertionError, match="step: "):
        check_step(plan)
    with pytest.raises(AssertionError, match=complaint):
        prove(plan, 999)


@pytest.mark.parametrize("each", OF_A_GROUP, ids=" ".join)
def test_the_check_sees_what_is_missing_of_a_group(
    each: tuple[str, str], plan: BlockPlan, edited: Callable[[Edit], None]
) -> None:
    for group in range(plan.head_groups):
        ctas = [cta for cta in range(plan.ctas) if plan.attends(cta) and plan.head_group(cta) == group][:2]
        edited(
            lambda cta, actions, group=group, ctas=ctas: [  # type: ignore[misc]
                a for a in actions if cta not in ctas or (a.kind, a.name, a.group) != (*each, group)
            ]
        )
        sees(plan, OF_A_GROUP[each].replace(" GROUP", f" {group}" if group else ""))


def test_the_check_sees_attention_placed_before_all_groups_are_projected(
    plan: BlockPlan, edited: Callable[[Edit], None]
) -> None:
    last = plan.head_groups - 1

    edited(lambda cta, actions: [a for a in actions if (a.kind, a.name, a.group) != ("await", "projected", last)])
    sees(plan, EARLY)
    # In a CTA that works they are all projected when it comes to bring attention, unless a wait has expired: in the proof none does.
    assert plan.works(0, 999) and plan.head_group(0) == 0
    edited(lambda cta, actions: actions if cta else move(actions, ("place", "attended"), ("await", "projected")))
    prove(plan, 999)
    with pytest.raises(AssertionError, match="step: CTA 0 has projected before attention is placed"):
        check_step(plan)


def test_the_check_sees_word_ahead_of_its_work(plan: BlockPlan, edited: Callable[[Edit], None]) -> None:
    """Which changes no count."""
    for what, ahead_of, complaint in (
        (("signal", "attended"), ("place", "attended"), X1 + r"holds \('attended', 0\)"),
        (("signal", "projected"), ("read", "qkv"), EARLY),
        (("read", "o"), ("await", "attended"), X1 + r"holds \('attended', 0\)"),
        (
            ("signal", "output_sums"),
            ("read", "o"),
            r"is not written over while \('attended', 0\) is read",
        ),
        (("place", "middle_normed"), ("await", "output_sums"), r"is not written over while \('attended', 0\) is read"),
    ):
        edited(lambda cta, actions, what=what, ahead_of=ahead_of: move(actions, what, ahead_of))  # type: ignore[misc]
        with pytest.raises(AssertionError, match=complaint):
            prove(plan, 999)


def test_the_middle_residual_needs_the_sums_of_all_groups(plan: BlockPlan) -> None:
    """Which x1 covers: nobody writes it before all of o is multiplied."""
    read = {place for writes, place, _ in shared(plan, Action("publish", "middle", 0, range(1))) if not writes}
    assert {place for place in read if place.startswith("o_sums")} == {
        of_group("o_sums", group) for group in range(plan.head_groups)
    }


def test_the_check_sees_groups_that_are_taken_for_one_another(plan: BlockPlan, edited: Callable[[Edit], None]) -> None:
    check_step(plan)
    for kind, name, complaint in (
        ("wait", "attention", "partials of layer 0 is complete before its use"),
        ("load", "partials", "partials of layer 0 is complete before its use"),
        ("place", "attended", X1 + r"holds \('attended', 0\)"),
        ("read", "o", "the producer brings what is taken next"),
    ):
        for one, other in itertools.pairwise(range(plan.head_groups)):
            of = {one: other, other: one}

            def swap(
                cta: int,
                actions: list[Action],
                wanted: tuple[str, str] = (kind, name),
                of: dict[int, int] = of,
            ) -> list[Action]:
                return [
                    a._replace(group=of.get(a.group, a.group)) if (a.kind, a.name) == wanted else a for a in actions
                ]

            edited(swap)
            sees(plan, complaint)


def test_the_check_sees_a_group_that_is_awaited_for_all(plan: BlockPlan, edited: Callable[[Edit], None]) -> None:
    """A later one would do for those before it."""
    for what, complaint in (
        (("await", "attended"), X1 + r"holds \('attended', 0\)"),
        (("wait", "attention"), "partials of layer 0 is complete before its use"),
    ):
        edited(
            lambda cta, actions, what=what: [a._replace(group=0) if (a.kind, a.name) == what else a for a in actions]  # type: ignore[misc]
        )
        sees(plan, complaint)


def test_the_check_sees_an_arrival_for_another_group(plan: BlockPlan, edited: Callable[[Edit], None]) -> None:
    tells = [cta for cta in range(0, plan.ctas, plan.cluster_size) if plan.attends(cta)]
    first, last = tells[0], tells[-1]
    assert (plan.head_group(first), plan.head_group(last)) == (0, plan.head_groups - 1)

    def instead(groups: dict[int, int]) -> Edit:
        return lambda cta, actions: [
            a._replace(group=groups[cta]) if cta in groups and (a.kind, a.name) == ("arrive", "attention") else a
            for a in actions
        ]

    edited(lambda cta, actions: [a for a in actions if cta != first or (a.kind, a.name) != ("arrive", "attention")])
    with pytest.raises(AssertionError, match="step: .* arrivals are waited for"):
        check_step(plan)
    edited(instead({first: plan.head_groups - 1}))
    with pytest.raises(AssertionError, match="step: .* arrivals are waited for"):
        check_step(plan)
    edited(instead({first: plan.head_groups - 1, last: 0}))  # so that the counts are right
    sees(plan, "partials of layer 0 is complete before its use")


def test_the_check_sees_a_signal_of_two_roles(plan: BlockPlan, edited: Callable[[Edit], None]) -> None:
    """The tile warps give it in the last layer."""
    last = plan.config.num_layers - 1

    def edit(cta: int, actions: list[Action]) -> list[Action]:
        vectors = any(a.name == "middle" for a in actions)
        return [*actions, *(Action("signal", "word", layer) for layer in range(last + 1) if vectors == (layer != last))]

    edited(edit)
    with pytest.raises(AssertionError, match="word of CTA .* is the other role's"):
        prove(plan, 999)


# -- the check of a plan sees faults -------------------------------------------------------------------------------------


def test_the_check_of_a_plan_sees_what_is_missing(plan: BlockPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    original, cta = planning.schedule, 0
    steps = {(role, s.kind, s.name) for role in ROLES for s in original(plan, cta, role)}
    groups = {f" {group}" if group else "" for group in range(plan.head_groups)}
    assert {name for _, kind, name in steps if kind == "signal" and "attended" in name} == {
        f"attended{g}" for g in groups
    }
    assert {name for _, kind, name in steps if kind == "signal" and "projected" in name} == {
        f"projected{g}" for g in groups
    }
    complaints = {"arrive": "no deadlock", "signal": "no deadlock", "read": " read", "publish": " publish"}
    for role, kind, name in sorted(steps):
        complaint = complaints.get(kind)
        if complaint is None and name not in {f"attended{g}" for g in groups}:
            continue

        def without(
            plan: BlockPlan, of: int, of_role: Role, what: tuple[Role, str, str] = (role, kind, name)
        ) -> list[planning.Step]:
            return [s for s in original(plan, of, of_role) if of != cta or (of_role, s.kind, s.name) != what]

        monkeypatch.setattr(planning, "schedule", without)
        with pytest.raises(AssertionError, match=complaint or "every signal is awaited"):
            check_plan(plan)
