"""Plans of the decoder layer: for every GPT-NeoX shape and device class they cover, fit and make progress; and the check
that says so can tell when they do not."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clusterfusion.architecture import DecoderConfig
from clusterfusion.errors import UnsupportedModelError
from clusterfusion.named_shapes import NAMED_SHAPES, named_shape
from clusterfusion.plan import B200, H200, RTX_5090, BlockPlan, PlanLimits, check_plan, plan_block
from clusterfusion.plan import block as planning

GPT_NEOX = [name for name in NAMED_SHAPES if named_shape(name).family == "gpt_neox"]
# Rows of 12 KB leave no ring in 99 KB; their weights would not fit the memory of such a card either.
TOO_WIDE_FOR_CONSUMER_CARDS = {"gpt-neox-20b", "stablelm-alpha-7b"}


@pytest.mark.parametrize("limits", [H200, B200, RTX_5090], ids=lambda limits: limits.name)
@pytest.mark.parametrize("name", GPT_NEOX)
def test_every_named_shape_has_a_plan(name: str, limits: PlanLimits) -> None:
    config = named_shape(name)
    if limits is RTX_5090 and name in TOO_WIDE_FOR_CONSUMER_CARDS:
        with pytest.raises(UnsupportedModelError, match="hidden_size 6144 needs .* bytes of shared memory a block"):
            plan_block(config, limits)
        return
    plan = plan_block(config, limits)
    check_plan(plan)
    wide = config.hidden_size >= planning.WIDE_HIDDEN_SIZE
    window = planning.WIDE_WINDOW_BYTES if wide else planning.WINDOW_BYTES
    assert plan.window_stages * plan.stage_bytes <= max(window, plan.stage_bytes)
    assert plan.vector_warps + plan.warps < planning.MOST_WARPS
    for total in (3 * config.hidden_size, config.intermediate_size, config.hidden_size):
        counts = {len(plan.rows(total, cta)) for cta in range(plan.ctas)}
        assert max(counts) - min(counts) <= 1, "rows are dealt as evenly as they divide"
    assert plan.scratch_bytes < 0.02 * config.num_layers * config.layer_parameters * planning.ELEMENT_BYTES


@pytest.fixture
def plan() -> BlockPlan:
    return plan_block(named_shape("pythia-2.8b"), H200)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"shared_bytes": 232449}, "shared memory: 232449"),
        ({"ctas": 134}, "one CTA a multiprocessor"),
        ({"ctas": 131}, "whole clusters"),
        ({"splits": 6}, "CTAs for every bundle"),
        ({"splits": 3}, "a cluster works on one bundle"),
        ({"queries": 2}, "a bundle's heads share a K/V head"),
        ({"stages": 17}, "a stage belongs to one warp"),
        ({"window_stages": 0}, "the window is part of the ring"),
        ({"window_stages": 99}, "the window is part of the ring"),
        ({"stage_bytes": 5000}, "stage alignment"),
        ({"stage_bytes": 4096}, "a row of hidden_size fits a stage"),
    ],
)
def test_the_check_sees_a_plan_that_does_not_fit(plan: BlockPlan, change: dict[str, int], complaint: str) -> None:
    with pytest.raises(AssertionError, match=complaint):
        check_plan(dataclasses.replace(plan, **change))


@pytest.mark.parametrize("parallel", [True, False])
def test_the_check_sees_rows_left_out_and_dependencies_that_never_come(
    plan: BlockPlan, parallel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = dataclasses.replace(plan, config=dataclasses.replace(plan.config, parallel_residual=parallel))
    check_plan(plan)
    original = planning.schedule
    roles = [(cta, role) for cta in range(plan.ctas) for role in planning.ROLES]
    kinds = {(step.kind, step.name) for cta, role in roles for step in original(plan, cta, role)}
    complaints = {"arrive": "no deadlock", "signal": "no deadlock", "read": " read", "publish": " publish"}
    for kind, name in sorted(kinds):
        if kind in ("wait", "await") or ("exchange" in name and name != "exchange of cluster 32"):
            continue

        def without(
            plan: BlockPlan, cta: int, role: planning.Role, kind: str = kind, name: str = name
        ) -> list[planning.Step]:
            return [s for s in original(plan, cta, role) if cta != 64 or (s.kind, s.name) != (kind, name)]

        monkeypatch.setattr(planning, "schedule", without)
        with pytest.raises(AssertionError, match=complaints[kind]):
            check_plan(plan)


def test_the_check_sees_a_signal_that_nobody_awaits(plan: BlockPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    original = planning.schedule
    monkeypatch.setattr(
        planning, "schedule", lambda *of: [s for s in original(*of) if (s.kind, s.name) != ("await", "projected")]
    )
    with pytest.raises(AssertionError, match="every signal is awaited"):
        check_plan(plan)


def test_the_check_sees_a_wait_before_its_own_signal(plan: BlockPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    original = planning.schedule

    def wait_first(plan: BlockPlan, cta: int, role: planning.Role) -> list[planning.Step]:
        steps = list(original(plan, cta, role))
        if role == "tiles":
            arrive = steps.index(planning.Step("arrive", "hidden"))
            steps.insert(arrive, steps.pop(steps.index(planning.Step("await", "hidden"))))
        return steps

    monkeypatch.setattr(planning, "schedule", wait_first)
    with pytest.raises(AssertionError, match="no deadlock"):
        check_plan(plan)


def small_config(heads: int, eighths: int, intermediate: int, parallel: bool) -> DecoderConfig:
    hidden = heads * eighths * 8
    return DecoderConfig.from_dict(
        {
            "model_type": "gpt_neox",
            "vocab_size": 99,
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "intermediate_size": intermediate * 8,
            "num_hidden_layers": 1,
            "max_position_embeddings": 64,
            "use_parallel_residual": parallel,
        }
    )


@given(st.integers(1, 100), st.integers(1, 32), st.integers(1, 1000), st.booleans(), st.integers(2, 170))
@settings(max_examples=60, deadline=None)
def test_any_shape_has_a_sound_plan_or_a_reason(
    heads: int, eighths: int, intermediate: int, parallel: bool, multiprocessors: int
) -> None:
    limits = dataclasses.replace(H200, multiprocessors=multiprocessors)
    config = small_config(heads, eighths, intermediate, parallel)
    reason = ""
    try:
        plan = plan_block(config, limits)
    except UnsupportedModelError as error:
        reason = str(error)
    else:
        check_plan(plan)
    assert not reason or "need as many CTAs" in reason or "bytes of shared memory" in reason


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"hidden_size": 2564}, "hidden_size is 2564; the kernels need a multiple of 8"),
        ({"head_dim": 84}, "head_dim is 84; the kernels need a multiple of 8 up to 256"),
        ({"head_dim": 264}, "head_dim is 264"),
        ({"intermediate_size": 100}, "intermediate_size is 100"),
    ],
)
def test_what_the_kernels_cannot_run_is_named(change: dict[str, object], complaint: str) -> None:
    config = dataclasses.replace(named_shape("pythia-2.8b"), **change)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match=complaint):
        plan_block(config, H200)
