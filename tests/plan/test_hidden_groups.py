"""With sequential residual h comes in groups, one after another: how many, whose rows, and that the check of a step sees what is missing
of one of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from plan.orders import TILE_A_STAGE, Edit

from clusterfusion.architecture import DecoderConfig
from clusterfusion.named_shapes import named_shape
from clusterfusion.plan import H200, BlockPlan, check_step, plan_block, step
from clusterfusion.plan.step import Action
from clusterfusion.plan.step_check import buffers_needed, prove, run_step


@pytest.fixture
def plan() -> BlockPlan:
    """With h in three groups."""
    config = DecoderConfig.from_dict(
        {
            "model_type": "gpt_neox",
            "vocab_size": 99,
            "hidden_size": 96,
            "num_attention_heads": 3,
            "intermediate_size": 1536,
            "num_hidden_layers": 4,
            "max_position_embeddings": 2048,
            "use_parallel_residual": False,
        }
    )
    plan = plan_block(config, dataclasses.replace(H200, multiprocessors=12))
    plan = dataclasses.replace(plan, **TILE_A_STAGE)
    assert plan.hidden_groups == 3
    return plan


def test_h_comes_in_as_many_groups_as_stages_of_a_row_of_down() -> None:
    names = {"llama-3.1-8b": 4, "llama-3.2-1b": 2, "llama-2-7b": 1, "redpajama-incite-3b": 2, "pythia-2.8b": 1}
    assert {name: plan_block(named_shape(name), H200).hidden_groups for name in names} == names
    plan = plan_block(named_shape("llama-3.1-8b"), H200)
    for group in range(4):
        dealt = [row for cta in range(plan.ctas) for row in plan.up_groups(cta)[group]]
        assert dealt == list(plan.hidden_group(group)), "each row of a group once"


# Of a group of h, its wait and its signals, and what is found wrong without them.
OF_A_GROUP = {
    ("wait", "hidden"): r"h of layer . is complete before its use",
    ("await", "hidden"): r"x2 GROUP of CTA .* holds \('hidden', 0\)",
    ("await", "expanded"): r"expanded GROUP of CTA .* is awaited in every layer",
    ("arrive", "hidden"): r"arrivals are waited for|no deadlock|h of layer",
    ("signal", "hidden"): "no deadlock",
    ("signal", "expanded"): "no deadlock",
    ("place", "hidden"): r"x2 GROUP of CTA .* holds",
    ("read", "up"): "no deadlock|the producer brings",
    ("read", "down"): "the producer brings|holds",
}


@pytest.mark.parametrize("each", OF_A_GROUP, ids=" ".join)
@pytest.mark.parametrize("group", [0, 1, 2])
def test_the_check_sees_what_is_missing_of_a_group(
    each: tuple[str, str], group: int, plan: BlockPlan, edited: Callable[[Edit], None]
) -> None:
    edited(
        lambda cta, actions: [a for a in actions if cta not in (4, 5) or (a.kind, a.name, a.group) != (*each, group)]
    )
    with pytest.raises(AssertionError, match="step: "):
        check_step(plan)
    with pytest.raises(AssertionError, match=OF_A_GROUP[each].replace(" GROUP", f" {group}" if group else "")):
        prove(plan, 99)


def test_the_check_sees_groups_of_h_that_are_taken_for_one_another(
    plan: BlockPlan, edited: Callable[[Edit], None]
) -> None:
    check_step(plan)

    for kind, name, groups, complaint in (
        ("wait", "hidden", (0, 0, 2), "h of layer 0 is complete before its use"),
        ("await", "hidden", (0, 0, 2), r"x2 1 of CTA .* holds"),
        ("load", "h", (0, 2, 1), "h of layer 0 is complete before its use"),
        ("read", "down", (0, 2, 1), "the producer brings what is taken next"),
        ("read", "down", (0, 1, 1), "the producer brings what is taken next"),
    ):

        def edit(
            cta: int, actions: list[Action], of: tuple[str, str] = (kind, name), to: tuple[int, ...] = groups
        ) -> list[Action]:
            return [a._replace(group=to[a.group]) if (a.kind, a.name) == of else a for a in actions]

        edited(edit)
        with pytest.raises(AssertionError, match="step: "):
            check_step(plan)
        with pytest.raises(AssertionError, match=complaint):
            prove(plan, 99)


def test_one_buffer_of_h_suffices_in_groups(plan: BlockPlan) -> None:
    needed = buffers_needed(run_step(plan, 99))
    assert needed == {"x": 1, "qkv": 1, "exchange": 1, "partials": 1, "h": 1}


def test_a_producer_brings_down_group_by_group(plan: BlockPlan) -> None:
    tiles = [tile for tile in step.producer_order(plan, 5) if (tile.layer, tile.name) == (1, "down")]
    rows = plan.rows(plan.config.hidden_size, 5)
    assert [(tile.part, tile.first) for tile in tiles] == [(part, row) for part in range(3) for row in rows]
