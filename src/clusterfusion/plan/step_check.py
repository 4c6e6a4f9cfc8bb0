"""Proof that a step's schedule is sound: every byte read once, every wait means what it says, nothing is overwritten too
early, in memory or in a CTA's own, no deadlock.

Waits are on counts, and a count alone does not say who has arrived; so the proof is about the happens-before relation
(Lamport 1978) and holds for every order in which the CTAs and their roles may run. Assume that each wait of layer l comes
after all arrivals of layer l, and each await of layer l after the signal of layer l: run the schedules once under this
assumption and keep a vector clock (Fidge 1988, Mattern 1989) of every action, with one component for each role of each CTA.
Then check that each arrival of layer l + 1 comes after all arrivals of layer l, and that each await of layer l begins after
the signal of layer l - 1 and is over before the signal of layer l + 1, which has its parity's other value. It follows that the
assumption is true: in the earliest wait that broke it, an arrival of a later layer would have taken the place of one that
has not happened, though the latter comes first by waits that were all kept.

One run proves progress in every order too: counters only grow, rows are overwritten only after their readers, and signals
are not given again before they are awaited, so what is waited for, once there, stays there.

A launch may take several steps. Between two of them stands the choice of the token, which the vector warps wait for: it is made
when all CTAs have arrived, and each arrival comes after all that its CTA has done in the step, which is checked. So nothing
of a step meets anything of the next one but what the producer copies: weights, which never change, and cached tokens, before
the first of which it waits for its head group's attention of the step before.

What is taken for granted: the threads of a role are one (all of them signal and await), and who has read a pair comes after all
that its writer did before: of what the writer has read, because what it publishes is computed from that.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from clusterfusion.plan import step
from clusterfusion.plan.block import BlockPlan
from clusterfusion.plan.block_check import ROLES, Role
from clusterfusion.plan.step import Action
from clusterfusion.plan.step_coverage import (
    Key,
    check_cached_tokens,
    check_layers_alike,
    check_places,
    check_rows,
    require,
    scope_of,
)
from clusterfusion.plan.step_effects import shared, used, written

# Layer l and l + 1 differ in nothing but the number, which is checked; the buffers of x come round after X_BUFFERS.
LAYERS_RUN = step.X_BUFFERS + 1


class Event(NamedTuple):
    """An action that has been run: the `at`-th of an actor, a role of a CTA. `clock[d]` of actor d's actions come before it
    for certain."""

    actor: int
    at: int
    clock: list[int]


class Access(NamedTuple):
    """Of a place in a CTA's shared memory: what is written there, or what has to be there."""

    event: Event
    content: tuple[str, int]
    writes: bool


class Rounds(NamedTuple):
    """Of one signal of one CTA. An await counts twice: when it begins and when it is over."""

    signals: list[tuple[int, Event]]
    awaits: list[tuple[int, Event, Event]]


@dataclasses.dataclass
class Run:
    """What one run of all schedules against one another has recorded."""

    arrivals: dict[Key, list[Event]]
    writes: dict[Key, list[Event]]  # of versions of vectors in memory
    uses: dict[Key, list[Event]]
    shared: dict[tuple[int, str], list[Access]]  # by CTA and place
    rounds: dict[tuple[int, str], Rounds]  # by CTA and signal
    lengths: list[int]  # of actors, how many actions


