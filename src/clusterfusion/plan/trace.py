"""What a traced step records: the events of a CTA in each layer, their order, their meaning, and where they lie.

Two roles of a CTA record: the vectors' warps, which read the residual stream, norm it, merge attention's parts and publish, and the
tiles' warps, which stream weights and cached tokens, seen by their first warp. The record is int64 [CTAs, layers + 1, EVENTS] and behind it
[CTAs, CLOCKS]; index `num_layers` is the part after the last layer: final norm, LM head, choice of the token. An event is
the SM's clock when the CTA passed it, 0 where it did not. Clocks of different SMs have nothing in common, which is why each
CTA reads its own beside the GPU's nanoseconds at both ends.

The order here is that of the program's events; nothing else in Python knows it.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from clusterfusion.plan.block import MATRICES, BlockPlan, Order

Role = Literal["vectors", "tiles"]
ROLES: tuple[Role, ...] = ("vectors", "tiles")

_VECTORS = (
    "begin residual_read normed attention_wait attention_begin attention_done output_wait output_begin output_ready "
    "down_wait down_begin down_ready sums_wait published"
).split()
_TILES = (
    "project_wait project_begin qkv_done up_done cached_wait cached_begin cached_done o_wait o_begin o_done down_tiles_wait down_tiles_begin down_tiles_done "
    "logits_done"
).split()
_HIDDEN = ("down_wait", "down_begin", "down_ready")  # h, of the vectors
_CACHED = ("cached_wait", "cached_begin", "cached_done")  # the cached tokens, of the tiles
_OF_MATRIX = {
    "qkv": ("qkv_done",),
    "up": ("up_done",),
    "o": ("o_wait", "o_begin", "o_done"),
    "down": ("down_tiles_wait", "down_tiles_begin", "down_tiles_done"),
}
TIMES = (*_VECTORS, *_TILES)  # clocks
DATA_WAITED = "data_waited"  # a duration in clocks: what the tiles' first warp waited for data in this layer
ROOM_WAITED = "room_waited"  # a duration in clocks: what the producer waited for room in the ring, in its own layer
EVENTS = (*TIMES, DATA_WAITED, ROOM_WAITED)
CLOCKS = ("clock_at_start", "ns_at_start", "clock_at_end", "ns_at_end")


def trace_shape(plan: BlockPlan) -> tuple[int, int, int]:
    """CTAs, layers and one more, events."""
    return plan.ctas, plan.config.num_layers + 1, len(EVENTS)


def trace_words(plan: BlockPlan) -> int:
    """64-bit words that a step's record takes, the clocks included."""
    ctas, parts, events = trace_shape(plan)
    return ctas * (parts * events + len(CLOCKS))


def passed(role: Role, order: Order) -> tuple[str, ...]:
    """A role's events in the order in which it passes them, with the matrices in that order."""
    if role == "tiles":
        of_matrices = [event for name in MATRICES[order] for event in _OF_MATRIX[name]]
        ahead_of = {"up_first": "down_tiles_done", "qkv_first": "down_tiles_wait", "sequential": "o_wait"}[order]
        at = of_matrices.index(ahead_of)
        return ("project_wait", "project_begin", *of_matrices[:at], *_CACHED, *of_matrices[at:], "logits_done")
    events = [event for event in _VECTORS if event not in _HIDDEN]
    before = {"up_first": "attention_wait", "qkv_first": "output_wait", "sequential": "sums_wait"}[order]
    at = events.index(before)
    return (*events[:at], *_HIDDEN, *events[at:])


# -- what lies between events ------------------------------------------------------------------------------------------

Kind = Literal["wait", "stream", "work"]


class Phase(NamedTuple):
    """What a role does from the event `begin` to the event `end` of one layer: it waits for `name`, streams the matrix
    `name`, or does other work called so."""

    role: Role
    kind: Kind
    name: str
    begin: str
    end: str


def phases(order: Order) -> tuple[Phase, ...]:
    """In the order of a layer, each role's for itself. What lies between two of them has no name."""
    before_qkv = "up_done" if order == "up_first" else "project_begin"
    before_up = {"up_first": "project_begin", "qkv_first": "qkv_done", "sequential": "o_done"}[order]
    tiles = [
        Phase("tiles", "wait", "residual", "project_wait", "project_begin"),  # until its CTA has read and normed it
        Phase("tiles", "stream", "qkv", before_qkv, "qkv_done"),
        Phase("tiles", "stream", "up", before_up, "up_done"),
        Phase("tiles", "wait", "attention", "o_wait", "o_begin"),
        Phase("tiles", "stream", "o", "o_begin", "o_done"),
        Phase("tiles", "wait", "hidden", "down_tiles_wait", "down_tiles_begin"),
        Phase("tiles", "wait", "q/k/v", "cached_wait", "cached_begin"),
        Phase("tiles", "stream", "kv", "cached_begin", "cached_done"),
        Phase("tiles", "stream", "lm_head", "project_begin", "logits_done"),  # behind the last layer
    ]
    if order == "up_first":  # down in two parts
        tiles.append(Phase("tiles", "stream", "down", "down_tiles_begin", "cached_wait"))
        tiles.append(Phase("tiles", "stream", "down", "cached_done", "down_tiles_done"))
    else:
        tiles.append(Phase("tiles", "stream", "down", "down_tiles_begin", "down_tiles_done"))
    vectors = [
        Phase("vectors", "wait", "residual", "begin", "residual_read"),
        Phase("vectors", "work", "norm", "residual_read", "normed"),
        Phase("vectors", "wait", "q/k/v", "attention_wait", "attention_begin"),
        Phase("vectors", "work", "attention", "attention_begin", "attention_done"),  # with the tiles' part of it
        Phase("vectors", "wait", "attention", "output_wait", "output_begin"),
        Phase("vectors", "work", "load", "output_begin", "output_ready"),
        Phase("vectors", "wait", "hidden", "down_wait", "down_begin"),
        Phase("vectors", "work", "load", "down_begin", "down_ready"),
        # Until its own CTA's tiles are summed, and publishing.
        Phase("vectors", "work", "sums", "sums_wait", "published"),
    ]
    # The middle residual and its norm have no events of their own, nor have head groups and groups of h but for the last one, which may have to
    # be waited for; the tiles go on with the first one.
    if order == "sequential":
        vectors.append(Phase("vectors", "work", "middle", "output_ready", "down_wait"))
    return tuple(
        phase
        for of_role in (vectors, tiles)
        for phase in sorted(of_role, key=lambda phase: passed(phase.role, order).index(phase.end))
    )


class Dependency(NamedTuple):
    """What CTAs give one another in a layer: a CTA has given its share at `given`; the vectors wait for everyone's from
    `wait` to `begin`, for what the next layer starts from in that layer. `of_own_head`: only for those of the CTAs that own
    rows of the head, so that a CTA may go on before the last one has given."""

    name: str
    given: str
    wait: str
    begin: str
    of_next_layer: bool = False
    of_own_head: bool = False


DEPENDENCIES = (
    Dependency("residual", "published", "begin", "residual_read", of_next_layer=True),
    Dependency("q/k/v", "qkv_done", "attention_wait", "attention_begin", of_own_head=True),
    Dependency("attention", "attention_done", "output_wait", "output_begin"),
    Dependency("hidden", "up_done", "down_wait", "down_begin"),
)
