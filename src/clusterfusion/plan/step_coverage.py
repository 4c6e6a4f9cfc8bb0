"""That a step's schedule reads and publishes everything once, and that every layer is as the first one."""

from __future__ import annotations

import collections
from collections.abc import Sequence

from clusterfusion.plan import step
from clusterfusion.plan.block import BlockPlan
from clusterfusion.plan.block_check import ROLES
from clusterfusion.plan.step import Action

Key = tuple[
    str, int, int
]  # a counter, vector or signal, with its group, its layer, and the cluster or CTA where each has its own (else 0)


def check_cached_tokens(plan: BlockPlan, position: int) -> None:
    """Each bundle's cached tokens are taken once, by its own CTAs; and of the partials of its clusters, those that hold anything
    are the first ones."""
    wanted = list(range(-(-position // plan.tile_tokens)))
    for bundle in range(plan.bundles):
        ctas = range(bundle * plan.splits, (bundle + 1) * plan.splits)
        taken = sorted(tile for cta in ctas for tile in step.cached_tiles(plan, cta, position))
        require(taken == wanted, f"every tile of bundle {bundle} is read once at position {position}", taken)
        filled = {cta % plan.splits // plan.merged_ctas for cta in ctas if step.cached_tiles(plan, cta, position)} | {0}
        require(filled == set(range(plan.used_partials(position))), "partials that hold anything", filled)
    for cta in range(plan.ctas):
        tiles = step.cached_tiles(plan, cta, position)
        require(plan.attends(cta) or not tiles, "CTAs without a bundle read no cached tokens", tiles)


def check_rows(plan: BlockPlan, schedules: Sequence[Sequence[Sequence[Action]]], position: int) -> None:
    """Every row of every matrix of every layer is read once, and every row of every version of a vector published once."""
    c = plan.config
    layers = range(c.num_layers)
    hidden = range(c.hidden_size)
    groups, of_heads = (
        [(group, layer) for group in range(count) for layer in layers]
        for count in (plan.hidden_groups, plan.head_groups)
    )
    wanted_rows = {
        (kind, "qkv", at, group): plan.group_qkv(group) for kind in ("read", "publish") for group, at in of_heads
    }
    wanted_rows |= {("read", "o", layer, group): hidden for group, layer in of_heads}  # and the parts for that group
    for name, kind in (("up", "read"), *((("h", "finish"),) if c.gated_mlp else ())):
        wanted_rows |= {(kind, name, layer, group): plan.hidden_group(group) for group, layer in groups}
    wanted_rows |= {("read", "down", layer, group): hidden for group, layer in groups}  # likewise
    wanted_rows |= {("read", "lm_head", c.num_layers, 0): range(c.vocab_size)}
    wanted_rows |= {("publish", "x", layer + 1, 0): hidden for layer in layers}
    if not c.parallel_residual:
        wanted_rows |= {("publish", "middle", layer, 0): hidden for layer in layers}
    dealt: dict[tuple[str, str, int, int], list[range]] = collections.defaultdict(list)
    for cta, (vectors, tiles) in enumerate(schedules):
        for action in [*vectors, *tiles]:
            if action.kind in ("read", "finish", "publish") and action.name != "kv" and action.rows:
                dealt[action.kind, action.name, action.layer, action.group].append(action.rows)
        taken = [(action.layer, action.rows) for action in tiles if action.name == "kv"]
        wanted = [(layer, step.cached_tiles(plan, cta, position)) for layer in layers if plan.works(cta, position)]
        require(taken == wanted, f"CTA {cta} reads its cached tokens once a layer", taken)
        require([a.name for a in tiles].count("token") == 1, f"CTA {cta} says when its logits are there", cta)
        reads = [a.name for a in vectors if a.kind == "read"]
        require(not reads, "only tile warps take from the ring", reads)
    require(dealt.keys() == wanted_rows.keys(), "matrices and vectors", dealt.keys() ^ wanted_rows.keys())
    for key, ranges in dealt.items():
        kind, name, layer, _ = key
        end = wanted_rows[key].start
        for rows in sorted(ranges, key=lambda r: r.start):
            require(rows.start == end, f"every row of {name} of layer {layer} is {kind} once", rows)
            end = rows.stop
        require(end == wanted_rows[key].stop, f"all rows of {name} of layer {layer} are {kind}", end)
    _check_parts(plan)
    for name in ("qkv", "o", "down"):
        require(min(step.row_parts(plan, name)) > 0, f"no part of a row of {name} is empty", step.row_parts(plan, name))


def _check_parts(plan: BlockPlan) -> None:
    """The tiles of a row of o and of down come once, those of a group together, and bring the columns that the group is for."""
    for name, groups in (("o", plan.head_groups), ("down", plan.hidden_groups)):
        sizes, taken = step.row_parts(plan, name), list[int]()
        size = step.columns(plan, name) // groups
        for group in range(groups):
            read = Action("read", name, 0, range(1), group=group)
            parts = [stage.part + tile for stage in step.stages(plan, read) for tile in range(stage.tiles)]
            columns = range(sum(sizes[: parts[0]]), sum(sizes[: parts[-1] + 1]))
            wanted = range(group * size, (group + 1) * size)
            require(columns == wanted, f"what group {group} is multiplied by of a row of {name}", columns)
            taken += parts
        require(taken == list(range(len(sizes))), f"every part of a row of {name} is read once", taken)


def check_layers_alike(plan: BlockPlan, schedules: Sequence[Sequence[Sequence[Action]]]) -> None:
    """A layer's actions are those of the first one, and its targets all arrivals up to it."""
    c = plan.config
    arrivals = collections.Counter(
        (a.label, a.layer, scope_of(plan, cta, a.name))
        for cta, roles in enumerate(schedules)
        for actions in roles
        for a in actions
        if a.kind == "arrive"
    )
    total: collections.Counter[Key] = collections.Counter()
    for name, layer, scope in sorted(arrivals):
        total[name, layer, scope] = arrivals[name, layer, scope] + total[name, layer - 1, scope]
    pairs = {"x": range(c.hidden_size), "middle": range(c.hidden_size)}
    for cta, roles in enumerate(schedules):
        for role, actions in zip(ROLES, roles, strict=True):
            by_layer: dict[int, list[tuple[str, str, int, range]]] = collections.defaultdict(list)
            for action in actions:
                belongs = action.layer - (action.kind == "publish" and action.name == "x")
                by_layer[belongs].append((action.kind, action.name, action.group, action.rows))
                if action.kind == "wait" and action.name in step.TAGGED:
                    wanted_rows = (pairs[action.name],) if action.name in pairs else plan.attended_rows(cta)
                    require(action.rows in wanted_rows, "all rows that are used are waited for", action)
                elif action.kind == "wait":
                    wanted = total[action.label, action.layer, scope_of(plan, cta, action.name)]
                    require(action.target == wanted, f"{wanted} arrivals are waited for", action)
            first = [("wait", "x", 0, range(c.hidden_size))] if role == "vectors" else []
            for layer in range(1, c.num_layers):
                require(
                    by_layer[layer] == [*first, *by_layer[0]], f"layer {layer} is as layer 0", (cta, by_layer[layer])
                )


def check_places(plan: BlockPlan, schedules: Sequence[Sequence[Sequence[Action]]]) -> None:
    """Who brings attention has awaited itself that all of the CTA's q, k and v are projected, after which its place is free: as long as no
    wait for a counter expires, some counters say as much."""
    for cta, roles in enumerate(schedules):
        for actions in roles:
            awaited = set[int]()  # in which layers
            for action in actions:
                if (action.kind, action.name, action.group) == ("await", "projected", plan.head_groups - 1):
                    awaited.add(action.layer)
                if (action.kind, action.name) == ("place", "attended"):
                    require(action.layer in awaited, f"CTA {cta} has projected before attention is placed", action)


def scope_of(plan: BlockPlan, cta: int, name: str) -> int:
    return cta // plan.cluster_size if name == "exchange" else 0


def require(ok: bool, what: str, seen: object) -> None:
    if not ok:
        raise AssertionError(f"step: {what}: {seen}")