def check_step(plan: BlockPlan) -> None:
    """Raise AssertionError with the values unless the step's schedule is sound for this plan: the deal of cached tokens at several
    positions, the order of everything with the fewest clusters that attend and with the most."""
    c = plan.config
    for position in {0, 1, 2 * plan.tile_tokens + 1, c.max_position // 2 + 1, c.max_position - 1}:
        check_cached_tokens(plan, position)
    for position in {0, c.max_position - 1}:  # the fewest clusters and the most that have a part in attention
        _check_at(plan, position)


def _check_at(plan: BlockPlan, position: int) -> None:
    c = plan.config
    schedules = [[list(step.step_schedule(plan, cta, role, position)) for role in ROLES] for cta in range(plan.ctas)]
    check_rows(plan, schedules, position)
    check_layers_alike(plan, schedules)
    check_places(plan, schedules)
    few = dataclasses.replace(plan, config=dataclasses.replace(c, num_layers=min(c.num_layers, LAYERS_RUN)))
    for cta, roles in enumerate(schedules):
        for role, actions in zip(ROLES, roles, strict=True):
            first = [a for a in step.step_schedule(few, cta, role, position) if a.layer < few.config.num_layers]
            require(actions[: len(first)] == first, "fewer layers are the first ones", (cta, role))
    prove(few, position)


def prove(plan: BlockPlan, position: int) -> None:
    """What one run of the schedules proves, with all of the plan's layers."""
    run = run_step(plan, position)
    _check_vectors(run)
    _check_shared(run)
    _check_waits(run)
    _check_signals(run)
    _check_end(run)


# -- the run -----------------------------------------------------------------------------------------------------------


class _Actor:
    """A role of a CTA under way: its next action, its clock, and for tile warps the ring between them and the producer."""

    def __init__(self, plan: BlockPlan, cta: int, role: Role, position: int) -> None:
        self.plan, self.cta = plan, cta
        self.number = len(ROLES) * cta + ROLES.index(role)
        self.actions = list(step.step_schedule(plan, cta, role, position))
        self.done = 0
        self.clock = [0] * (len(ROLES) * plan.ctas)
        self.producer = step.producer_order(plan, cta, position) if role == "tiles" else iter(())
        self.ring: collections.deque[step.Stage] = collections.deque()

    def take(self, read: Action) -> None:
        """The tile warps' side of a read, while the producer keeps the ring as full as it can."""
        ring, producer, stages, stage_bytes = self.ring, self.producer, self.plan.stages, self.plan.stage_bytes
        for stage in step.stages(self.plan, read):
            while len(ring) < stages and (brought := next(producer, None)):
                ring.append(brought)
            found = ring.popleft() if ring else None
            if found != stage or stage.bytes > stage_bytes:  # the test of every stage: no call, no message
                require(stage.bytes <= stage_bytes, "tiles fit their stage", stage)
                require(False, f"CTA {self.cta}: the producer brings what is taken next, {stage}", found)


class _Told:
    """What has been told so far: by arrivals at a counter, by a signal, by rows of pairs."""

    def __init__(self, plan: BlockPlan, actors: Sequence[_Actor]) -> None:
        self.plan = plan
        self.missing: collections.Counter[Key] = collections.Counter()
        for actor in actors:
            self.missing.update(_key(plan, actor.cta, a) for a in actor.actions if a.kind in ("arrive", "signal"))
        self.events: dict[Key, list[tuple[range, Event]]] = collections.defaultdict(list)
        self.rows: collections.Counter[Key] = collections.Counter()
        self._joined: dict[tuple[Key, range], list[int]] = {}

    def tell(self, key: Key, action: Action, event: Event) -> None:
        self.events[key].append((action.rows, event))
        self.missing[key] -= action.kind != "publish"
        self.rows[key] += len(action.rows)

    def clock(self, key: Key, action: Action) -> list[int] | None:
        """The clock of whoever has seen all that this wait or await is for; None as long as it is not there."""
        wanted = action.rows
        known = self._joined.get((key, wanted))
        if known is not None:
            return known
        if action.kind == "wait" and action.name in step.TAGGED:
            if self.rows[key] < len(wanted):
                return None
            seen = [(rows, event) for rows, event in self.events[key] if _overlap(rows, wanted)]
            if sum(_overlap(rows, wanted) for rows, _ in seen) < len(wanted):
                return None
        elif self.missing[key] or not self.events[key]:
            return None
        else:
            seen = self.events[key]
        return self._joined.setdefault((key, wanted), _join([event for _, event in seen]))


def _overlap(a: range, b: range) -> int:
    return max(0, min(a.stop, b.stop) - max(a.start, b.start))


def run_step(plan: BlockPlan, position: int) -> Run:
    """All roles' schedules run against one another, each as far as its waits and its ring let it."""
    actors = [_Actor(plan, cta, role, position) for cta in range(plan.ctas) for role in ROLES]
    told = _Told(plan, actors)
    run = Run(
        collections.defaultdict(list),
        collections.defaultdict(list),
        collections.defaultdict(list),
        collections.defaultdict(list),
        collections.defaultdict(lambda: Rounds([], [])),
        [len(actor.actions) for actor in actors],
    )
    moved = True
    while moved:
        moved = False
        for actor in actors:
            while actor.done < len(actor.actions):
                action = actor.actions[actor.done]
                key = _key(plan, actor.cta, action)
                before = Event(actor.number, actor.done, actor.clock)
                if action.kind in ("wait", "await"):
                    seen = told.clock(key, action)
                    if seen is None:
                        break
                    actor.clock = _later(actor.clock, seen)
                elif action.kind == "read":
                    actor.take(action)
                event = Event(actor.number, actor.done, actor.clock)
                if action.kind in ("arrive", "signal", "publish"):
                    told.tell(key, action, event)
                _record(plan, run, actor.cta, action, before, event)
                actor.done += 1
                moved = True
    stuck = {(a.cta, ROLES[a.number % len(ROLES)]): a.actions[a.done] for a in actors if a.done < len(a.actions)}
    require(not stuck, "no deadlock", dict(list(stuck.items())[:3]))
    for actor in actors:
        left = [*actor.ring, *actor.producer]
        require(not left, f"CTA {actor.cta}: everything produced is taken", left[:3])
    return run


def _record(plan: BlockPlan, run: Run, cta: int, action: Action, before: Event, event: Event) -> None:
    if action.kind == "arrive":
        run.arrivals[_key(plan, cta, action)].append(event)
    if action.kind == "signal":
        run.rounds[cta, action.label].signals.append((action.layer, event))
    if action.kind == "await":
        run.rounds[cta, action.label].awaits.append((action.layer, before, event))
    for events, named in ((run.writes, written(plan, action)), (run.uses, used(plan, action))):
        for name, layer in named:
            for part in _parts(plan, cta, name, action):
                vector, version = step.version(plan, name, layer)
                events[vector, version, part].append(event)
    for writes, place, content in shared(plan, action):
        run.shared[cta, place].append(Access(event, content, writes))


def _key(plan: BlockPlan, cta: int, action: Action) -> Key:
    if action.kind in ("signal", "await"):
        return f"signal {action.label}", action.layer, cta
    name = action.name if action.name in step.TAGGED else action.label  # rows of any group tell of themselves
    return name, action.layer, scope_of(plan, cta, action.name)


def _parts(plan: BlockPlan, cta: int, name: str, action: Action) -> Iterable[int]:
    """The parts of a vector that are complete by themselves, of which an action writes or uses some: of q, k and v what one bundle
    needs, or one head; of h a group, of partials one of heads: whose bundle's they are; of others the cluster's or all."""
    rows = action.rows
    if name == "h":
        return (action.group,)
    if name == "partials":
        return (plan.head_group(cta) if action.kind == "arrive" else action.group,)
    if name != "qkv":
        return (scope_of(plan, cta, name),)
    c = plan.config
    size = plan.group_rows if plan.queries * c.num_kv_heads == c.num_heads else c.head_dim
    return range(rows.start // size, -(-rows.stop // size))


def _join(events: Sequence[Event]) -> list[int]:
    """The clock of whoever has seen all these events."""
    clock = events[0].clock.copy()
    for seen in {id(event.clock): event.clock for event in events}.values():  # many are one and the same list
        clock = list(map(max, clock, seen))
    for event in events:
        clock[event.actor] = max(clock[event.actor], event.at + 1)
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
            if clock[first.actor] > first.at:
                continue
            for second in group:
                if second.actor != first.actor or second.at < first.at:
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
        require(fault is None, f"arrivals at {name} of layer {layer} come after all of layer {layer - 1}", fault)


def _check_signals(run: Run) -> None:
    """Parity tells a signal's rounds apart: who awaits one can meet neither the one before nor the one after."""
    for (cta, name), (signals, awaits) in run.rounds.items():
        given = [layer for layer, _ in signals]
        where = f"{name} of CTA {cta}"
        require(given == list(range(len(given))), f"{where} is signalled once a layer", given)
        givers, takers = {e.actor for _, e in signals}, {e.actor for _, e, _ in awaits}
        require(len(givers) == 1 and not givers & takers, f"{where} is the other role's", (givers, takers))
        wanted = list(dict.fromkeys(layer for layer, _, _ in awaits))
        require(wanted == given, f"{where} is awaited in every layer in which it is signalled", wanted)
        for layer, begin, over in awaits:
            if layer > 0:
                fault = unordered([signals[layer - 1][1]], [begin])
                require(fault is None, f"{where}: round {layer - 1} is over when {layer} is awaited", fault)
            if layer + 1 < len(signals):
                fault = unordered([over], [signals[layer + 1][1]])
                require(fault is None, f"{where}: round {layer} is awaited before {layer + 1} is signalled", fault)


def _check_end(run: Run) -> None:
    """Who arrives for the choice of the token has done with the step, and so has its CTA's other role."""
    ends = [event for (name, *_), events in run.arrivals.items() if name == "token" for event in events]
    require(len(ends) * len(ROLES) == len(run.lengths), "every CTA arrives for the choice of the token", len(ends))
    for event in ends:
        cta = event.actor // len(ROLES)
        actors = range(cta * len(ROLES), (cta + 1) * len(ROLES))
        done = [event.at + 1 if actor == event.actor else event.clock[actor] for actor in actors]
        wanted = [run.lengths[actor] for actor in actors]
        require(done == wanted, f"CTA {cta} arrives for the choice of the token at its end", (done, wanted))


def _check_shared(run: Run) -> None:
    """Places in shared memory hold what is looked for there, and nobody writes while another may read."""
    for (cta, place), accesses in run.shared.items():
        writes = [access for access in accesses if access.writes]
        where = f"{place} of CTA {cta}"
        for first, second in itertools.pairwise(writes):  # in the order of the run: enough of them are
            fault = unordered([first.event], [second.event])
            require(fault is None, f"writes to {where} have an order", (first.content, second.content))
        for access in accesses:
            if access.writes:
                continue
            found = [w for w in writes if unordered([w.event], [access.event]) is None]
            require(bool(found) and found[-1].content == access.content, f"{where} holds {access.content}", found[-1:])
            for write in writes[len(found) :]:
                fault = unordered([access.event], [write.event])
                require(fault is None, f"{where} is not written over while {access.content} is read", write.content)


def _check_vectors(run: Run) -> None:
    """What is used has been written, and is written over only when all who use it have done so."""
    for key, uses in run.uses.items():
        fault = unordered(run.writes.get(key, []), uses)
        require(fault is None, f"{key[0]} of layer {key[1]} is complete before its use", fault)
    for name, needed in buffers_needed(run).items():
        buffers = step.X_BUFFERS if name == "x" else 1
        require(needed <= buffers, f"{buffers} buffers of {name} suffice", needed)


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
