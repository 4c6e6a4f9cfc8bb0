"""The plan of one decoder layer: rows to CTAs, heads to clusters, ring and window; and a check of it.

The program it describes is cuda/programs/decoder_block.cu. CTA c of G reads rows [c R / G, (c + 1) R / G) of a matrix of
R rows, but for the up projection's, which even out what the others leave uneven; in tiles of a row, or of parts of one that
is longer than a tile. With sequential residual the up projection's rows come in hidden groups, and the down projection's parts too: what
is multiplied by the first group of h, then by the next one. So do the rows of the projection of q, k and v in head groups, which are attended
one after another, and of every row of o the part that is multiplied by the first one's, then by the next one's. With a gated MLP a row of the up
projection is a pair, its gate's row and its own.

`queries` query heads that share a K/V head are a bundle: all that share it, or a part. Bundle b belongs to the `splits` CTAs from
b * splits on, whole clusters, which take its cached tokens tile by tile in turn. Rows of the projection of q, k and v come K/V head
by K/V head: the queries that share it, its key, its value.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

from clusterfusion.architecture import DecoderConfig
from clusterfusion.errors import UnsupportedModelError
from clusterfusion.plan.block_check import ROLES, Role, Step, check, check_coverage, check_progress, of_group
from clusterfusion.plan.limits import PlanLimits
from clusterfusion.plan.ring import choose_ring, enough_bytes, tells_uses_apart
from clusterfusion.plan.sizes import (
    CLUSTER_SIZE,
    ELEMENT_BYTES,
    MAX_TILE_TOKENS,
    PARTIAL_PADDING,
    TENSOR_COPY_ALIGNMENT,
    VECTOR,
    bundle_sizes,
    by_groups,
    cache_tile_bytes,
    even_parts,
    qkv_rows,
    round_up,
)

MAX_HEAD_DIM = 256
# Without shared K/V heads, one CTA merges what a head's clusters give in registers. With them there are few bundles, so that it takes
# more splits to employ all CTAs; only as many partials are read as cached tokens have filled.
MOST_SPLITS = 32
MOST_SHARED_SPLITS = 128
# With so much of the up projection a CTA, q, k and v behind it hide the wait for h; with less, attention is what takes long,
# and starts as early as it can.
UP_FIRST_BYTES = 200 * 1024
# And so many fifths of down come before the cached tokens: by then the queries are there, and what is left of it hides the merge.
FIFTHS_BEFORE_CACHED = 1
PAIR_BYTES = 8  # a float and its epoch
# With sequential residual, groups of K/V heads, and of h, that come one after another: each has a counter.
MOST_GROUPS = 4
COUNTER_BYTES = (2 + 2 * MOST_GROUPS) * 128  # each counter on a cache line of its own

# In which a layer's matrices come; which vectors are ready when follows from it. Sequential residual leaves no choice.
Order = Literal["up_first", "qkv_first", "sequential"]
MATRICES: dict[Order, tuple[str, ...]] = {
    "up_first": ("up", "qkv", "down", "o"),
    "qkv_first": ("qkv", "up", "down", "o"),
    "sequential": ("qkv", "o", "up", "down"),
}
Segment = Literal["whole", "project", "attend", "output", "expand", "contract"]


@dataclasses.dataclass(frozen=True)
class BlockPlan:
    """How one launch of the decoder-layer program uses a GPU. Sizes in bytes unless the name says otherwise."""

    config: DecoderConfig
    limits: PlanLimits
    ctas: int
    cluster_size: int
    queries: int  # query heads of a bundle, which a CTA attends together
    splits: int  # CTAs that share a bundle's cached tokens
    up_first: bool  # with parallel residual: up before q, k, v
    vector_warps: int  # norms, queries, what comes of the tiles
    warps: int  # tile warps: weights times vectors, queries over cached tokens; one producer warp comes on top
    stages: int  # of the ring of weights and cached tokens
    tile_bytes: int  # what a warp takes at a time
    stage_tiles: int  # tiles that are copied together, for as many warps
    window_stages: int
    early_stages: int  # in flight, at most, while what they are multiplied by is not there
    fifths_before_cached: int  # with up_first: of a CTA's rows of down
    head_groups: int  # with sequential residual: of K/V heads, which are attended, and o taken, one after another
    tile_tokens: int  # cached tokens whose keys and values are one tile
    shared_bytes: int

    @property
    def threads(self) -> int:
        return (self.vector_warps + self.warps + 1) * 32

    @property
    def stage_bytes(self) -> int:
        return self.tile_bytes * self.stage_tiles

    @property
    def order(self) -> Order:
        """The order of a layer's matrices."""
        if not self.config.parallel_residual:
            return "sequential"
        return "up_first" if self.up_first else "qkv_first"

    @property
    def merged_ctas(self) -> int:
        """CTAs whose partial softmax is merged over distributed shared memory."""
        return 1 if self.splits == 1 else self.cluster_size

    @property
    def partials_per_head(self) -> int:
        """Partial results of a head that meet in global memory."""
        return self.splits // self.merged_ctas

    def used_partials(self, position: int) -> int:
        """How many of a head's partials hold anything with `position` cached tokens: of as many clusters as have a tile for each
        CTA, or, where all wait for attention, for each warp."""
        tiles = -(-position // self.tile_tokens)
        of_a_cluster = self.merged_ctas * (1 if self.up_first else self.warps)
        return max(1, min(self.partials_per_head, -(-tiles // of_a_cluster)))

    def active_splits(self, position: int) -> int:
        """CTAs that share a bundle's `position` cached tokens."""
        return self.used_partials(position) * self.merged_ctas

    @property
    def bundles(self) -> int:
        """Bundles of query heads."""
        return self.config.num_heads // self.queries

    @property
    def group_rows(self) -> int:
        """Rows of the projection of q, k and v that belong to one K/V head."""
        c = self.config
        return (c.num_heads // c.num_kv_heads + 2) * c.head_dim

    @property
    def up_times(self) -> int:
        """Rows streamed for a row of the up projection: with a gate, its own beside it."""
        return 2 if self.config.gated_mlp else 1

    @property
    def hidden_groups(self) -> int:
        """Groups in which h is made and used: with sequential residual one a stage of a row of down, where those are few and alike."""
        up = self.config.intermediate_size
        parts = -(-up * ELEMENT_BYTES // self.tile_bytes)
        groups, rest = divmod(parts, self.stage_tiles)
        fit = not rest and groups <= MOST_GROUPS and up // VECTOR % parts == 0
        return groups if fit and not self.config.parallel_residual else 1

    def hidden_group(self, group: int) -> range:
        """The elements of h, rows of up, in a group."""
        size = self.config.intermediate_size // self.hidden_groups
        return range(group * size, (group + 1) * size)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The launches of the split form, in order."""
        if self.config.parallel_residual:
            return ("project", "attend", "output")
        return ("project", "attend", "output", "expand", "contract")

    @property
    def scratch_sizes(self) -> dict[str, int]:
        """Bytes of each scratch buffer of a context, by the kernel's name for it; multiples of 128."""
        c = self.config
        return {
            name: round_up(size, TENSOR_COPY_ALIGNMENT)
            for name, size in {
                "qkv": PAIR_BYTES * qkv_rows(c),
                "partials": 4 * c.num_heads * self.partials_per_head * (c.head_dim + PARTIAL_PADDING),
                "middle": 4 * c.hidden_size,
                "h": ELEMENT_BYTES * c.intermediate_size,
                "counters": COUNTER_BYTES,
            }.items()
        }

    @property
    def scratch_bytes(self) -> int:
        """Device memory of one context beside weights and K/V: q, k, v, partials, the middle residual, h,
        counters."""
        return sum(self.scratch_sizes.values())

    def rows_before_cached(self, rows: range) -> range:
        """With `up_first`, a CTA's rows of the down projection that come before its cached tokens."""
        return range(rows.start, rows.start + len(rows) * self.fifths_before_cached // 5)

    def attends(self, cta: int) -> bool:
        """Whether a CTA takes part of a bundle's cached tokens."""
        return cta < self.bundles * self.splits

    def works(self, cta: int, position: int) -> bool:
        """Whether a CTA's cluster has a partial to make: of some of `position` cached tokens, or of the new one."""
        return self.attends(cta) and cta % self.splits // self.merged_ctas < self.used_partials(position)

    def kv_head(self, cta: int) -> int:
        """The K/V head that a CTA attends."""
        return cta // self.splits * self.queries // (self.config.num_heads // self.config.num_kv_heads)

    def head_group(self, cta: int) -> int:
        """The head group of the K/V head that a CTA attends."""
        return self.kv_head(cta) // (self.config.num_kv_heads // self.head_groups)

    def group_qkv(self, group: int) -> range:
        """The rows of q, k and v in a head group."""
        size = qkv_rows(self.config) // self.head_groups
        return range(group * size, (group + 1) * size)

    def attended_rows(self, cta: int) -> tuple[range, ...]:
        """The rows of q, k and v that a CTA needs for its bundle."""
        size, group = self.config.head_dim, self.kv_head(cta) * self.group_rows
        heads = self.config.num_heads // self.config.num_kv_heads
        if self.queries == heads:
            return (range(group, group + self.group_rows),)
        first = group + cta // self.splits * self.queries % heads * size
        return range(first, first + self.queries * size), range(group + heads * size, group + self.group_rows)

    def rows(self, total: int, cta: int) -> range:
        """The rows of a matrix of `total` rows that a CTA reads; of q, k and v, `qkv_groups`, of the up projection, `up_groups`."""
        return range(total * cta // self.ctas, total * (cta + 1) // self.ctas)

    def qkv_groups(self, cta: int) -> tuple[range, ...]:
        """The rows of q, k and v that a CTA reads, of each head group: in all as many as `rows` has."""
        total = qkv_rows(self.config)
        mine = self.rows(total, cta)
        return by_groups(mine.start, mine.stop, total, self.head_groups)

    def up_groups(self, cta: int) -> tuple[range, ...]:
        """The rows of the up projection that a CTA reads, of each hidden group: in all so many that its share of all of a layer's
        weights is even to within a row, where it has enough of them to make up for a row of every other matrix."""
        return by_groups(self._up_row(cta), self._up_row(cta + 1), self.config.intermediate_size, self.hidden_groups)

    def _up_row(self, cta: int) -> int:
        hidden, up, qkv = self.config.hidden_size, self.config.intermediate_size, qkv_rows(self.config)
        out = self.config.q_size + up  # elements of a row of o and one of down
        up_row = self.up_times * hidden
        if up < (out // hidden + 3) * self.ctas:
            return up * cta // self.ctas
        layer = hidden * (qkv + out) + up * up_row
        others = qkv * cta // self.ctas * hidden + hidden * cta // self.ctas * out
        return (layer * cta // self.ctas - others) // up_row


def why_not(config: DecoderConfig) -> str | None:
    """What keeps the program from running this model, or None."""
    if config.hidden_size % VECTOR:
        return f"hidden_size is {config.hidden_size}; the kernels need a multiple of {VECTOR}"
    if config.head_dim % VECTOR or config.head_dim > MAX_HEAD_DIM:
        return f"head_dim is {config.head_dim}; the kernels need a multiple of {VECTOR} up to {MAX_HEAD_DIM}"
    if config.intermediate_size % VECTOR:
        return f"intermediate_size is {config.intermediate_size}; the kernels need a multiple of {VECTOR}"
    return None


def plan_block(config: DecoderConfig, limits: PlanLimits) -> BlockPlan:
    """A plan that passes check_plan. Raises UnsupportedModelError where the model or the device rules one out."""
    obstacle = why_not(config)
    if obstacle:
        raise UnsupportedModelError(obstacle)
    # Every CTA has a row of the residual vector, for which all others wait in every layer: nobody falls behind by two.
    ctas = min(limits.multiprocessors, config.hidden_size) // CLUSTER_SIZE * CLUSTER_SIZE
    if ctas == 0:
        raise UnsupportedModelError(
            f"a cluster takes {CLUSTER_SIZE} multiprocessors and as many rows of hidden_size; {limits.name} has "
            f"{limits.multiprocessors}, the model {config.hidden_size}"
        )
    plans = [_plan(config, limits, ctas, queries) for queries in bundle_sizes(config)]
    enough = enough_bytes(config, limits)
    plans = [plan for plan in plans if plan.bundles <= ctas] or plans[:1]
    deep = [plan for plan in plans if plan.stages * plan.stage_bytes >= enough]
    plan = deep[0] if deep else max(plans, key=lambda plan: plan.stages)
    if plan.bundles > ctas:
        what = "heads" if plan.queries == 1 else f"bundles of {plan.queries} heads"
        raise UnsupportedModelError(
            f"{plan.bundles} {what} need as many CTAs, of which there are {ctas}: {limits.name} has {limits.multiprocessors} "
            f"multiprocessors, the model a hidden_size of {config.hidden_size}"
        )
    if plan.stages <= 0:
        raise UnsupportedModelError(
            f"hidden_size {config.hidden_size}, {config.num_heads} heads of {config.head_dim} and intermediate_size "
            f"{config.intermediate_size} need {min(plan.shared_bytes for plan in plans)} bytes of shared memory a block; "
            f"{limits.name} has {limits.shared_bytes_per_block}"
        )
    require_dealt_out(config, limits.name, ctas)
    check_plan(plan)
    return plan


def require_dealt_out(config: DecoderConfig, name: str, ctas: int) -> None:
    """Raise UnsupportedModelError if a GPU of that name does not deal out the vocabulary's rows to so many CTAs."""
    if not _deals_out(config, ctas):
        raise UnsupportedModelError(f"vocab_size is {config.vocab_size}; {name} deals out fewer rows in 32 bits")


def _deals_out(config: DecoderConfig, ctas: int) -> bool:
    """Whether the rows of the largest matrix, and a CTA's bytes of it, are numbers of 32 bits."""
    row_bytes = config.hidden_size * ELEMENT_BYTES
    return config.vocab_size * ctas < 2**32 and (config.vocab_size // ctas + 1) * row_bytes < 2**31


def _plan(config: DecoderConfig, limits: PlanLimits, ctas: int, queries: int) -> BlockPlan:
    """The plan with such bundles; without a stage, and what it would take at least, where shared memory does not suffice."""
    bundles = config.num_heads // queries
    splits = max(1, min(ctas // bundles, MOST_SPLITS if queries == 1 else MOST_SHARED_SPLITS))
    if splits > 1:
        splits = splits // CLUSTER_SIZE * CLUSTER_SIZE
    ring = choose_ring(config, limits, ctas, queries)
    up_bytes = config.intermediate_size * config.hidden_size * ELEMENT_BYTES // ctas
    return BlockPlan(
        config=config,
        limits=limits,
        ctas=ctas,
        cluster_size=CLUSTER_SIZE,
        queries=queries,
        splits=splits,
        up_first=config.parallel_residual and up_bytes >= UP_FIRST_BYTES,
        fifths_before_cached=FIFTHS_BEFORE_CACHED,
        **ring._asdict(),
    )


# -- the check ---------------------------------------------------------------------------------------------------------


def schedule(plan: BlockPlan, cta: int, role: Role) -> Iterator[Step]:
    """What a role of a CTA does in the fused launch, in order, as VectorWarps::run and TileWarps::run in the program."""
    c = plan.config
    out = plan.rows(c.hidden_size, cta)
    if role == "tiles":
        scaled = (Step("await", "scaled"),) if c.norm == "rms_norm" else ()
        expand: tuple[Step, ...] = ()
        if scaled and not c.gated_mlp:
            if not c.parallel_residual:
                expand = (Step("await", "middle_scaled"),)
            elif plan.up_first:
                expand, scaled = scaled, ()
        for group, rows in enumerate(plan.up_groups(cta)):
            expand += (Step("read", "up", rows), Step("signal", of_group("expanded", group)))
            if not c.gated_mlp:
                expand += (Step("arrive", of_group("hidden", group)),)
        project: tuple[Step, ...] = ()
        for group, rows in enumerate(plan.qkv_groups(cta)):
            project += (Step("read", "qkv", rows), *scaled, Step("publish", "qkv", rows))
            project += (Step("signal", of_group("projected", group)),)
        cached: tuple[Step, ...] = ()
        if plan.attends(cta):
            cached = (Step("await", "queries"), Step("signal", "slots"))
        down: tuple[Step, ...] = ()
        for group in range(plan.hidden_groups):
            down += (Step("await", of_group("hidden", group)), Step("read", of_group("down", group), out))
        if plan.up_first:
            first = plan.rows_before_cached(out)
            down = (*down[:1], Step("read", "down", first), *cached, Step("read", "down", range(first.stop, out.stop)))
        output: tuple[Step, ...] = ()
        for group in range(plan.head_groups):
            output += (Step("await", of_group("attended", group)), Step("read", of_group("o", group), out))
        output += (Step("signal", "output_sums"),)
        yield Step("await", "normed")
        if c.parallel_residual:
            yield from (*expand, *project) if plan.up_first else (*project, *expand, *cached)
            yield from (*down, *output)
        else:
            yield from (*project, *cached, *output, Step("await", "middle_normed"), *expand, *down)
            yield Step("signal", "down_sums")
        return

    hidden: tuple[Step, ...] = ()
    for group in range(plan.hidden_groups):
        name = of_group("hidden", group)
        all_hidden, expanded = Step("wait", name, target=plan.ctas), Step("await", of_group("expanded", group))
        # With a gate, the vector warps finish the rows.
        hidden += (expanded, Step("arrive", name), all_hidden) if c.gated_mlp else (all_hidden, expanded)
        hidden += (Step("signal", name),)
    yield Step("signal", "normed")
    if c.norm == "rms_norm":
        yield Step("signal", "scaled")
    if plan.up_first:
        yield from hidden
    if plan.attends(cta):
        yield Step("await", of_group("projected", plan.head_group(cta)))
        for rows in plan.attended_rows(cta):
            yield Step("wait", "qkv", rows)
        yield Step("signal", "queries")
        yield Step("await", "slots")
        if plan.merged_ctas > 1:
            yield Step("arrive", f"exchange of cluster {cta // plan.cluster_size}")
            yield Step("wait", f"exchange of cluster {cta // plan.cluster_size}", target=plan.merged_ctas)
        if plan.merged_ctas == 1 or cta % plan.cluster_size == 0:
            yield Step("arrive", of_group("attention", plan.head_group(cta)))
    if c.parallel_residual and not plan.up_first:
        yield from hidden
    for group in range(plan.head_groups):
        arrivals = plan.bundles // plan.head_groups * plan.partials_per_head
        yield Step("wait", of_group("attention", group), target=arrivals)
        yield from (Step("await", of_group("projected", each)) for each in range(plan.head_groups))
        yield Step("signal", of_group("attended", group))
    yield Step("await", "output_sums")
    if not c.parallel_residual:
        yield Step("arrive", "middle")
        yield Step("wait", "middle", target=plan.ctas)
        yield Step("signal", "middle_normed")
        if c.norm == "rms_norm" and not c.gated_mlp:
            yield Step("signal", "middle_scaled")
        yield from hidden
        yield Step("await", "down_sums")


def check_plan(plan: BlockPlan) -> None:
    """Raise AssertionError with the values unless the plan covers every row once, fits, and cannot deadlock."""
    c = plan.config
    check(plan.shared_bytes <= plan.limits.shared_bytes_per_block, "shared memory", plan.shared_bytes)
    check(plan.ctas <= plan.limits.multiprocessors, "one CTA a multiprocessor", plan.ctas)
    check(_deals_out(c, plan.ctas), "rows are dealt out, and their bytes counted, in 32 bits", c.vocab_size)
    check(plan.ctas <= c.hidden_size, "a row of the residual vector for every CTA", plan.ctas)
    check(plan.ctas % plan.cluster_size == 0, "whole clusters", plan.ctas)
    check((c.num_heads // c.num_kv_heads) % plan.queries == 0, "a bundle's heads share a K/V head", plan.queries)
    check(plan.bundles * plan.splits <= plan.ctas, "CTAs for every bundle", plan.splits)
    check(plan.splits == 1 or plan.splits % plan.cluster_size == 0, "a cluster works on one bundle", plan.splits)
    check(not plan.up_first or c.parallel_residual, "sequential residual has one order", plan.up_first)
    groups = plan.head_groups
    check(0 < groups <= (1 if c.parallel_residual else MOST_GROUPS), "a counter for each head group", groups)
    check(c.num_kv_heads % groups == 0, "head groups are alike", groups)
    o_bytes = c.q_size // groups * ELEMENT_BYTES
    check(groups == 1 or o_bytes <= plan.tile_bytes, "what a head group is for of a row of o fits a tile", o_bytes)
    check(plan.warps % plan.stage_tiles == 0, "a team has a warp for each tile of a stage", plan.warps)
    check(0 < plan.window_stages <= plan.stages, "the window is part of the ring", plan.window_stages)
    check(0 < plan.early_stages <= plan.window_stages, "no more in flight early than else", plan.early_stages)
    teams = plan.warps // plan.stage_tiles
    told_apart = tells_uses_apart(plan.stages, teams, plan.window_stages)
    check(told_apart, "no wait can see an older use of its stage", (plan.stages, teams, plan.window_stages))
    check(0 <= plan.fifths_before_cached <= 5, "cached tokens are among the rows of down", plan.fifths_before_cached)
    check(plan.tile_bytes % 128 == 0, "tile alignment", plan.tile_bytes)
    check(c.hidden_size * ELEMENT_BYTES <= plan.tile_bytes, "a row of hidden_size fits a tile", plan.tile_bytes)
    check(plan.stage_tiles == 1 or even_parts(c, plan.tile_bytes), "tiles of a stage are alike", plan.stage_tiles)
    check(cache_tile_bytes(c, plan.tile_tokens) <= plan.tile_bytes, "cached tokens fit a tile", plan.tile_tokens)
    check(plan.threads <= 1024, "threads of a CTA", plan.threads)
    check(0 < plan.tile_tokens <= MAX_TILE_TOKENS, "a tensor copy's box", plan.tile_tokens)
    schedules = {(cta, role): list(schedule(plan, cta, role)) for cta in range(plan.ctas) for role in ROLES}
    check_coverage(c, plan.head_groups, plan.hidden_groups, schedules)
    check_progress(c, schedules)
