"""Plans of the decoder layer: for every GPT-NeoX shape and device class they cover, fit and make progress; and the check
that says so can tell when they do not."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan.orders import ORDERS, in_order
from plan.refusals import check_refusal

from clusterfusion.architecture import DecoderConfig
from clusterfusion.errors import UnsupportedModelError
from clusterfusion.named_shapes import NAMED_SHAPES, named_shape
from clusterfusion.plan import B200, H200, RTX_5090, BlockPlan, PlanLimits, check_plan, plan_block, ring
from clusterfusion.plan import block as planning
from clusterfusion.plan.block import Order

GPT_NEOX = [name for name in NAMED_SHAPES if named_shape(name).family == "gpt_neox"]
# Rows of 12 KB leave no ring in 99 KB; their weights would not fit the memory of such a card either.
TOO_WIDE_FOR_CONSUMER_CARDS = {"gpt-neox-20b", "stablelm-alpha-7b"}
SEQUENTIAL = {"redpajama-incite-3b", "redpajama-incite-7b"}
# With less of the up projection a CTA than makes it worth while to start with it; 170 CTAs have less of it than 132 or 148.
QKV_FIRST = {"pythia-14m", "pythia-31m", "pythia-70m", "pythia-160m", "pythia-410m"}
QKV_FIRST_ON_CONSUMER_CARDS = QKV_FIRST | {"pythia-1b", "pythia-1.4b"}
# With too few rows of up a CTA to make up for a row of every other matrix.
UP_DEALT_AS_THE_REST = {"pythia-14m", "pythia-31m"}


@pytest.mark.parametrize("limits", [H200, B200, RTX_5090], ids=lambda limits: limits.name)
@pytest.mark.parametrize("name", GPT_NEOX)
def test_every_named_shape_has_a_plan(name: str, limits: PlanLimits) -> None:
    config = named_shape(name)
    if limits is RTX_5090 and name in TOO_WIDE_FOR_CONSUMER_CARDS:
        with pytest.raises(UnsupportedModelError, match="hidden_size 6144, .* bytes of shared memory a block"):
            plan_block(config, limits)
        return
    plan = plan_block(config, limits)
    check_plan(plan)
    assert plan.window_stages * plan.stage_bytes <= max(ring.window_bytes(config), plan.stage_bytes)
    assert 1 <= plan.early_stages <= plan.window_stages
    assert plan.vector_warps + plan.warps < ring.MOST_WARPS
    qkv_first = QKV_FIRST_ON_CONSUMER_CARDS if limits is RTX_5090 else QKV_FIRST
    assert plan.order == ("sequential" if name in SEQUENTIAL else "qkv_first" if name in qkv_first else "up_first")
    assert evens_out(plan) == (name not in UP_DEALT_AS_THE_REST)
    check_deal(plan)
    assert plan.scratch_bytes < 0.02 * config.num_layers * config.layer_parameters * planning.ELEMENT_BYTES


# Vector and tile warps, stages, tiles a stage, bytes and cached tokens of a tile, stages in flight, and early ones, head groups. Those
# of the stream are in lab/results (await_projected.txt, early.txt, head_groups.txt): who changes them measures again.
ON_RECORD = {
    "pythia-410m": (5, 10, 26, 2, 4096, 16, 5, 2, 1),
    "pythia-1.4b": (6, 9, 24, 1, 8192, 16, 6, 4, 1),
    "pythia-2.8b": (7, 8, 19, 1, 10240, 30, 6, 4, 1),
    "pythia-6.9b": (8, 7, 21, 1, 8192, 16, 9, 4, 1),
    "llama-3.2-1b": (6, 9, 24, 1, 8192, 32, 9, 4, 2),
    "llama-3.1-8b": (8, 7, 21, 1, 8192, 16, 9, 4, 2),
}


@pytest.mark.parametrize("name", ON_RECORD)
def test_the_ring_is_the_one_on_record(name: str) -> None:
    p = plan_block(named_shape(name), H200)
    chosen = (p.vector_warps, p.warps, p.stages, p.stage_tiles, p.tile_bytes, p.tile_tokens)
    assert (*chosen, p.window_stages, p.early_stages, p.head_groups) == ON_RECORD[name]


# -- the deal of rows --------------------------------------------------------------------------------------------------


def evens_out(plan: BlockPlan) -> bool:
    """Whether a CTA has enough rows of the up projection to make up for a row of each of q, k, v, o and down, and for what
    rounding takes."""
    hidden, up = plan.config.hidden_size, plan.config.intermediate_size
    return up >= ((hidden + up) // hidden + 3) * plan.ctas


def up_count(plan: BlockPlan, cta: int) -> int:
    return sum(map(len, plan.up_groups(cta)))


def check_deal(plan: BlockPlan) -> None:
    """A CTA's rows of every matrix, and where up evens out what the others leave, its elements of a whole layer: as even as
    can be, and up's rows all there, one after another, as many as there is room for."""
    c, ctas = plan.config, range(plan.ctas)
    hidden, up = c.hidden_size, c.intermediate_size
    for total in (3 * hidden, hidden):
        counts = {len(plan.rows(total, cta)) for cta in ctas}
        assert max(counts) - min(counts) <= 1, "rows are dealt as evenly as they divide"
    dealt = [row for rows in zip(*map(plan.up_groups, ctas), strict=True) for each in rows for row in each]
    assert dealt == list(range(up)), "each row of up once, group by group"
    counts = {up_count(plan, cta) for cta in ctas}
    assert max(counts) <= -(-up // plan.ctas) + 4 + -(-up // hidden), "what kMostUpRows makes room for"
    if not evens_out(plan):
        assert all(up_count(plan, cta) == len(plan.rows(up, cta)) for cta in ctas)
        return
    assert min(counts) > 0, "everyone has something to start with"
    layer = hidden * (3 * hidden + up) + hidden * (hidden + up)
    before = 0  # elements of a layer that the CTAs up to here read
    for cta in ctas:
        out = len(plan.rows(hidden, cta)) * (hidden + up)
        share = (len(plan.rows(3 * hidden, cta)) + up_count(plan, cta)) * hidden + out
        assert abs(share * plan.ctas - layer) < hidden * plan.ctas, "a layer is even to within a row"
        before += share
        ideal = layer * (cta + 1) // plan.ctas
        assert ideal - hidden < before <= ideal, "and so are all CTAs up to any"
    assert before == layer


def test_up_makes_up_for_a_row_more_of_the_others() -> None:
    """By hand: 10 CTAs, 4 x 8 = 32 wide, so that CTAs have 9 or 10 rows of q, k and v and 3 or 4 of o and of down, each of
    which is worth 32 + 128 elements, or 5 rows of up."""
    config = DecoderConfig.from_dict(
        {
            "model_type": "gpt_neox",
            "vocab_size": 99,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "intermediate_size": 128,
            "num_hidden_layers": 1,
            "max_position_embeddings": 64,
        }
    )
    plan = plan_block(config, dataclasses.replace(H200, multiprocessors=10))
    ctas = range(plan.ctas)
    assert [len(plan.rows(96, cta)) for cta in ctas] == [9, 10, 9, 10, 10, 9, 10, 9, 10, 10]
    assert [len(plan.rows(32, cta)) for cta in ctas] == [3, 3, 3, 3, 4, 3, 3, 3, 3, 4]
    # A tenth of the layer is 38.4 rows of 32 elements.
    assert [up_count(plan, cta) for cta in ctas] == [14, 13, 15, 13, 9, 14, 13, 15, 13, 9]
    assert [plan.up_groups(cta)[0].start for cta in (0, 4, 5, 9)] == [0, 55, 64, 119]


# -- the check ---------------------------------------------------------------------------------------------------------


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
        ({"stages": 13}, r"no wait can see an older use of its stage: \(13, 8, 6\)"),
        ({"window_stages": 12}, r"no wait can see an older use of its stage: \(19, 8, 12\)"),
        ({"early_stages": 7}, "no more in flight early than else: 7"),
        ({"early_stages": 0}, "no more in flight early than else: 0"),
        ({"stage_tiles": 3}, "a team has a warp for each tile of a stage: 8"),
        ({"window_stages": 0}, "the window is part of the ring"),
        ({"window_stages": 99}, "the window is part of the ring"),
        ({"fifths_before_cached": 6}, "cached tokens are among the rows of down: 6"),
        ({"tile_bytes": 5000}, "tile alignment"),
        ({"tile_bytes": 4096}, "a row of hidden_size fits a tile"),
        ({"tile_bytes": 7680, "stage_tiles": 2}, "tiles of a stage are alike"),
        ({"tile_tokens": 33}, "cached tokens fit a tile: 33"),
    ],
)
def test_the_check_sees_a_plan_that_does_not_fit(plan: BlockPlan, change: dict[str, int], complaint: str) -> None:
    with pytest.raises(AssertionError, match=complaint):
        check_plan(dataclasses.replace(plan, **change))


