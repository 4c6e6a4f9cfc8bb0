"""The schedule of a whole decode step in one launch, as data: every layer, the final norm, the LM head, the choice.

It uses the plan of one decoder layer (plan/block.py) for all of them, its deal of rows to CTAs too: of every matrix, the LM
head included, and of the residual stream x. A CTA has two roles that go on side by side, each in its own
order: its tile warps multiply weights, its vector warps make what they are multiplied by. `step_schedule` says what a role
does and in which order; the tile warps' reads, weights and cached tokens, in the same order, are what the producer copies through the ring.
plan/step_check.py proves it sound.

What CTAs tell one another: counters, which only grow (token; attention, one a head group; hidden, one a group of h; exchange, one a cluster), and vectors whose
rows tell of themselves whose they are, qkv as pairs of value and epoch, x and for sequential residual middle by a mark in the value, and need
no counter. What the roles of a CTA tell each other: signals, once a layer each, that are awaited by the layer's parity; for each group one
of its own. An RMSNorm's factor, and the layer's biases, follow the vector that it belongs to.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

from clusterfusion.plan.block import MATRICES, BlockPlan
from clusterfusion.plan.block_check import Role, of_group
from clusterfusion.plan.sizes import ELEMENT_BYTES, VECTOR

X_BUFFERS = 2  # of the residual stream, middle included, in turn; every other vector has one

TAGGED = ("qkv", "x", "middle")


class Action(NamedTuple):
    """One thing that a role of a CTA does in a step.

    read: take `rows` of the matrix `name` of `layer`, of "o" and "down" the parts that are multiplied by `group`; name "kv": the
        tiles `rows` of its bundle's cached tokens.
    finish: with a gated MLP: make the CTA's `rows` of h of the sums of up that its tile warps have left, and write them.
    publish: write the CTA's `rows` of the vector `name` of `layer`, each tagged. x of layer l is what layer l
        starts from, x of layer num_layers what the final norm takes.
    arrive: add one to the counter `name`.
    wait: until the counter `name` is `target` or more; for a tagged vector, until all `rows` are those of `layer`.
    load: from memory into registers: the vector `name`, of h and of attention's "partials" one group; x of layer 0 is the embedding of the token.
    place: from registers into the CTA's shared memory: `name`, a vector that tiles are multiplied by, of h and of attention one group.
    signal: that the CTA's other role may go on, and await: until it has said so for this layer.
    """

    kind: Literal["read", "finish", "publish", "arrive", "wait", "load", "place", "signal", "await"]
    name: str
    layer: int  # num_layers after the last one
    rows: range = range(0)
    target: int = 0
    group: int = 0  # of heads or of h, where it is about one

    @property
    def label(self) -> str:
        """The name, with the group."""
        return of_group(self.name, self.group)


class Stage(NamedTuple):
    """What one stage of the ring holds: `tiles` tiles, the first of which starts with row `first`, or is part `part` of it where
    a row has several; of name "kv", cached tokens from tile `first` on. Rows count as they are streamed: with a gate, two for a row of up."""

    name: str
    layer: int
    first: int
    part: int
    tiles: int
    bytes: int


def step_schedule(plan: BlockPlan, cta: int, role: Role, position: int = 0) -> Iterator[Action]:
    """What a role of a CTA does in one step with `position` cached tokens, in order."""
    c = plan.config
    of_layer = _vectors if role == "vectors" else _tiles
    for layer in range(c.num_layers):
        yield from of_layer(plan, cta, layer, position)
    last = c.num_layers
    if role == "vectors":
        yield Action("wait", "x", last, range(c.hidden_size))
        yield Action("load", "x", last)
        yield from _normed(plan, last)
    else:
        yield Action("await", "normed", last)
        yield Action("read", "lm_head", last, plan.rows(c.vocab_size, cta))
        if c.norm == "rms_norm":
            yield Action("await", "scaled", last)
        yield Action("arrive", "token", last)  # the last one to arrive chooses the token


def _normed(plan: BlockPlan, layer: int) -> Iterator[Action]:
    """The normed input of a layer, with the layer's biases."""
    yield Action("place", "normed", layer)
    yield Action("signal", "normed", layer)
    if plan.config.norm == "rms_norm":
        yield Action("place", "scale", layer)
        yield Action("signal", "scaled", layer)


