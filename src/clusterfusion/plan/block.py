"""The plan of one decoder layer: rows to CTAs, heads to clusters, ring and window; and a check of it.

The program it describes is cuda/programs/decoder_block.cu. CTA c of G reads rows [c R / G, (c + 1) R / G) of a matrix of
R rows, but for the up projection's, which even out what the others leave uneven; in tiles of whole rows, or of parts of a row
that is longer than a stage. Head h belongs to the `splits` CTAs from
h * splits on, whole clusters, which take its cached tokens tile by tile in turn.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator
from typing import Literal

from clusterfusion.architecture import DecoderConfig
from clusterfusion.errors import UnsupportedModelError
from clusterfusion.plan.limits import PlanLimits

ELEMENT_BYTES = 2  # weights and K/V are 16-bit
VECTOR = 8  # elements in 16 bytes, the unit of bulk copies
MAX_HEAD_DIM = 256
# One CTA merges what a head's clusters give, in registers.
MOST_SPLITS = 32
# 132 or 128 CTAs are resident in clusters of 2 on an H200, only 120 in clusters of 4: a tenth of the bandwidth.
CLUSTER_SIZE = 2
# Tile warps to choose from, the most that leave the ring as deep as it can be, or nearly; fewer where shared memory is scarce.
WARPS = (6, 7, 8, 9, 10, 11)
SCARCE_WARPS = (2, 3, 4, 5)
DEEP_ENOUGH = 0.95
# Vector warps hold a vector of hidden_size in registers between them: three quads a thread and the norms' weights for them.
FEWEST_VECTOR_WARPS, MOST_VECTOR_WARPS = 6, 8
SCARCE_VECTOR_WARPS = 4
QUADS_A_THREAD = 3
# Vector, tile and producer warps together: with more, a thread has fewer than 128 registers.
MOST_WARPS = 16
# The vector warps' stages for cached tokens: so much is in flight beside the stream of weights.
CACHE_BYTES = 32768
WIDE_HIDDEN_SIZE = 3072  # from here on vectors take the room, and a layer's weights last long enough for half as much
SCARCE_CACHE_BYTES = 8192
SCARCE_SHARED_BYTES = 128 * 1024
# Measured on an H200 with the whole step of 2.8B and 6.9B: 50 and 64 KB in flight are best. Messages between CTAs queue behind
# what is in flight, and the more often a layer's weights wait for one, the more that costs. Copies of 5 KB and less are slow.
TARGET_STAGE_BYTES = 8192
MOST_STAGE_TILES = 4
WINDOW_BYTES = 51200
WIDE_WINDOW_BYTES = 65536
MAX_STAGES = 64
# With so much of the up projection a CTA, q, k and v behind it hide the wait for h; with less, attention is what takes long,
# and starts as early as it can.
UP_FIRST_BYTES = 200 * 1024
PARTIAL_PADDING = 4  # floats beside a head's values in a partial: maximum, sum, and two to fill 16 bytes
PAIR_BYTES = 8  # a float and its epoch
COUNTER_BYTES = 4 * 128  # four counters, each on a cache line of its own
TENSOR_COPY_ALIGNMENT = 128  # bytes, in shared memory
MAX_TILE_PASSES = 16  # of a warp over a tile: their scores are in registers
MAX_TILE_TOKENS = 256  # the longest side of a tensor copy's box
BARRIER_BYTES = 16  # of a stage: one mbarrier for full, one for empty

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
    splits: int  # CTAs that share a head's cached tokens
    up_first: bool  # with parallel residual: up before q, k, v
    vector_warps: int  # norms, attention, activations
    warps: int  # tile warps: weights times vectors; one producer warp comes on top
    stages: int  # of the ring of weights
    tile_bytes: int  # what a warp takes at a time
    stage_tiles: int  # tiles that are copied together, for as many warps
    window_stages: int
    tile_tokens: int  # cached tokens whose keys and values travel as one tile
    cache_stages: int  # of the ring of cached tokens
    cache_stage_bytes: int
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
            name: _round_up(size, TENSOR_COPY_ALIGNMENT)
            for name, size in {
                "qkv": PAIR_BYTES * 3 * c.hidden_size,
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

    def rows(self, total: int, cta: int) -> range:
        """The rows of a matrix of `total` rows that a CTA reads; of the up projection, `up_rows`."""
        return range(total * cta // self.ctas, total * (cta + 1) // self.ctas)

    def up_rows(self, cta: int) -> range:
        """The rows of the up projection that a CTA reads: so many that its share of all of a layer's weights is even to within
        a row, where it has enough of them to make up for a row of every other matrix."""
        return range(self._up_row(cta), self._up_row(cta + 1))

    def _up_row(self, cta: int) -> int:
        hidden, up = self.config.hidden_size, self.config.intermediate_size
        out = hidden + up  # elements of a row of o and one of down
        if up < (out // hidden + 3) * self.ctas:
            return up * cta // self.ctas
        layer = hidden * (3 * hidden + up + out)
        others = 3 * hidden * cta // self.ctas * hidden + hidden * cta // self.ctas * out
        return (layer * cta // self.ctas - others) // hidden


def why_not(config: DecoderConfig) -> str | None:
    """What keeps the program from running this model, or None."""
    if config.family != "gpt_neox":
        return f"the fused kernels run GPT-NeoX models so far, and this is {config.family}"
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
    if config.num_heads > ctas:
        raise UnsupportedModelError(f"{config.num_heads} heads need as many CTAs; {limits.name} holds {ctas}")
    splits = min(ctas // config.num_heads, MOST_SPLITS)
    if splits > 1:
        splits = splits // CLUSTER_SIZE * CLUSTER_SIZE
    row_bytes = config.hidden_size * ELEMENT_BYTES
    # A row a tile, so that a phase spreads evenly over the warps; as many tiles a copy as make it large.
    tile_bytes = _round_up(row_bytes, TENSOR_COPY_ALIGNMENT)
    stage_tiles = 1
    while stage_tiles < MOST_STAGE_TILES and tile_bytes * stage_tiles * 3 // 2 <= TARGET_STAGE_BYTES:
        stage_tiles *= 2
    if not even_parts(config, tile_bytes):
        stage_tiles = 1
    stage_bytes = tile_bytes * stage_tiles
    vector_warps = -(-config.hidden_size // (4 * 32 * QUADS_A_THREAD))
    scarce = limits.shared_bytes_per_block < SCARCE_SHARED_BYTES
    vector_warps = SCARCE_VECTOR_WARPS if scarce else min(max(vector_warps, FEWEST_VECTOR_WARPS), MOST_VECTOR_WARPS)
    wide = config.hidden_size >= WIDE_HIDDEN_SIZE
    up_bytes = config.intermediate_size * row_bytes // ctas
    cache_stages = vector_warps if wide or scarce else 2 * vector_warps
    cache_bytes = SCARCE_CACHE_BYTES if scarce else CACHE_BYTES // 2 if wide else CACHE_BYTES
    tile_tokens = cache_tile_tokens(config, cache_bytes // cache_stages)
    cache_stage_bytes = _round_up(_tile_bytes(config, tile_tokens), TENSOR_COPY_ALIGNMENT)

    def fixed(warps: int) -> int:
        return fixed_shared_bytes(config, ctas, tile_bytes, warps, vector_warps, cache_stages, cache_stage_bytes)

    def stages_with(warps: int) -> int:
        room = (limits.shared_bytes_per_block - fixed(warps)) // (stage_bytes + BARRIER_BYTES)
        teams = warps // stage_tiles
        return min(room, MAX_STAGES) // teams * teams

    allowed = [w for w in WARPS if w + vector_warps < MOST_WARPS and w % stage_tiles == 0]
    if not any(stages_with(w) > 0 for w in allowed):
        allowed = [w for w in SCARCE_WARPS if w % stage_tiles == 0]
    deepest = max(map(stages_with, allowed))
    warps = max(w for w in allowed if stages_with(w) >= DEEP_ENOUGH * deepest)
    stages = stages_with(warps)
    if stages <= 0:
        raise UnsupportedModelError(
            f"hidden_size {config.hidden_size} needs {fixed(2) + 2 * (stage_bytes + BARRIER_BYTES)} bytes of shared memory "
            f"a block; {limits.name} has {limits.shared_bytes_per_block}"
        )
    plan = BlockPlan(
        config=config,
        limits=limits,
        ctas=ctas,
        cluster_size=CLUSTER_SIZE,
        splits=splits,
        up_first=config.parallel_residual and up_bytes >= UP_FIRST_BYTES,
        vector_warps=vector_warps,
        warps=warps,
        stages=stages,
        tile_bytes=tile_bytes,
        stage_tiles=stage_tiles,
        window_stages=max(1, min(stages, (WIDE_WINDOW_BYTES if wide else WINDOW_BYTES) // stage_bytes)),
        tile_tokens=tile_tokens,
        cache_stages=cache_stages,
        cache_stage_bytes=cache_stage_bytes,
        shared_bytes=fixed(warps) + stages * (stage_bytes + BARRIER_BYTES),
    )
    check_plan(plan)
    return plan


def cache_tile_tokens(config: DecoderConfig, stage_bytes: int) -> int:
    """The most cached tokens whose tile fits `stage_bytes`, in whole passes of a warp; one pass if none does."""
    together = 32 // (config.head_dim // VECTOR)  # that a warp takes at once
    tokens = together
    while (
        tokens + together <= min(MAX_TILE_TOKENS, MAX_TILE_PASSES * together)
        and _tile_bytes(config, tokens + together) <= stage_bytes
    ):
        tokens += together
    return tokens


def even_parts(config: DecoderConfig, tile_bytes: int) -> bool:
    """Whether a row of intermediate_size is cut into tiles that are all alike."""
    vectors, parts = config.intermediate_size // VECTOR, -(-config.intermediate_size * ELEMENT_BYTES // tile_bytes)
    return vectors % parts == 0


def fixed_shared_bytes(
    config: DecoderConfig,
    ctas: int,
    tile_bytes: int,
    warps: int,
    vector_warps: int,
    cache_stages: int,
    cache_stage_bytes: int,
) -> int:
    """Shared memory beside the ring of weights, in the order of the program's struct, with room for its padding. The
    program asserts at compile time that its struct fits."""
    c = config
    vector = 4 * c.hidden_size
    vectors = max(2 * vector, vector + _round_up(c.intermediate_size * ELEMENT_BYTES, 16))
    partial = 4 * (c.head_dim + PARTIAL_PADDING)
    out_rows = -(-c.hidden_size // ctas) + 1
    down_parts = -(-c.intermediate_size * ELEMENT_BYTES // tile_bytes)
    attention = 3 * 4 * c.head_dim + (vector_warps + 1) * partial + 2 * CLUSTER_SIZE * partial
    bias_rows = sum(-(-rows // ctas) + 1 for rows in (3 * c.hidden_size, c.intermediate_size)) + 2 * out_rows
    bias_rows += 3 + -(-c.intermediate_size // c.hidden_size)  # that up may have more
    # o and down sums, biases, and the CTA's rows of the residual; a candidate a tile warp.
    rows = 4 * (out_rows * (2 + down_parts) + bias_rows) + 16 * warps
    return vectors + attention + rows + cache_stages * (cache_stage_bytes + BARRIER_BYTES) + 640


def _tile_bytes(config: DecoderConfig, tokens: int) -> int:
    """Of a stage that holds the keys and, behind them, the values of so many tokens of a head."""
    half = tokens * config.head_dim * ELEMENT_BYTES
    return _round_up(half, TENSOR_COPY_ALIGNMENT) + half


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


# -- the check ---------------------------------------------------------------------------------------------------------


Role = Literal["vectors", "tiles"]
ROLES: tuple[Role, ...] = ("vectors", "tiles")


@dataclasses.dataclass(frozen=True)
class Step:
    """One thing that a role of a CTA does in the fused launch: read rows of a matrix, publish rows as pairs of value and epoch
    or wait for some, arrive at a counter or wait for one, signal the CTA's other role or await its signal."""

    kind: Literal["read", "publish", "arrive", "wait", "signal", "await"]
    name: str
    rows: range = range(0)
    target: int = 0


