"""What an action of a step's schedule reads and writes: vectors in memory, and places in its CTA's shared memory."""

from __future__ import annotations

from collections.abc import Iterator

from clusterfusion.plan.block import BlockPlan
from clusterfusion.plan.block_check import of_group
from clusterfusion.plan.step import Action


def written(plan: BlockPlan, action: Action) -> Iterator[tuple[str, int]]:
    """The vector in memory, and its layer, that an action writes."""
    gated = plan.config.gated_mlp
    if action.kind == "publish" and action.rows:
        yield action.name, action.layer
    elif action.rows and (action.kind == "finish" or (action.kind == "read" and action.name == "up" and not gated)):
        yield "h", action.layer
    elif action.kind == "arrive" and action.name in ("attention", "exchange"):
        yield {"attention": "partials", "exchange": "exchange"}[action.name], action.layer


def used(plan: BlockPlan, action: Action) -> Iterator[tuple[str, int]]:
    """The vector in memory, and its layer, without which an action cannot be done. A CTA's own rows of x and middle,
    for the residual, are not here: nobody else writes them."""
    if action.kind == "arrive" and action.name == "attention" and plan.merged_ctas > 1:
        yield "exchange", action.layer
    if action.kind == "load" and (action.name, action.layer) != ("x", 0):  # which is the embedding
        yield action.name, action.layer


def shared(plan: BlockPlan, action: Action) -> Iterator[tuple[bool, str, tuple[str, int]]]:
    """What an action writes (True) to places in the CTA's shared memory, or needs there. Places of one role alone, where
    barriers of its own keep the order, are not here."""
    kind, name, layer, group = action.kind, action.name, action.layer, action.group
    gated, parallel, last = plan.config.gated_mlp, plan.config.parallel_residual, layer == plan.config.num_layers
    merges = "exchange" if plan.merged_ctas > 1 else "attention"  # an arrival behind the merge of the CTA's own slots
    rms = plan.config.norm == "rms_norm"
    scale = "scale" if parallel else "middle_scale"  # of what up is multiplied by
    # Attention of a head group takes a part of x1, each another one; other vectors take them all.
    x1 = [of_group("x1", each) for each in range(plan.head_groups)]
    if kind == "place" and name in ("queries", "scale", "middle_scale"):
        yield True, name, (name, layer)
        if name == "scale" and not last:
            yield True, "biases", ("biases", layer)
    elif kind == "place" and name in ("attended", "hidden"):
        yield True, of_group("x1" if name == "attended" else "x2", group), (name, layer)
    elif kind == "place":
        yield from ((True, place, (name, layer)) for place in x1)
        if name == "normed" and not last:
            if not rms:
                yield True, "biases", ("biases", layer)
            if parallel:
                yield True, "x2", (name, layer)
    elif kind == "read" and name in ("qkv", "lm_head"):
        yield from ((False, place, ("normed", layer)) for place in x1)
    elif kind == "read" and name in ("o", "down"):
        yield False, of_group("x1" if name == "o" else "x2", group), ("attended" if name == "o" else "hidden", layer)
    elif kind == "read" and name == "up":
        wanted = ("normed" if parallel else "middle_normed", layer)
        yield from ((False, place, wanted) for place in (("x2",) if parallel else x1))
    if kind == "publish" and name == "qkv":
        yield False, "biases", ("biases", layer)
        if rms:
            yield False, "scale", ("scale", layer)
    if (kind == "read" and name == "up" and not gated) or kind == "finish":
        yield False, "biases", ("biases", layer)
        if rms:
            yield False, scale, (scale, layer)
    if rms and kind == "arrive" and name == "token":
        yield False, "scale", ("scale", layer)
    if gated and kind == "read" and name == "up":
        yield True, of_group("up_sums", group), ("up", layer)
    if kind == "finish":
        yield False, of_group("up_sums", group), ("up", layer)
    if kind == "read" and name == "kv":
        yield False, "queries", ("queries", layer)
    # With sequential residual, slots may lie where h will be; the proof takes it that they do.
    slots = ["slots"] if parallel else [of_group("x2", each) for each in range(plan.hidden_groups)]
    if (kind == "read" and name == "kv") or (kind == "arrive" and name == merges):
        yield from ((kind == "read", place, ("kv", layer)) for place in slots)
    if kind == "read" and name in ("o", "down"):
        yield True, of_group(f"{name}_sums", group), (name, layer)
    if kind == "publish" and name in ("x", "middle"):
        of_layer = layer - (name == "x")
        yield False, "biases", ("biases", of_layer)
        for each in range(plan.hidden_groups if name == "x" else 0):
            yield False, of_group("down_sums", each), ("down", of_layer)
        if parallel or name == "middle":
            for each in range(plan.head_groups):
                yield False, of_group("o_sums", each), ("o", of_layer)
