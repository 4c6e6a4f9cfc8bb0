"""The schedule of a whole decode step in one launch, as data: every layer, the final norm, the LM head, the choice.

It uses the plan of one decoder layer (plan/block.py) for all of them. CTA c of G owns rows [c R / G, (c + 1) R / G) of every
matrix, the LM head included, and of the residual stream x. `step_schedule` says what a CTA does and in which order; its
reads, in the same order, are what its producer copies through the ring. plan/step_check.py proves it sound.

What CTAs tell one another: counters, which only grow (qkv, attention, hidden, token; exchange, one a cluster), and vectors
whose rows travel as pairs of value and epoch (x, and for sequential residual middle), which need no counter.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

from clusterfusion.plan.block import ELEMENT_BYTES, VECTOR, BlockPlan

X_BUFFERS = 2  # of the residual stream, in turn; every other vector has one


class Action(NamedTuple):
    """One thing a CTA does in a step.

    read: take `rows` of the matrix `name` of `layer`; name "kv": the tiles `rows` of its head's cached tokens.
    publish: write the CTA's `rows` of version `layer` of the vector `name`, each with its epoch. x of layer l is what
        layer l starts from, x of layer num_layers what the final norm takes.
    arrive: add one to the counter `name`.
    wait: until the counter `name` is `target` or more; for vectors, until `target` rows have version `layer`.
    """

    kind: Literal["read", "publish", "arrive", "wait"]
    name: str
    layer: int  # num_layers after the last one
    rows: range = range(0)
    target: int = 0


class Tile(NamedTuple):
    """What one stage of the ring holds: rows from `first` on, part `part` of a row longer than a stage, or cached tokens."""

    name: str
    layer: int
    first: int  # row, or for "kv" tile of cached tokens
    part: int
    bytes: int


def step_schedule(plan: BlockPlan, cta: int, position: int = 0) -> Iterator[Action]:
    """What a CTA does in one step with `position` cached tokens, in order. Its producer's order is that of the reads."""
    c = plan.config
    for layer in range(c.num_layers):
        if layer:  # x of layer 0 is the embedding of the token
            yield Action("wait", "x", layer, target=c.hidden_size)
        yield from _layer_schedule(plan, cta, layer, position)
        yield Action("publish", "x", layer + 1, plan.rows(c.hidden_size, cta))
    yield Action("wait", "x", c.num_layers, target=c.hidden_size)
    yield Action("read", "lm_head", c.num_layers, plan.rows(c.vocab_size, cta))
    yield Action("arrive", "token", c.num_layers)  # the last one to arrive chooses the token


def _layer_schedule(plan: BlockPlan, cta: int, layer: int, position: int) -> Iterator[Action]:
    c = plan.config
    up, out = plan.rows(c.intermediate_size, cta), plan.rows(c.hidden_size, cta)
    early = up[: _rows_before_attention(plan, len(up))]

    def wait(name: str, arrivals: int) -> Action:
        return Action("wait", name, layer, target=(layer + 1) * arrivals)

    yield Action("read", "qkv", layer, plan.rows(3 * c.hidden_size, cta))
    yield Action("arrive", "qkv", layer)
    if c.parallel_residual:
        yield Action("read", "up", layer, early)
    if attends(plan, cta):
        yield wait("qkv", plan.ctas)
        yield Action("read", "kv", layer, cached_tiles(plan, cta, position))
        if plan.merged_ctas > 1:
            yield Action("arrive", "exchange", layer)
            yield wait("exchange", plan.merged_ctas)
        if plan.merged_ctas == 1 or cta % plan.cluster_size == 0:
            yield Action("arrive", "attention", layer)
    if c.parallel_residual:
        yield Action("read", "up", layer, up[len(early) :])
        yield Action("arrive", "hidden", layer)
    yield wait("attention", c.num_heads * plan.partials_per_head)
    yield Action("read", "o", layer, out)
    if not c.parallel_residual:
        yield Action("publish", "middle", layer, out)
        yield Action("wait", "middle", layer, target=c.hidden_size)
        yield Action("read", "up", layer, up)
        yield Action("arrive", "hidden", layer)
    yield wait("hidden", plan.ctas)
    yield Action("read", "down", layer, out)