def schedule(plan: BlockPlan, cta: int, role: Role) -> Iterator[Step]:
    """What a role of a CTA does in the fused launch, in order; VectorWarps::run and TileWarps::run in the program do the
    same."""
    c = plan.config
    qkv, out = (plan.rows(rows, cta) for rows in (3 * c.hidden_size, c.hidden_size))
    if role == "tiles":
        expand = (Step("read", "up", plan.up_rows(cta)), Step("signal", "expanded"), Step("arrive", "hidden"))
        project = (Step("read", "qkv", qkv), Step("publish", "qkv", qkv), Step("signal", "projected"))
        down = (Step("await", "hidden"), Step("read", "down", out))
        output = (Step("await", "attended"), Step("read", "o", out), Step("signal", "output_sums"))
        yield Step("await", "normed")
        if c.parallel_residual:
            yield from (*expand, *project) if plan.up_first else (*project, *expand)
            yield from (*down, *output)
        else:
            yield from (*project, *output, Step("await", "middle_normed"), *expand, *down)
            yield Step("signal", "down_sums")
        return
    hidden = (Step("wait", "hidden", target=plan.ctas), Step("await", "expanded"), Step("signal", "hidden"))
    yield Step("signal", "normed")
    if plan.up_first:
        yield from hidden
    if cta < c.num_heads * plan.splits:
        head = cta // plan.splits
        yield Step("wait", "qkv", range(head * 3 * c.head_dim, (head + 1) * 3 * c.head_dim))
        if plan.merged_ctas > 1:
            yield Step("arrive", f"exchange of cluster {cta // plan.cluster_size}")
            yield Step("wait", f"exchange of cluster {cta // plan.cluster_size}", target=plan.merged_ctas)
        if plan.merged_ctas == 1 or cta % plan.cluster_size == 0:
            yield Step("arrive", "attention")
    if c.parallel_residual and not plan.up_first:
        yield from hidden
    yield Step("wait", "attention", target=c.num_heads * plan.partials_per_head)
    yield Step("await", "projected")
    yield Step("signal", "attended")
    yield Step("await", "output_sums")
    if not c.parallel_residual:
        yield Step("arrive", "middle")
        yield Step("wait", "middle", target=plan.ctas)
        yield Step("signal", "middle_normed")
        yield from hidden
        yield Step("await", "down_sums")


