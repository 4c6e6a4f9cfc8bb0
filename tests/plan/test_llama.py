"""LLaMA through the plan and the schedule that GPT-NeoX has: sound for every shape and device class, and followed on the CPU, they
compute the model, with the same bits in every order."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plan.orders import ORDERS, TILE_A_STAGE, in_order, in_two_groups
from plan.refusals import check_refusal
from plan.step_interpreter import StepInterpreter, check_computes
from tiny_models import random_token_ids, relative_error, tiny_llama, weights_of
from torch import Tensor

from clusterfusion import reference
from clusterfusion.architecture import DecoderConfig
from clusterfusion.errors import UnsupportedModelError
from clusterfusion.named_shapes import NAMED_SHAPES, named_shape
from clusterfusion.plan import B200, H200, RTX_5090, BlockPlan, PlanLimits, balance, check_plan, check_step, plan_block
from clusterfusion.plan import step as schedules
from clusterfusion.plan.block import ROLES, Order, Role
from clusterfusion.plan.step import Action
from clusterfusion.plan.step_check import buffers_needed, prove, run_step
from clusterfusion.weights import DecoderWeights

LLAMA = [name for name in NAMED_SHAPES if named_shape(name).family == "llama"]
DEVICES = {limits.name: limits for limits in (H200, B200, RTX_5090)}
# Rows of 16 KB and an MLP of 28,672 leave no ring in 99 KB; their weights would not fit the memory of such a card either.
TOO_WIDE_FOR_CONSUMER_CARDS = {"llama-2-70b", "llama-3-70b", "llama-3.1-70b"}
# Which have K/V heads of different numbers of query heads, of all sizes, with and without tied embeddings.
PROVED = ["llama-3.2-1b", "llama-3.1-8b", "llama-2-7b", "tinyllama-1.1b", "smollm-135m"]


def plan_or_skip(name: str, limits: PlanLimits) -> BlockPlan:
    if limits is RTX_5090 and name in TOO_WIDE_FOR_CONSUMER_CARDS:
        with pytest.raises(UnsupportedModelError, match="bytes of shared memory a block"):
            plan_block(named_shape(name), limits)
        pytest.skip("refused, as it must be")
    return plan_block(named_shape(name), limits)


@pytest.mark.parametrize("limits", DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize("name", LLAMA)
def test_every_named_shape_has_a_plan(name: str, limits: PlanLimits) -> None:
    plan = plan_or_skip(name, limits)
    check_plan(plan)
    c = plan.config
    group = c.num_heads // c.num_kv_heads
    assert plan.queries == (4 if "70b" in name else group), "70B's eight would leave the ring no room"
    if plan.queries > 1:
        assert plan.bundles * plan.splits >= 0.86 * plan.ctas, "a long cache is read by nearly all CTAs"
    assert plan.scratch_bytes < 0.02 * c.num_layers * c.layer_parameters * 2
    assert 1 <= balance(plan)["step"] <= {"H200": 1.04, "B200": 1.08, "RTX 5090": 1.1}[limits.name]


@given(
    st.sampled_from(sorted(DEVICES)),
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(1, 32),
    st.integers(1, 640),
    st.integers(1, 3600),
)
@settings(max_examples=200, deadline=None)
def test_any_shape_has_a_sound_plan_or_a_reason(
    device: str, kv_heads: int, group: int, head_eighths: int, hidden_eighths: int, mlp_eighths: int
) -> None:
    shape = named_shape("llama-3.2-1b")
    config = dataclasses.replace(
        shape,
        num_layers=1,
        num_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        head_dim=8 * head_eighths,
        rotary=dataclasses.replace(shape.rotary, nominal_dim=8 * head_eighths),
        hidden_size=8 * hidden_eighths,
        intermediate_size=8 * mlp_eighths,
        vocab_size=99,
    )
    limits = dataclasses.replace(DEVICES[device], multiprocessors=24)
    try:
        plan_block(config, limits)  # which checks it
    except UnsupportedModelError as error:
        check_refusal(str(error), config, limits)


@pytest.mark.parametrize("limits", DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize("name", PROVED)
def test_the_steps_of_named_shapes_are_sound(name: str, limits: PlanLimits) -> None:
    check_step(plan_or_skip(name, limits))


def test_up_evens_out_what_the_others_leave() -> None:
    plan = plan_block(named_shape("llama-3.1-8b"), H200)
    c = plan.config
    shares = set()
    for cta in range(plan.ctas):
        rows = {name: len(plan.rows(size, cta)) for name, size in (("qkv", 6144), ("out", 4096))}
        shares.add(
            4096 * (rows["qkv"] + 2 * sum(map(len, plan.up_groups(cta)))) + (4096 + c.intermediate_size) * rows["out"]
        )
    assert max(shares) - min(shares) < 2 * (2 * 4096), "to within a row of up and its gate, either way"


def test_bundles_are_as_large_as_registers_allow() -> None:
    def queries(heads: int, kv_heads: int, head_dim: int) -> int:
        config = dataclasses.replace(
            named_shape("llama-3.2-1b"), num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim
        )
        plan = plan_block(config, H200)
        check_step(dataclasses.replace(plan, config=dataclasses.replace(config, num_layers=1, vocab_size=99)))
        return plan.queries

    assert [queries(8 * kv, kv, 64) for kv in (1, 4)] == [8, 8]
    assert queries(32, 1, 64) == 8, "four bundles share the one K/V head"
    assert queries(16, 2, 256) == 4
    assert queries(11, 1, 64) == 1, "no larger divisor"
    assert queries(15, 5, 64) == 3
    assert queries(16, 2, 128) == 4
    assert queries(12, 2, 128) == 6


def small_plan(layers: int = 4, ctas: int = 12, heads: int = 6, kv_heads: int = 2) -> BlockPlan:
    config = weights_config(hidden_size=96, num_attention_heads=heads, num_key_value_heads=kv_heads, layers=layers)
    return plan_block(config, dataclasses.replace(H200, multiprocessors=ctas))


def weights_config(layers: int = 1, **options: Any) -> DecoderConfig:
    raw = {
        "model_type": "llama",
        "vocab_size": 99,
        "hidden_size": 96,
        "intermediate_size": 288,
        "num_hidden_layers": layers,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
    }
    return DecoderConfig.from_dict(raw | options)


WITHOUT = {
    ("await", "expanded"): "up_sums of CTA .* holds|x2 of CTA .* is not written over|is awaited in every layer",
    ("wait", "hidden"): "h of layer . is complete before its use",
    ("wait", "qkv"): "qkv of layer . is complete before its use",
    ("await", "scaled"): r"scale of CTA .* holds \('scale', 0\)|biases of CTA .* holds \('biases', 0\)",
}


@pytest.mark.parametrize(("each", "complaint"), WITHOUT.items(), ids=[" ".join(each) for each in WITHOUT])
def test_the_check_sees_what_a_gate_needs(
    each: tuple[str, str], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = small_plan()
    check_step(plan)
    original = schedules.step_schedule

    def without(plan: BlockPlan, cta: int, role: Role, position: int = 0) -> Iterator[Action]:
        yield from (a for a in original(plan, cta, role, position) if cta not in (2, 3) or (a.kind, a.name) != each)

    monkeypatch.setattr(schedules, "step_schedule", without)
    with pytest.raises(AssertionError, match="step: "):
        check_step(plan)
    with pytest.raises(AssertionError, match=complaint):
        prove(plan, 999)


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "without a gate"])
@pytest.mark.parametrize("order", ORDERS)
def test_factors_of_rms_norm_are_there_when_rows_are_finished(
    order: Order, gated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    c = dataclasses.replace(small_plan().config, parallel_residual=order != "sequential", gated_mlp=gated)
    plan = in_order(plan_block(c, dataclasses.replace(H200, multiprocessors=12)), order)
    check_step(plan)
    original = schedules.step_schedule
    actions = [a for role in ROLES for a in original(plan, 2, role, 99)]
    factors = {"scaled"} if gated or order != "sequential" else {"scaled", "middle_scaled"}
    for kind in ("signal", "await"):
        assert {a.name for a in actions if a.kind == kind and "scaled" in a.name} == factors
    for each in factors:
        monkeypatch.setattr(
            schedules,
            "step_schedule",
            lambda *arguments, each=each: (a for a in original(*arguments) if (a.kind, a.name) != ("await", each)),
        )
        with pytest.raises(AssertionError, match=rf"(scale|biases) of CTA .* holds \('{each[:-1]}|biases', 0\)"):
            prove(plan, 99)


@pytest.mark.parametrize("each", [("finish", "h"), ("arrive", "hidden"), ("signal", "expanded")], ids=" ".join)
def test_the_check_sees_anything_else_missing(each: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    plan, original = small_plan(), schedules.step_schedule

    def without(plan: BlockPlan, cta: int, role: Role, position: int = 0) -> Iterator[Action]:
        yield from (a for a in original(plan, cta, role, position) if cta not in (2, 3) or (a.kind, a.name) != each)

    monkeypatch.setattr(schedules, "step_schedule", without)
    with pytest.raises(AssertionError, match="step: "):
        check_step(plan)


def test_one_buffer_of_everything_suffices() -> None:
    assert buffers_needed(run_step(small_plan(), 99)) == {"x": 1, "qkv": 1, "exchange": 1, "partials": 1, "h": 1}


@given(
    kv_heads=st.integers(1, 12),
    group=st.integers(1, 12),
    eighths=st.integers(1, 16),
    hidden=st.integers(1, 100),
    intermediate=st.integers(1, 300),
    vocab=st.integers(1, 400),
    layers=st.integers(1, 4),
    multiprocessors=st.integers(2, 60),
    position=st.integers(0, 639),
)
@settings(max_examples=40, deadline=None)
def test_any_shape_has_a_sound_step_or_a_reason(
    kv_heads: int,
    group: int,
    eighths: int,
    hidden: int,
    intermediate: int,
    vocab: int,
    layers: int,
    multiprocessors: int,
    position: int,
) -> None:
    config = weights_config(
        layers,
        hidden_size=8 * hidden,
        num_attention_heads=kv_heads * group,
        num_key_value_heads=kv_heads,
        head_dim=8 * eighths,
        intermediate_size=8 * intermediate,
        vocab_size=vocab,
        max_position_embeddings=640,
    )
    limits = dataclasses.replace(H200, multiprocessors=multiprocessors)
    try:
        plan = plan_block(config, limits)
    except UnsupportedModelError as error:
        check_refusal(str(error), config, limits)
    else:
        check_step(plan)
        prove(plan, position)


@given(
    kv_heads=st.integers(60, 132),
    group=st.sampled_from((1, 2, 4, 8)),
    head_dim=st.sampled_from((64, 128, 256)),
    hidden=st.integers(1, 2048),
    intermediate=st.integers(1, 4096),
)
@settings(max_examples=100, deadline=None)
def test_whole_devices_refuse_only_what_does_not_fit(
    kv_heads: int, group: int, head_dim: int, hidden: int, intermediate: int
) -> None:
    """Shapes about as large as fit: 784 heads of 64 leave little of 227 KB."""
    shape = named_shape("llama-3.2-1b")
    config = dataclasses.replace(
        shape,
        num_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rotary=dataclasses.replace(shape.rotary, nominal_dim=head_dim),
        hidden_size=8 * hidden,
        intermediate_size=8 * intermediate,
    )
    try:
        plan_block(config, H200)
    except UnsupportedModelError as error:
        check_refusal(str(error), config, H200)


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
        weights = weights_of(tiny_llama(**self.model).to(dtype))
        plan = plan_block(weights.config, dataclasses.replace(H200, multiprocessors=self.ctas))
        plan = dataclasses.replace(plan, **self.plan)
        if "head_groups" not in self.plan:
            plan = in_two_groups(plan)
        check_plan(plan)
        ids = random_token_ids(weights.config.vocab_size, self.position + 1)
        cache = reference.KVCache.allocate(weights.config, self.position + 1, dtype, "cpu")
        if self.position:
            reference.forward(weights, ids[:-1], cache, 0)
        return plan, weights, cache, ids


def heads(count: int, kv: int, size: int, hidden: int | None = None, **more: Any) -> dict[str, Any]:
    """Options of a tiny model by its heads."""
    sizes = {
        "num_attention_heads": count,
        "num_key_value_heads": kv,
        "head_dim": size,
        "hidden_size": hidden or count * size,
    }
    return sizes | more


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES = {
    "two heads a K/V head": Case(),
    "a head a K/V head": Case({"num_key_value_heads": 4}),
    "one K/V head": Case({"num_key_value_heads": 1}),
    "three heads a K/V head": Case(heads(9, 3, 16), ctas=14),
    "more heads than a bundle holds": Case(heads(12, 1, 8)),
    "heads longer than the residual": Case(heads(4, 2, 24, hidden=40)),
    "heads shorter than the residual": Case(heads(4, 2, 8, hidden=56)),
    "biases": Case({"attention_bias": True, "mlp_bias": True, "num_hidden_layers": 3}),
    "llama3 rotary, tied": Case({"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "head_dim 80": Case(heads(4, 1, 80, num_hidden_layers=3)),
    "head_dim 128, many tokens": Case(heads(4, 2, 128, hidden=64), position=101, ctas=8),
    "rows of down and of o in parts": Case(
        heads(8, 2, 64, hidden=32, intermediate_size=1040), ctas=12, plan={"head_groups": 1}
    ),
    "h in two groups": Case({"intermediate_size": 1024}, ctas=12, plan=TILE_A_STAGE),
    "h in three groups, biases": Case(
        {"intermediate_size": 1536, "attention_bias": True, "mlp_bias": True, "num_hidden_layers": 3}, plan=TILE_A_STAGE
    ),
    "h in four groups, a row or two a CTA": Case({"intermediate_size": 2048}, ctas=40, plan=TILE_A_STAGE),
    "h in two groups of two tiles": Case(
        {"intermediate_size": 2048}, plan=TILE_A_STAGE | {"stage_tiles": 2, "warps": 4}
    ),
    "heads in four groups, one each": Case(heads(8, 4, 16, num_hidden_layers=3), position=101, plan={"head_groups": 4}),
    "heads in four groups, h in two, biases": Case(
        heads(8, 8, 8, intermediate_size=1024, attention_bias=True, mlp_bias=True),
        ctas=20,
        plan=TILE_A_STAGE | {"head_groups": 4},
    ),
    "heads in two groups, several rows of o a tile": Case(heads(6, 2, 16, num_hidden_layers=3), ctas=6, position=101),
    "heads in three groups, more CTAs than rows of a group": Case(
        heads(3, 3, 8, hidden=48), ctas=60, plan={"head_groups": 3}
    ),
    "heads in one group": Case(plan={"head_groups": 1}),
    "a row or two a CTA": Case({"num_hidden_layers": 3}, ctas=40, position=101),
    "one CTA a bundle": Case(ctas=2, position=101),
    "nothing cached": Case(position=0),
    "one token cached": Case(position=1),
}


def test_the_cases_have_groups_of_heads_and_of_h() -> None:
    plans = [case.build()[0] for case in CASES.values()]
    assert {plan.hidden_groups for plan in plans} == {1, 2, 3, 4}
    assert {plan.head_groups for plan in plans} == {1, 2, 3, 4}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_schedule_computes_the_model(case: Case) -> None:
    plan, weights, cache, ids = case.build()
    check_step(plan)
    check_computes(StepInterpreter(plan, weights, cache, int(ids[-1]), case.position), ids, cache)


@pytest.mark.parametrize("name", ["two heads a K/V head", "head_dim 80"])
def test_the_schedule_computes_the_model_in_float64(name: str) -> None:
    plan, weights, cache, ids = CASES[name].build(torch.float64)
    position = CASES[name].position
    logits, _ = StepInterpreter(plan, weights, cache, int(ids[-1]), position, dtype=np.float64).run(seed=0)
    assert relative_error(torch.from_numpy(logits), reference.forward(weights, ids[-1:], cache, position)) < 1e-12