def _bring(plan: BlockPlan, layer: int) -> Iterator[Action]:
    """Attention, head group by head group. Its place is a part of the normed input's, which q, k and v of all groups are made of."""
    arrivals = plan.bundles // plan.head_groups * plan.partials_per_head
    for group in range(plan.head_groups):
        yield Action("wait", "attention", layer, target=(layer + 1) * arrivals, group=group)
        yield Action("load", "partials", layer, group=group)
        yield from (Action("await", "projected", layer, group=each) for each in range(plan.head_groups))
        yield Action("place", "attended", layer, group=group)
        yield Action("signal", "attended", layer, group=group)


def _vectors(plan: BlockPlan, cta: int, layer: int, position: int) -> Iterator[Action]:
    """A layer of the vector warps: VectorWarps::run of the program."""
    c = plan.config
    out = plan.rows(c.hidden_size, cta)

    def wait(name: str, arrivals: int, group: int = 0) -> Action:
        return Action("wait", name, layer, target=(layer + 1) * arrivals, group=group)

    if layer:
        yield Action("wait", "x", layer, range(c.hidden_size))
    yield Action("load", "x", layer)
    yield from _normed(plan, layer)
    hidden: tuple[Action, ...] = ()
    for group, rows in enumerate(plan.up_groups(cta)):
        expanded = Action("await", "expanded", layer, group=group)
        bring = (wait("hidden", plan.ctas, group), Action("load", "h", layer, plan.hidden_group(group), group=group))
        if c.gated_mlp:  # whose rows the vector warps finish
            finish = Action("finish", "h", layer, rows, group=group)
            hidden += (expanded, finish, Action("arrive", "hidden", layer, group=group), *bring)
        else:
            hidden += (*bring, expanded)
        hidden += (Action("place", "hidden", layer, group=group), Action("signal", "hidden", layer, group=group))
    if plan.up_first:
        yield from hidden
    tells = plan.attends(cta) and (plan.merged_ctas == 1 or cta % plan.cluster_size == 0)
    if plan.works(cta, position):
        yield Action("await", "projected", layer, group=plan.head_group(cta))  # before, nobody else's are there either
        for kind in ("wait", "load"):
            for rows in plan.attended_rows(cta):
                yield Action(kind, "qkv", layer, rows)
        yield Action("place", "queries", layer)
        yield Action("signal", "queries", layer)
        yield Action("await", "slots", layer)
        if plan.merged_ctas > 1:
            yield Action("arrive", "exchange", layer)
            yield wait("exchange", plan.merged_ctas)
    if tells:  # of a cluster that has nothing to give, too: all have attended the layer before, whose x it has read
        yield Action("arrive", "attention", layer, group=plan.head_group(cta))
    if c.parallel_residual and not plan.up_first:
        yield from hidden
    yield from _bring(plan, layer)
    yield Action("await", "output_sums", layer)
    if not c.parallel_residual:
        yield Action("publish", "middle", layer, out)
        yield Action("wait", "middle", layer, range(c.hidden_size))
        yield Action("load", "middle", layer)
        yield Action("place", "middle_normed", layer)
        yield Action("signal", "middle_normed", layer)
        if c.norm == "rms_norm":
            yield Action("place", "middle_scale", layer)
            if not c.gated_mlp:  # the vector warps' own matter otherwise
                yield Action("signal", "middle_scaled", layer)
        yield from hidden
        yield Action("await", "down_sums", layer)
    yield Action("publish", "x", layer + 1, out)