def check_plan(plan: BlockPlan) -> None:
    """Raise AssertionError with the values unless the plan covers every row once, fits, and cannot deadlock."""
    c = plan.config
    _check(plan.shared_bytes <= plan.limits.shared_bytes_per_block, "shared memory", plan.shared_bytes)
    _check(plan.ctas <= plan.limits.multiprocessors, "one CTA a multiprocessor", plan.ctas)
    _check(plan.ctas <= c.hidden_size, "a row of the residual vector for every CTA", plan.ctas)
    _check(plan.ctas % plan.cluster_size == 0, "whole clusters", plan.ctas)
    _check(c.num_heads * plan.splits <= plan.ctas, "CTAs for every head", plan.splits)
    _check(plan.splits == 1 or plan.splits % plan.cluster_size == 0, "a cluster works on one head", plan.splits)
    _check(not plan.up_first or c.parallel_residual, "sequential residual has one order", plan.up_first)
    _check(plan.warps % plan.stage_tiles == 0, "a team has a warp for each tile of a stage", plan.warps)
    _check(plan.stages % (plan.warps // plan.stage_tiles) == 0, "a stage belongs to one team", plan.stages)
    _check(0 < plan.window_stages <= plan.stages, "the window is part of the ring", plan.window_stages)
    _check(plan.tile_bytes % 128 == 0, "tile alignment", plan.tile_bytes)
    _check(c.hidden_size * ELEMENT_BYTES <= plan.tile_bytes, "a row of hidden_size fits a tile", plan.tile_bytes)
    _check(plan.stage_tiles == 1 or even_parts(c, plan.tile_bytes), "tiles of a stage are alike", plan.stage_tiles)
    _check(
        _tile_bytes(c, plan.tile_tokens) <= plan.cache_stage_bytes, "a tile of tokens fits a stage", plan.tile_tokens
    )
    _check(
        plan.cache_stages % plan.vector_warps == 0, "a stage of cached tokens belongs to one warp", plan.cache_stages
    )
    _check(plan.cache_stages > 0 and plan.cache_stage_bytes % 128 == 0, "cached tokens' stages", plan.cache_stage_bytes)
    _check(plan.threads <= 1024, "threads of a CTA", plan.threads)
    _check(0 < plan.tile_tokens <= MAX_TILE_TOKENS, "a tensor copy's box", plan.tile_tokens)
    _check_coverage(plan)
    _check_progress(plan)


def _check_coverage(plan: BlockPlan) -> None:
    c = plan.config
    sizes = {"qkv": 3 * c.hidden_size, "up": c.intermediate_size, "o": c.hidden_size, "down": c.hidden_size}
    dealt: dict[tuple[str, str], list[range]] = collections.defaultdict(list)
    for cta in range(plan.ctas):
        for step in schedule(plan, cta, "tiles"):
            if step.kind in ("read", "publish") and step.rows:
                dealt[step.kind, step.name].append(step.rows)
    for kind, name in [*(("read", name) for name in sizes), ("publish", "qkv")]:
        end = 0
        for rows in sorted(dealt[kind, name], key=lambda r: r.start):
            _check(rows.start == end, f"every row of {name} is {kind} once", rows)
            end = rows.stop
        _check(end == sizes[name], f"all rows of {name} are {kind}", end)


def _check_progress(plan: BlockPlan) -> None:
    """Runs all roles of all CTAs against one another: all resident, each as far as its waits let it. Every signal is awaited,
    or it would say nothing."""
    counters: collections.Counter[str] = collections.Counter()
    published = bytearray(3 * plan.config.hidden_size)  # rows of q, k and v
    pending = {(cta, role): collections.deque(schedule(plan, cta, role)) for cta in range(plan.ctas) for role in ROLES}
    signals, awaits = (
        {(cta, step.name) for (cta, _), steps in pending.items() for step in steps if step.kind == kind}
        for kind in ("signal", "await")
    )
    _check(signals <= awaits, "every signal is awaited", sorted(signals - awaits)[:3])
    given: set[tuple[int, str]] = set()

    def met(cta: int, step: Step) -> bool:
        if step.kind == "await":
            return (cta, step.name) in given
        if step.kind != "wait":
            return True
        return all(published[step.rows.start : step.rows.stop]) and counters[step.name] >= step.target

    moved = True
    while pending and moved:
        moved = False
        for (cta, role), steps in list(pending.items()):
            while steps and met(cta, steps[0]):
                step = steps.popleft()
                counters[step.name] += step.kind == "arrive"
                if step.kind == "signal":
                    given.add((cta, step.name))
                if step.kind == "publish":
                    published[step.rows.start : step.rows.stop] = bytes([1]) * len(step.rows)
                moved = True
            if not steps:
                del pending[cta, role]
    _check(not pending, "no deadlock", {actor: steps[0] for actor, steps in list(pending.items())[:3]})


def _check(ok: bool, what: str, seen: object) -> None:
    if not ok:
        raise AssertionError(f"plan: {what}: {seen}")