def test_the_check_sees_up_first_where_the_residual_is_sequential(plan: BlockPlan) -> None:
    assert plan.up_first
    sequential = dataclasses.replace(plan.config, parallel_residual=False)
    with pytest.raises(AssertionError, match="sequential residual has one order: True"):
        check_plan(dataclasses.replace(plan, config=sequential))


@pytest.mark.parametrize("order", ORDERS)
def test_the_tiles_read_in_the_order_of_the_plan(plan: BlockPlan, order: Order) -> None:
    plan = in_order(plan, order)
    for cta in (0, 64, 131):
        reads = [step for step in planning.schedule(plan, cta, "tiles") if step.kind == "read"]
        assert tuple(dict.fromkeys(step.name.split()[0] for step in reads)) == planning.MATRICES[order]
        assert tuple(step.rows for step in reads if step.name == "up") == plan.up_groups(cta)


@pytest.mark.parametrize("order", ORDERS)
def test_the_check_sees_rows_left_out_and_dependencies_that_never_come(
    plan: BlockPlan, order: Order, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = in_order(plan, order)
    check_plan(plan)
    original = planning.schedule
    roles = [(cta, role) for cta in range(plan.ctas) for role in planning.ROLES]
    kinds = {(step.kind, step.name) for cta, role in roles for step in original(plan, cta, role)}
    signals = {"normed", "projected", "attended", "output_sums", "expanded", "hidden", "queries", "slots"}
    signals |= {"middle_normed", "down_sums", "expanded 1", "hidden 1"} if order == "sequential" else set()
    assert {name for kind, name in kinds if kind == "signal"} == signals
    assert {name for kind, name in kinds if kind == "await"} == signals
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


@pytest.mark.parametrize("order", ORDERS)
def test_the_check_sees_a_signal_that_nobody_awaits(
    plan: BlockPlan, order: Order, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = in_order(plan, order)
    original = planning.schedule
    for name in sorted({s.name for role in planning.ROLES for s in original(plan, 0, role) if s.kind == "await"}):

        def without(plan: BlockPlan, cta: int, role: planning.Role, name: str = name) -> list[planning.Step]:
            return [s for s in original(plan, cta, role) if (s.kind, s.name) != ("await", name)]

        monkeypatch.setattr(planning, "schedule", without)
        with pytest.raises(AssertionError, match=rf"every signal is awaited: \[\(0, '{name}'\)"):
            check_plan(plan)


@pytest.mark.parametrize("order", ORDERS)
def test_the_check_sees_a_wait_before_its_own_signal(
    plan: BlockPlan, order: Order, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = in_order(plan, order)
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


@given(st.integers(1, 100), st.integers(1, 32), st.integers(1, 1000), st.sampled_from(ORDERS), st.integers(2, 170))
@settings(max_examples=60, deadline=None)
def test_any_shape_has_a_sound_plan_or_a_reason(
    heads: int, eighths: int, intermediate: int, order: Order, multiprocessors: int
) -> None:
    limits = dataclasses.replace(H200, multiprocessors=multiprocessors)
    config = small_config(heads, eighths, intermediate, order != "sequential")
    reason = ""
    try:
        plan = plan_block(config, limits)
    except UnsupportedModelError as error:
        reason = str(error)
    else:
        assert plan.up_first <= config.parallel_residual
        check_plan(in_order(plan, order))
        check_deal(plan)
    if reason:
        check_refusal(reason, config, limits)


@pytest.mark.parametrize(("hidden", "intermediate", "shared_bytes"), [(16384, 24576, 232448), (2560, 61440, 167936)])
def test_few_warps_with_a_ring_are_better_than_many_without(hidden: int, intermediate: int, shared_bytes: int) -> None:
    """What waiting warps hold is no ring: the most of it all, with no room left for a stage, is no plan."""
    config = dataclasses.replace(small_config(hidden // 128, 16, intermediate // 8, True), vocab_size=512)
    assert plan_block(config, dataclasses.replace(H200, shared_bytes_per_block=shared_bytes)).stages == 2


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


@pytest.mark.parametrize(("multiprocessors", "vocab_size"), [(132, 2**32 // 128), (8, 2**31 // 256 * 8)])
def test_a_vocabulary_beyond_32_bits_is_refused(multiprocessors: int, vocab_size: int) -> None:
    """Its rows times CTAs, or the bytes of a CTA's share."""
    limits = dataclasses.replace(H200, multiprocessors=multiprocessors)
    config = named_shape("pythia-14m")
    assert config.hidden_size * planning.ELEMENT_BYTES == 256
    with pytest.raises(UnsupportedModelError, match=f"vocab_size is {vocab_size}; "):
        plan_block(dataclasses.replace(config, vocab_size=vocab_size), limits)
    plan_block(dataclasses.replace(config, vocab_size=vocab_size - 16), limits)


def test_a_gpu_without_a_cluster_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="a cluster takes 2 multiprocessors .*; one has 1, the model 2560"):
        plan_block(named_shape("pythia-2.8b"), dataclasses.replace(H200, name="one", multiprocessors=1))
