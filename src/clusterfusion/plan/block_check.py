"""That the schedule of one decoder layer reads everything once and makes progress. plan/step_check.py proves more, of a whole
step."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

from clusterfusion.architecture import DecoderConfig
from clusterfusion.plan.sizes import qkv_rows

Role = Literal["vectors", "tiles"]
ROLES: tuple[Role, ...] = ("vectors", "tiles")


@dataclasses.dataclass(frozen=True)
class Step:
    """One thing that a role of a CTA does in the fused launch: read rows of a matrix, publish tagged rows
    or wait for some, arrive at a counter or wait for one, signal the CTA's other role or await its signal."""

    kind: Literal["read", "publish", "arrive", "wait", "signal", "await"]
    name: str
    rows: range = range(0)
    target: int = 0


Schedules = Mapping[tuple[int, Role], Sequence[Step]]  # of every CTA and role


def of_group(name: str, group: int) -> str:
    """What is called `name` of a head group or a hidden group; of the first one, which may be the only one, just so."""
    return f"{name} {group}" if group else name


def check_coverage(c: DecoderConfig, head_groups: int, hidden_groups: int, schedules: Schedules) -> None:
    """Every row of every matrix is read once, of o the parts for every head group, of down those for every hidden group, and every row
    of q, k and v published."""
    sizes = {"qkv": qkv_rows(c), "up": c.intermediate_size}
    sizes |= {of_group("o", group): c.hidden_size for group in range(head_groups)}
    sizes |= {of_group("down", group): c.hidden_size for group in range(hidden_groups)}
    dealt: dict[tuple[str, str], list[range]] = collections.defaultdict(list)
    for steps in schedules.values():
        for step in steps:
            if step.kind in ("read", "publish") and step.rows:
                dealt[step.kind, step.name].append(step.rows)
    for kind, name in [*(("read", name) for name in sizes), ("publish", "qkv")]:
        end = 0
        for rows in sorted(dealt[kind, name], key=lambda r: r.start):
            check(rows.start == end, f"every row of {name} is {kind} once", rows)
            end = rows.stop
        check(end == sizes[name], f"all rows of {name} are {kind}", end)


def check_progress(config: DecoderConfig, schedules: Schedules) -> None:
    """Runs all roles of all CTAs against one another: all resident, each as far as its waits let it. Every signal is awaited,
    or it would say nothing."""
    counters: collections.Counter[str] = collections.Counter()
    published = bytearray(qkv_rows(config))  # rows of q, k and v
    pending = {actor: collections.deque(steps) for actor, steps in schedules.items()}
    signals, awaits = (
        {(cta, step.name) for (cta, _), steps in pending.items() for step in steps if step.kind == kind}
        for kind in ("signal", "await")
    )
    check(signals <= awaits, "every signal is awaited", sorted(signals - awaits)[:3])
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
    check(not pending, "no deadlock", {actor: steps[0] for actor, steps in list(pending.items())[:3]})


def check(ok: bool, what: str, seen: object) -> None:
    if not ok:
        raise AssertionError(f"plan: {what}: {seen}")
