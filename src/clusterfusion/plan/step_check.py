"""Proof that a step's schedule is sound: every byte read once, every wait means what it says, nothing is overwritten too
early, no deadlock.

Waits are on counts, and a count alone does not say who has arrived; so the proof is about the happens-before relation
(Lamport 1978) and holds for every order in which the CTAs may run. Assume that each wait of layer l comes after all
arrivals of layer l: run the schedules once under this assumption and keep a vector clock (Fidge 1988, Mattern 1989) of
every action. Then check that each arrival of layer l + 1 comes after all arrivals of layer l. It follows that the
assumption is true: in the earliest wait that broke it, an arrival of a later layer would have taken the place of one that
has not happened, though the latter comes first by waits that were all kept.

One run proves progress in every order too: counters only grow and rows are overwritten only after their readers, so what a
CTA waits for, once there, stays there.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from clusterfusion.plan import step
from clusterfusion.plan.block import BlockPlan
from clusterfusion.plan.step import Action

Key = tuple[str, int, int]  # a counter or vector, its layer, and the cluster where each has its own (else 0)
# Layer l and l + 1 differ in nothing but the number, which is checked; the buffers of x come round after X_BUFFERS.
LAYERS_RUN = step.X_BUFFERS + 1


class Event(NamedTuple):
    """An action that has been run: the CTA's `at`-th. `clock[d]` of CTA d's actions come before it for certain."""

    cta: int
    at: int
    clock: list[int]


@dataclasses.dataclass
class Run:
    """What one run of all schedules against one another has recorded."""

    arrivals: dict[Key, list[Event]]  # and publications of at least one row
    writes: dict[Key, list[Event]]  # of versions of vectors in memory
    uses: dict[Key, list[Event]]


def check_step(plan: BlockPlan) -> None:
    """Raise AssertionError with the values unless the step's schedule is sound for this plan, at any position."""
    c = plan.config
    for position in {0, 1, 2 * plan.tile_tokens + 1, c.max_position // 2 + 1, c.max_position - 1}:
        _check_cached_tokens(plan, position)
    last = c.max_position - 1
    schedules = [list(step.step_schedule(plan, cta, last)) for cta in range(plan.ctas)]
    _check_rows(plan, schedules, last)
    _check_layers_alike(plan, schedules)
    few = dataclasses.replace(plan, config=dataclasses.replace(c, num_layers=min(c.num_layers, LAYERS_RUN)))
    for cta, actions in enumerate(schedules):
        first = [action for action in step.step_schedule(few, cta, last) if action.layer < few.config.num_layers]
        _check(actions[: len(first)] == first, "fewer layers are the first ones", cta)
    run = run_step(few, last)
    _check_waits(run)
    _check_vectors(run)


# -- coverage ----------------------------------------------------------------------------------------------------------


def _check_cached_tokens(plan: BlockPlan, position: int) -> None:
    """Each head's cached tokens are taken once, by its own CTAs."""
    wanted = list(range(-(-position // plan.tile_tokens)))
    for head in range(plan.config.num_heads):
        ctas = range(head * plan.splits, (head + 1) * plan.splits)
        taken = sorted(tile for cta in ctas for tile in step.cached_tiles(plan, cta, position))
        _check(taken == wanted, f"every tile of head {head} is read once at position {position}", taken)
    for cta in range(plan.ctas):
        tiles = step.cached_tiles(plan, cta, position)
        _check(step.attends(plan, cta) or not tiles, "CTAs without a head read no cached tokens", tiles)


def _check_rows(plan: BlockPlan, schedules: Sequence[Sequence[Action]], position: int) -> None:
    """Every row of every matrix of every layer is read once, and every row of every version of x published once."""
    c = plan.config
    layers = range(c.num_layers)
    sizes = {("read", name, layer): c.hidden_size for name in ("o", "down") for layer in layers}
    sizes |= {("read", "qkv", layer): 3 * c.hidden_size for layer in layers}
    sizes |= {("read", "up", layer): c.intermediate_size for layer in layers}
    sizes |= {("read", "lm_head", c.num_layers): c.vocab_size}
    sizes |= {("publish", "x", layer + 1): c.hidden_size for layer in layers}
    if not c.parallel_residual:
        sizes |= {("publish", "middle", layer): c.hidden_size for layer in layers}
    dealt: dict[tuple[str, str, int], list[range]] = collections.defaultdict(list)
    for cta, actions in enumerate(schedules):
        for action in actions:
            if action.kind in ("read", "publish") and action.name != "kv" and action.rows:
                dealt[action.kind, action.name, action.layer].append(action.rows)
        tiles = [(action.layer, action.rows) for action in actions if action.name == "kv"]
        wanted = [(layer, step.cached_tiles(plan, cta, position)) for layer in layers if step.attends(plan, cta)]
        _check(tiles == wanted, f"CTA {cta} reads its cached tokens once a layer", tiles)
        _check([a.name for a in actions].count("token") == 1, f"CTA {cta} says when its logits are there", cta)
    _check(dealt.keys() == sizes.keys(), "matrices and vectors", dealt.keys() ^ sizes.keys())
    for (kind, name, layer), ranges in dealt.items():
        end = 0
        for rows in sorted(ranges, key=lambda r: r.start):
            _check(rows.start == end, f"every row of {name} of layer {layer} is {kind} once", rows)
            end = rows.stop
        _check(end == sizes[kind, name, layer], f"all rows of {name} of layer {layer} are {kind}", end)
    for name in ("qkv", "down"):
        _check(min(step.row_parts(plan, name)) > 0, f"no part of a row of {name} is empty", step.row_parts(plan, name))


def _check_layers_alike(plan: BlockPlan, schedules: Sequence[Sequence[Action]]) -> None:
    """A layer's actions are those of the first one, and its targets all arrivals up to it."""
    arrivals = collections.Counter(
        (a.name, a.layer, _scope(plan, cta, a)) for cta, actions in enumerate(schedules) for a in _of(actions, "arrive")
    )
    total: collections.Counter[Key] = collections.Counter()
    for name, layer, scope in sorted(arrivals):
        total[name, layer, scope] = arrivals[name, layer, scope] + total[name, layer - 1, scope]
    for cta, actions in enumerate(schedules):
        by_layer: dict[int, list[tuple[str, str, range]]] = collections.defaultdict(list)
        for action in actions:
            belongs = action.layer - (action.kind == "publish" and action.name == "x")
            by_layer[belongs].append((action.kind, action.name, action.rows))
            if action.kind == "wait" and action.name in ("x", "middle"):
                _check(action.target == plan.config.hidden_size, "a vector is complete with all its rows", action)
            elif action.kind == "wait":
                wanted = total[action.name, action.layer, _scope(plan, cta, action)]
                _check(action.target == wanted, f"{wanted} arrivals are waited for", action)
        for layer in range(1, plan.config.num_layers):
            wanted_actions = [("wait", "x", range(0)), *by_layer[0]]
            _check(by_layer[layer] == wanted_actions, f"layer {layer} is as layer 0", (cta, by_layer[layer]))


# -- the run -----------------------------------------------------------------------------------------------------------


class _Cta:
    """A CTA under way: its next action, its clock, and the ring between its producer and its consumers."""

    def __init__(self, plan: BlockPlan, cta: int, position: int) -> None:
        self.plan, self.cta = plan, cta
        self.actions = list(step.step_schedule(plan, cta, position))
        self.done = 0
        self.clock = [0] * plan.ctas
        self.producer = step.producer_order(plan, cta, position)
        self.ring: collections.deque[step.Tile] = collections.deque()

    def take(self, read: Action) -> None:
        """The consumers' side of a read, while the producer keeps the ring as full as it can."""
        ring, producer, stages, stage_bytes = self.ring, self.producer, self.plan.stages, self.plan.stage_bytes
        for tile in step.tiles(self.plan, read):
            while len(ring) < stages and (brought := next(producer, None)):
                ring.append(brought)
            found = ring.popleft() if ring else None
            if found != tile or tile.bytes > stage_bytes:  # the test of every tile: no call, no message
                _check(tile.bytes <= stage_bytes, "a tile fits a stage", tile)
                _check(False, f"CTA {self.cta}: the producer brings what is taken next, {tile}", found)


def run_step(plan: BlockPlan, position: int) -> Run:
    """All CTAs' schedules run against one another, each as far as its waits and its ring let it."""
    ctas = [_Cta(plan, cta, position) for cta in range(plan.ctas)]
    missing = collections.Counter(
        (a.name, a.layer, _scope(plan, cta.cta, a)) for cta in ctas for a in cta.actions if _signals(a)
    )
    run = Run(collections.defaultdict(list), collections.defaultdict(list), collections.defaultdict(list))
    joined: dict[Key, list[int]] = {}
    moved = True
    while moved:
        moved = False
        for cta in ctas:
            while cta.done < len(cta.actions):
                action = cta.actions[cta.done]
                key = (action.name, action.layer, _scope(plan, cta.cta, action))
                if action.kind == "wait":
                    if missing[key]:
                        break
                    if key not in joined:
                        joined[key] = _join(run.arrivals[key], plan.ctas)
                    cta.clock = _later(cta.clock, joined[key])
                elif action.kind == "read":
                    cta.take(action)
                event = Event(cta.cta, cta.done, cta.clock)
                if _signals(action):
                    run.arrivals[key].append(event)
                    missing[key] -= 1
                for vector, version in _written(action):
                    run.writes[vector, version, _scope(plan, cta.cta, action)].append(event)
                for vector, version in _used(plan, action):
                    run.uses[vector, version, _scope(plan, cta.cta, action, vector)].append(event)
                cta.done += 1
                moved = True
    stuck = {cta.cta: cta.actions[cta.done] for cta in ctas if cta.done < len(cta.actions)}
    _check(not stuck, "no deadlock", dict(list(stuck.items())[:3]))
    for cta in ctas:
        left = [*cta.ring, *cta.producer]
        _check(not left, f"CTA {cta.cta}: everything produced is taken", left[:3])
    return run


def _signals(action: Action) -> bool:
    """A CTA that owns no row of a vector publishes nothing, so nobody waits for it."""
    return action.kind == "arrive" or (action.kind == "publish" and bool(action.rows))


def _written(action: Action) -> Iterator[tuple[str, int]]:
    """The vector in memory, and its version, that an action writes."""
    if action.kind == "publish" and action.rows:
        yield action.name, action.layer
    elif action.kind == "read" and action.rows and action.name in ("qkv", "up"):
        yield {"qkv": "qkv", "up": "h"}[action.name], action.layer
    elif action.kind == "arrive" and action.name in ("attention", "exchange"):
        yield {"attention": "partials", "exchange": "exchange"}[action.name], action.layer


def _used(plan: BlockPlan, action: Action) -> Iterator[tuple[str, int]]:
    """The vector in memory, and its version, without which an action cannot be done. A CTA's own rows of x and middle,
    for the residual, are not here: nobody else writes them."""
    if action.kind == "arrive" and action.name == "attention" and plan.merged_ctas > 1:
        yield "exchange", action.layer
    if action.kind != "read" or not (action.rows or action.name == "kv"):  # q and the new k, v: even without a cache
        return
    if action.name == "up":
        yield "x" if plan.config.parallel_residual else "middle", action.layer
    else:
        vectors = {"qkv": "x", "kv": "qkv", "o": "partials", "down": "h", "lm_head": "x"}
        yield vectors[action.name], action.layer


def _scope(plan: BlockPlan, cta: int, action: Action, vector: str = "") -> int:
    return cta // plan.cluster_size if "exchange" in (action.name, vector) else 0


def _of(actions: Iterable[Action], kind: str) -> Iterator[Action]:
    return (action for action in actions if action.kind == kind)


def _join(events: Sequence[Event], ctas: int) -> list[int]:
    """The clock of whoever has seen all these events."""
    clock = [0] * ctas
    for seen in {id(event.clock): event.clock for event in events}.values():  # most are one and the same list
        clock = list(map(max, clock, seen))
    for event in events:
        clock[event.cta] = max(clock[event.cta], event.at + 1)
    return clock


def _later(clock: list[int], other: list[int]) -> list[int]:
    """The later of two clocks, in every component; `other` itself where it is that."""
    both = list(map(max, clock, other))
    return other if both == other else both


# -- what the run proves -----------------------------------------------------------------------------------------------


def unordered(earlier: Sequence[Event], later: Sequence[Event]) -> tuple[Event, Event] | None:
    """A pair of these events of which the first need not come before the second, or None. An event is before itself."""
    for clock, group in _by_clock(later):
        for first in earlier:
            if clock[first.cta] > first.at:
                continue
            for second in group:
                if second.cta != first.cta or second.at < first.at:
                    return first, second
    return None


def _by_clock(events: Sequence[Event]) -> Iterator[tuple[list[int], list[Event]]]:
    groups: dict[int, list[Event]] = collections.defaultdict(list)
    for event in events:
        groups[id(event.clock)].append(event)
    for group in groups.values():
        yield group[0].clock, group


def _check_waits(run: Run) -> None:
    """No count is reached with arrivals of a later layer in place of earlier ones."""
    for (name, layer, scope), events in run.arrivals.items():
        fault = unordered(run.arrivals.get((name, layer - 1, scope), []), events)
        _check(fault is None, f"arrivals at {name} of layer {layer} come after all of layer {layer - 1}", fault)


def _check_vectors(run: Run) -> None:
    """What is used has been written, and is written over only when all who use it have done so."""
    for key, uses in run.uses.items():
        fault = unordered(run.writes.get(key, []), uses)
        _check(fault is None, f"{key[0]} of layer {key[1]} is complete before its use", fault)
    for name, needed in buffers_needed(run).items():
        buffers = step.X_BUFFERS if name == "x" else 1
        _check(needed <= buffers, f"{buffers} buffers of {name} suffice", needed)


def buffers_needed(run: Run) -> dict[str, int]:
    """How many buffers each vector in memory must have, taken in turn, so that in no order of the CTAs a version is
    written over one that somebody has still to use."""
    versions: dict[str, set[int]] = collections.defaultdict(set)
    for name, version, _ in [*run.writes, *run.uses]:
        versions[name].add(version)
    return {
        name: next(
            count
            for count in range(1, len(seen) + 1)
            if all(
                unordered(uses, run.writes.get((name, version + ahead, scope), [])) is None
                for (vector, version, scope), uses in run.uses.items()
                if vector == name
                for ahead in range(count, len(seen) + 1)
            )
        )
        for name, seen in versions.items()
    }


def _check(ok: bool, what: str, seen: object) -> None:
    if not ok:
        raise AssertionError(f"step: {what}: {seen}")