def _rows_before_attention(plan: BlockPlan, rows: int) -> int:
    """Half of a CTA's rows of the up projection, in whole tiles: the other half covers the dependency on q, k and v."""
    tile = rows_a_tile(plan, "up")
    return rows // 2 // tile * tile


def attends(plan: BlockPlan, cta: int) -> bool:
    """Whether a CTA takes part of a head's cached tokens."""
    return cta < plan.config.num_heads * plan.splits


def cached_tiles(plan: BlockPlan, cta: int, position: int) -> range:
    """The tiles of `plan.tile_tokens` cached tokens that a CTA takes of its head's, which has `position` tokens."""
    tiles = -(-position // plan.tile_tokens) if attends(plan, cta) else 0
    return range(cta % plan.splits, max(tiles, cta % plan.splits), plan.splits)


# -- tiles -------------------------------------------------------------------------------------------------------------


def columns(plan: BlockPlan, name: str) -> int:
    """Elements in a row of a matrix."""
    return plan.config.intermediate_size if name == "down" else plan.config.hidden_size


def rows_a_tile(plan: BlockPlan, name: str) -> int:
    """Whole rows of a matrix that travel as one tile; 1 where a row takes several tiles."""
    return max(1, plan.stage_bytes // (columns(plan, name) * ELEMENT_BYTES))


def row_parts(plan: BlockPlan, name: str) -> tuple[int, ...]:
    """The elements of a matrix's row that each of its tiles brings: one number unless the row is longer than a stage."""
    elements = columns(plan, name)
    parts = -(-elements * ELEMENT_BYTES // plan.stage_bytes)
    each = -(-elements // VECTOR // parts) * VECTOR
    return tuple(min(each, elements - part * each) for part in range(parts))


def tiles(plan: BlockPlan, read: Action) -> Iterator[Tile]:
    """The stages of the ring that a read takes, in order."""
    if read.name == "kv":
        for tile in read.rows:  # whole tiles: tokens beyond the position are copied and never looked at
            yield Tile("kv", read.layer, tile, 0, 2 * plan.tile_tokens * plan.config.head_dim * ELEMENT_BYTES)
        return
    parts = row_parts(plan, read.name)
    step = rows_a_tile(plan, read.name)
    for first in range(read.rows.start, read.rows.stop, step):
        rows = min(step, read.rows.stop - first)
        for part, elements in enumerate(parts):
            yield Tile(read.name, read.layer, first, part, rows * elements * ELEMENT_BYTES)


def producer_order(plan: BlockPlan, cta: int, position: int = 0) -> Iterator[Tile]:
    """The tiles that a CTA's producer copies in one step, in order, never more than `plan.stages` ahead of their use."""
    for action in step_schedule(plan, cta, position):
        if action.kind == "read":
            yield from tiles(plan, action)


# -- balance -----------------------------------------------------------------------------------------------------------


def balance(plan: BlockPlan, position: int = 0) -> dict[str, float]:
    """How evenly the bytes of a step are dealt: for each matrix, for "kv", and for the whole "step", the most bytes that a
    CTA reads over the mean of all. 1 is even; where nothing is read, 1 too."""
    c = plan.config
    read = {name: [0] * plan.ctas for name in ("qkv", "kv", "up", "o", "down", "lm_head", "step")}
    for cta in range(plan.ctas):
        for name, rows, layers in (
            ("qkv", 3 * c.hidden_size, c.num_layers),
            ("up", c.intermediate_size, c.num_layers),
            ("o", c.hidden_size, c.num_layers),
            ("down", c.hidden_size, c.num_layers),
            ("lm_head", c.vocab_size, 1),
        ):
            read[name][cta] = layers * len(plan.rows(rows, cta)) * columns(plan, name) * ELEMENT_BYTES
        token_bytes = 2 * c.head_dim * ELEMENT_BYTES
        read["kv"][cta] = c.num_layers * len(cached_tiles(plan, cta, position)) * plan.tile_tokens * token_bytes
        read["step"][cta] = sum(read[name][cta] for name in read if name != "step")
    return {name: max(each) * plan.ctas / sum(each) if any(each) else 1.0 for name, each in read.items()}
