"""What a traced step records: the events of a CTA in each layer, their order, their meaning, and where they lie.

Two roles of a CTA record: the vectors' warps, which read the residual stream, norm it, attend and publish, and the tiles'
warps, which stream the weights, seen by their first warp. The record is int64 [CTAs, layers + 1, EVENTS] and behind it
[CTAs, CLOCKS]; index `num_layers` is the part after the last layer: final norm, LM head, choice of the token. An event is
the SM's clock when the CTA passed it, 0 where it did not. Clocks of different SMs have nothing in common, which is why each
CTA reads its own beside the GPU's nanoseconds at both ends.

The order here is that of the program's events; nothing else in Python knows it.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from clusterfusion.plan.block import BlockPlan

Role = Literal["vectors", "tiles"]
ROLES: tuple[Role, ...] = ("vectors", "tiles")

_VECTORS = (
    "begin residual_read normed attention_wait attention_begin attention_done output_wait output_begin output_ready "
    "down_wait down_begin down_ready sums_wait published"
).split()
_TILES = (
    "qkv_wait qkv_begin qkv_done up_done o_wait o_begin o_done down_tiles_wait down_tiles_begin down_tiles_done"
).split()
TIMES = (*_VECTORS, *_TILES)  # clocks
DATA_WAITED = "data_waited"  # a duration in clocks: what the tiles' first warp waited for data in this layer
EVENTS = (*TIMES, DATA_WAITED)
CLOCKS = ("clock_at_start", "ns_at_start", "clock_at_end", "ns_at_end")


def trace_shape(plan: BlockPlan) -> tuple[int, int, int]:
    """CTAs, layers and one more, events."""
    return plan.ctas, plan.config.num_layers + 1, len(EVENTS)


def trace_words(plan: BlockPlan) -> int:
    """64-bit words that a step's record takes, the clocks included."""
    ctas, parts, events = trace_shape(plan)
    return ctas * (parts * events + len(CLOCKS))


def order(role: Role, parallel_residual: bool) -> tuple[str, ...]:
    """A role's events as it passes them. With sequential residual the up projection comes after o."""
    if role == "vectors" or parallel_residual:
        return tuple(_VECTORS if role == "vectors" else _TILES)
    events = [event for event in _TILES if event != "up_done"]
    events.insert(events.index("o_done") + 1, "up_done")
    return tuple(events)


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


def phases(parallel_residual: bool) -> tuple[Phase, ...]:
    """In the order of a layer, each role's for itself. What lies between two of them has no name."""
    before_up = "qkv_done" if parallel_residual else "o_done"
    tiles = [
        Phase("tiles", "wait", "residual", "qkv_wait", "qkv_begin"),  # until its own CTA has read and normed it
        Phase("tiles", "stream", "qkv", "qkv_begin", "qkv_done"),
        Phase("tiles", "stream", "up", before_up, "up_done"),
        Phase("tiles", "wait", "attention", "o_wait", "o_begin"),
        Phase("tiles", "stream", "o", "o_begin", "o_done"),
        Phase("tiles", "wait", "hidden", "down_tiles_wait", "down_tiles_begin"),
        Phase("tiles", "stream", "down", "down_tiles_begin", "down_tiles_done"),
    ]
    events = order("tiles", parallel_residual)
    vectors = [
        Phase("vectors", "wait", "residual", "begin", "residual_read"),
        Phase("vectors", "work", "norm", "residual_read", "normed"),
        Phase("vectors", "wait", "q/k/v", "attention_wait", "attention_begin"),
        Phase("vectors", "work", "attention", "attention_begin", "attention_done"),
        Phase("vectors", "wait", "attention", "output_wait", "output_begin"),
        Phase("vectors", "work", "load", "output_begin", "output_ready"),
        Phase("vectors", "wait", "hidden", "down_wait", "down_begin"),
        Phase("vectors", "work", "load", "down_begin", "down_ready"),
        Phase(
            "vectors", "work", "sums", "sums_wait", "published"
        ),  # until its own CTA's tiles are summed, and publishing
    ]
    if not parallel_residual:  # the middle residual and its norm, which have no events of their own
        vectors.insert(6, Phase("vectors", "work", "middle", "output_ready", "down_wait"))
    return (*vectors, *sorted(tiles, key=lambda phase: events.index(phase.end)))


LM_HEAD = "lm_head"  # what "qkv" is after the last layer


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