def _tiles(plan: BlockPlan, cta: int, layer: int, position: int) -> Iterator[Action]:
    """A layer of the tile warps: TileWarps::run of the program."""
    c = plan.config
    out, works = plan.rows(c.hidden_size, cta), plan.works(cta, position)
    # The program awaits a factor when it has a row's sum: the vector that it belongs to is there by then.
    scaled = (Action("await", "scaled", layer),) if c.norm == "rms_norm" else ()
    expand: tuple[Action, ...] = ()
    if scaled and not c.gated_mlp:
        if not c.parallel_residual:
            expand = (Action("await", "middle_scaled", layer),)
        elif plan.up_first:
            expand, scaled = scaled, ()
    for group, rows in enumerate(plan.up_groups(cta)):
        expand += (Action("read", "up", layer, rows, group=group), Action("signal", "expanded", layer, group=group))
        if not c.gated_mlp:
            expand += (Action("arrive", "hidden", layer, group=group),)
    project: tuple[Action, ...] = ()
    for group, rows in enumerate(plan.qkv_groups(cta)):
        project += (Action("read", "qkv", layer, rows, group=group), *scaled)
        project += (Action("publish", "qkv", layer, rows, group=group),)
        project += (Action("signal", "projected", layer, group=group),)
    cached: tuple[Action, ...] = ()
    if works:
        tiles = cached_tiles(plan, cta, position)
        cached = (
            Action("await", "queries", layer),
            Action("read", "kv", layer, tiles),
            Action("signal", "slots", layer),
        )
    down: tuple[Action, ...] = ()
    for group in range(plan.hidden_groups):
        down += (Action("await", "hidden", layer, group=group), Action("read", "down", layer, out, group=group))
    if plan.up_first:
        first = plan.rows_before_cached(out)
        rest = Action("read", "down", layer, range(first.stop, out.stop))
        down = (*down[:1], Action("read", "down", layer, first), *cached, rest)
    output: tuple[Action, ...] = ()
    for group in range(plan.head_groups):
        output += (Action("await", "attended", layer, group=group), Action("read", "o", layer, out, group=group))
    output += (Action("signal", "output_sums", layer),)
    yield Action("await", "normed", layer)
    if c.parallel_residual:
        yield from (*expand, *project) if plan.up_first else (*project, *expand, *cached)
        yield from (*down, *output)
    else:
        yield from (*project, *cached, *output, Action("await", "middle_normed", layer), *expand, *down)
        yield Action("signal", "down_sums", layer)


