"""When each CTA of a traced step is where, and whether the same ones are always late: a laboratory tool.

    PYTHONPATH=src python3 lab/step_skew.py SHAPE@CONTEXT ...

For each: the duration of three recorded steps and, of their layers but the first two and the last, when CTAs end: the spread, what
of it is a CTA's own in all layers, and how alike that is in two steps and in the two CTAs of a cluster. Then, for each event,
when it comes after the mean begin of the layer: mean, spread, first and last CTA, in ns.
"""

from __future__ import annotations

import sys

import numpy as np
import torch

from clusterfusion import reference
from clusterfusion.bench.trace.measure import record_step
from clusterfusion.named_shapes import named_shape
from clusterfusion.ops.layer_launch import plan_for
from clusterfusion.plan.trace import TIMES
from clusterfusion.random_weights import random_weights, uniform

STEPS = 24


def alike(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a, b)[0, 1])


def show(shape: str, context: int) -> None:
    config = named_shape(shape)
    device = torch.device("cuda", 0)
    weights = random_weights(config, seed=0, dtype=torch.float16, device=device)
    room = (config.num_layers, config.num_kv_heads, context + 64, config.head_dim)
    cache = reference.KVCache(*(uniform(room, 0.0, 1.0, s, torch.float16, device) for s in (1, 2)))
    plan = plan_for(config, 0)
    steps = [record_step(weights, cache, 7, context, STEPS, plan) for _ in range(3)]
    took = ", ".join(f"{step.step_ns / 1e3:.1f}" for step in steps)
    print(f"{shape} context {context}: {plan.order}, us {took}, {steps[-1].ghz.mean():.3f} GHz")
    layers = slice(2, config.num_layers - 1)
    own = []
    for step in steps:
        ends = step.at("down_tiles_done" if plan.order == "sequential" else "o_done")[:, layers]
        late = ends - ends.mean(axis=0)
        own.append(late.mean(axis=1))
        print(
            f"  CTAs end a layer: std {late.std():.0f} ns, of it a CTA's own {own[-1].std():.0f}, the rest "
            f"{(late - own[-1][:, None]).std():.0f}; the last one {late.max(axis=0).mean():.0f} behind the mean"
        )
    print(
        f"  own part alike in two steps {alike(own[0], own[1]):.2f}, in a cluster {alike(own[0][::2], own[0][1::2]):.2f}"
    )
    step = steps[-1]
    begin = np.nanmean(step.at("begin")[:, layers], axis=0)
    for event in TIMES:
        after = step.at(event)[:, layers] - begin
        if not np.isnan(after).all():
            print(
                f"    {event:18s} mean {np.nanmean(after):8.0f} std {np.nanmean(np.nanstd(after, axis=0)):6.0f} first "
                f"{np.nanmean(np.nanmin(after, axis=0)):8.0f} last {np.nanmean(np.nanmax(after, axis=0)):8.0f}"
            )
    print(f"    layer {np.diff(begin).mean():.0f}")


if __name__ == "__main__":
    for job in sys.argv[1:]:
        show(job.partition("@")[0], int(job.partition("@")[2]))
        torch.cuda.empty_cache()