def cached_tiles(plan: BlockPlan, cta: int, position: int) -> range:
    """The tiles of `plan.tile_tokens` cached tokens that a CTA takes of its bundle's, which has `position` tokens."""
    tiles = -(-position // plan.tile_tokens) if plan.attends(cta) else 0
    first, active = cta % plan.splits, plan.active_splits(position)
    return range(first, max(tiles, first) if first < active else first, active)


def version(plan: BlockPlan, name: str, layer: int) -> tuple[str, int]:
    """The memory that a vector of a layer is in, and as which of its versions: x and middle are versions of one stream."""
    if name not in ("x", "middle"):
        return name, layer
    return "x", layer if plan.config.parallel_residual else 2 * layer + (name == "middle")


# -- tiles -------------------------------------------------------------------------------------------------------------


def columns(plan: BlockPlan, name: str) -> int:
    """Elements in a row of a matrix."""
    c = plan.config
    return {"down": c.intermediate_size, "o": c.q_size}.get(name, c.hidden_size)


def streamed_rows(plan: BlockPlan, name: str, rows: range) -> range:
    """A CTA's rows of a matrix as they are streamed: with a gate, each row of up behind its gate's."""
    times = plan.up_times if name == "up" else 1
    return range(times * rows.start, times * rows.stop)


def rows_a_tile(plan: BlockPlan, name: str) -> int:
    """Whole rows of a matrix, of o what a head group is for of them, that travel as one tile; 1 where those take several tiles."""
    return max(1, plan.tile_bytes // (columns(plan, name) // _groups(plan, name) * ELEMENT_BYTES))


def row_parts(plan: BlockPlan, name: str) -> tuple[int, ...]:
    """The elements of a matrix's row that each of its tiles brings: one number unless the row is longer than a tile, or comes in groups."""
    groups = _groups(plan, name)
    elements = columns(plan, name) // groups
    parts = -(-elements * ELEMENT_BYTES // plan.tile_bytes)
    each = -(-elements // VECTOR // parts) * VECTOR
    return groups * tuple(min(each, elements - part * each) for part in range(parts))


def _groups(plan: BlockPlan, name: str) -> int:
    """Groups that a matrix's rows are cut for, ahead of tiles: a hidden group is of tiles as they come."""
    return plan.head_groups if name == "o" else 1


def group_parts(plan: BlockPlan, name: str, group: int) -> range:
    """Which of a row's parts are multiplied by a group: of o, of heads, and of down, of h. Of others, all."""
    parts = range(len(row_parts(plan, name)))
    groups = {"o": plan.head_groups, "down": plan.hidden_groups}.get(name)
    if groups is None:
        return parts
    each = len(parts) // groups
    return parts[group * each : (group + 1) * each]


def stages(plan: BlockPlan, read: Action) -> Iterator[Stage]:
    """The stages of the ring that a read takes, in order. A read starts with a stage of its own."""
    if read.name == "kv":
        tile = 2 * plan.tile_tokens * plan.config.head_dim * ELEMENT_BYTES
        for at in range(0, len(read.rows), plan.stage_tiles):
            cached = read.rows[at : at + plan.stage_tiles]
            yield Stage("kv", read.layer, cached[0], 0, len(cached), len(cached) * tile)
        return
    parts = row_parts(plan, read.name)
    here = group_parts(plan, read.name, read.group)
    step = rows_a_tile(plan, read.name)
    streamed = streamed_rows(plan, read.name, read.rows)
    tiles = [
        (first, part, min(step, streamed.stop - first) * parts[part] * ELEMENT_BYTES)
        for first in range(streamed.start, streamed.stop, step)
        for part in here
    ]
    for at in range(0, len(tiles), plan.stage_tiles):
        together = tiles[at : at + plan.stage_tiles]
        first, part, _ = together[0]
        yield Stage(read.name, read.layer, first, part, len(together), sum(size for _, _, size in together))


def producer_order(plan: BlockPlan, cta: int, position: int = 0) -> Iterator[Stage]:
    """The stages that a CTA's producer fills in one step with `position` cached tokens, in order, never more than `plan.stages`
    ahead of their use: TileProducer::run of the program."""
    c = plan.config
    out = plan.rows(c.hidden_size, cta)
    rows = {
        "qkv": plan.qkv_groups(cta),
        "up": plan.up_groups(cta),
        "o": (out,) * plan.head_groups,
        "down": (out,) * plan.hidden_groups,
    }
    before = {"up_first": "down", "qkv_first": "down", "sequential": "o"}[
        plan.order
    ]  # what cached tokens come ahead of
    for layer in range(c.num_layers):
        for name in MATRICES[plan.order]:
            mine = rows[name]
            if name == before:
                if plan.up_first:
                    ahead = plan.rows_before_cached(out)
                    mine = (range(ahead.stop, out.stop),)
                    yield from stages(plan, Action("read", name, layer, ahead))
                yield from stages(plan, Action("read", "kv", layer, cached_tiles(plan, cta, position)))
            for group, each in enumerate(mine):
                yield from stages(plan, Action("read", name, layer, each, group=group))
    yield from stages(plan, Action("read", "lm_head", c.num_layers, plan.rows(c.vocab_size, cta)))


# -- balance -----------------------------------------------------------------------------------------------------------


def balance(plan: BlockPlan, position: int = 0) -> dict[str, float]:
    """How evenly the bytes of a step are dealt: for each matrix, for "kv", and for the whole "step", the most bytes that a
    CTA reads over the mean of all. 1 is even; where nothing is read, 1 too."""
    c = plan.config
    read = {name: [0] * plan.ctas for name in ("qkv", "kv", "up", "o", "down", "lm_head", "step")}
    for cta in range(plan.ctas):
        for name, rows, layers in (
            *(("qkv", rows, c.num_layers) for rows in plan.qkv_groups(cta)),
            *(("up", rows, c.num_layers) for rows in plan.up_groups(cta)),
            ("o", plan.rows(c.hidden_size, cta), c.num_layers),
            ("down", plan.rows(c.hidden_size, cta), c.num_layers),
            ("lm_head", plan.rows(c.vocab_size, cta), 1),
        ):
            streamed = len(streamed_rows(plan, name, rows))
            read[name][cta] += layers * streamed * columns(plan, name) * ELEMENT_BYTES
        token_bytes = 2 * c.head_dim * ELEMENT_BYTES
        read["kv"][cta] = c.num_layers * len(cached_tiles(plan, cta, position)) * plan.tile_tokens * token_bytes
        read["step"][cta] = sum(read[name][cta] for name in read if name != "step")
    return {name: max(each) * plan.ctas / sum(each) if any(each) else 1.0 for name, each in read.items()}
