"""Times whole-step plans on one GPU, in turn, beside the read ceiling of the same run: a laboratory tool.

    PYTHONPATH=src python3 lab/step_variants.py SHAPE [--context N] [--steps N] [--hot S] [--bursts N] [VARIANT ...]

A VARIANT is ctas=C,warps=W,vectors=V,tile=B,tokens=K,tiles=T,stages=S,window=N,early=E,heads=G,upfirst=0|1,fifths=F; what is left out is as the plan has it. A
tile is of B bytes, and of K cached tokens; T tiles make a stage. Prints ms a token (median over rounds of a stream of steps), the ratio to the floor, and for the first variant where
the time of a layer goes. With --hot each variant runs for S seconds ahead of each of its measurements, and ahead of a trace, so that it is measured as the
power cap leaves it; and its clock is printed, as the driver has it behind each measurement.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import itertools
import statistics
import time

import torch

from clusterfusion import reference
from clusterfusion.bench.read_ceiling import ReadCeiling
from clusterfusion.engine.step_decoder import StepDecoder
from clusterfusion.jit.cache import default_cache
from clusterfusion.jit.decode_step import step_source
from clusterfusion.named_shapes import named_shape
from clusterfusion.ops.layer_launch import plan_for
from clusterfusion.plan import BlockPlan, block, sizes
from clusterfusion.plan.ring import tells_uses_apart
from clusterfusion.plan.trace import EVENTS, ROLES, passed, trace_words
from clusterfusion.random_weights import random_weights, uniform


def variant(plan: BlockPlan, text: str) -> BlockPlan:
    knobs = {name: int(value) for name, value in (part.split("=") for part in text.split(",") if part)}
    c = plan.config
    ctas = knobs.get("ctas", plan.ctas)
    tiles = knobs.get("tiles", plan.stage_tiles)
    tile, tokens = knobs.get("tile", plan.tile_bytes), knobs.get("tokens", plan.tile_tokens)
    stage = tile * tiles
    warps, vectors = knobs.get("warps", plan.warps), knobs.get("vectors", plan.vector_warps)
    groups = knobs.get("heads", plan.head_groups)
    fixed = sizes.fixed_shared_bytes(c, ctas, plan.queries, tile, warps, groups)
    stage_room = stage + sizes.BARRIER_BYTES
    most = (plan.limits.shared_bytes_per_block - fixed) // stage_room
    window = knobs.get("window", max(1, plan.window_stages * plan.stage_bytes // stage))
    teams = warps // tiles
    stages = min(knobs.get("stages", most), most, 64)
    stages = stages if tells_uses_apart(stages, teams, window) else stages // teams * teams
    most_splits = block.MOST_SPLITS if plan.queries == 1 else block.MOST_SHARED_SPLITS
    splits = min(ctas // plan.bundles, most_splits)
    splits = splits // 2 * 2 if splits > 1 else splits
    up_first = plan.config.parallel_residual and bool(knobs.get("upfirst", plan.up_first))
    made = dataclasses.replace(
        plan, ctas=ctas, splits=splits, up_first=up_first, vector_warps=vectors, warps=warps, stages=stages, tile_bytes=tile, tile_tokens=tokens, stage_tiles=tiles,
        window_stages=min(window, stages), early_stages=min(window, stages, knobs.get("early", -(-plan.early_stages * plan.stage_bytes // stage))),
        fifths_before_cached=knobs.get("fifths", plan.fifths_before_cached), head_groups=groups, shared_bytes=fixed + stages * stage_room,
    )  # fmt: skip
    block.check_plan(made)
    return made


def compile_one(job: tuple[BlockPlan, bool]) -> None:
    plan, trace = job
    default_cache().get(step_source(plan, "float16", trace=trace), "sm_90a")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shape")
    parser.add_argument("--context", type=int, default=16)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hot", type=float, default=0.0)
    parser.add_argument("--trace", action="store_true")
    parser.add_argument("--bursts", type=int, default=0, help="of 0.6 s each, for lab/power.py")
    parser.add_argument("variants", nargs="*", default=[""])
    arguments = parser.parse_intermixed_args()
    device = torch.device("cuda", 0)
    config = named_shape(arguments.shape)
    base = plan_for(config, 0)
    plans = {text or "plan": variant(base, text) if text else base for text in ["", *arguments.variants]}
    jobs = [(plan, False) for plan in plans.values()] + [(base, True)] * arguments.trace
    began = time.time()
    with concurrent.futures.ProcessPoolExecutor(12) as pool:
        list(pool.map(compile_one, jobs))
    print(f"compiled {len(jobs)} in {time.time() - began:.0f} s", flush=True)
    weights = random_weights(config, seed=0, dtype=torch.float16, device=device)
    room = arguments.context + 200
    shape = (config.num_layers, config.num_kv_heads, room, config.head_dim)
    cache = reference.KVCache(*(uniform(shape, 0.0, 1.0, s, torch.float16, device) for s in (1, 2)))
    ceiling = ReadCeiling(4 << 30, device)
    decoders = {name: StepDecoder(weights, cache, plan=plan) for name, plan in plans.items()}

    def heat(decoder: StepDecoder) -> None:
        began = time.perf_counter()
        while time.perf_counter() - began < arguments.hot:
            list(decoder.stream(7, arguments.context, arguments.steps))

    def event_ms(work: object) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        ceiling.lead()
        start.record()
        work()  # type: ignore[operator]
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    times: dict[str, list[float]] = {name: [] for name in decoders}
    walls: dict[str, list[float]] = {name: [] for name in decoders}
    clocks: dict[str, list[int]] = {name: [] for name in decoders}
    reads = []
    tokens: dict[str, list[int]] = {}
    for _ in range(arguments.rounds):
        for launch in (candidate.run for candidate in ceiling.candidates(1)):
            reads.append(ceiling.num_bytes / event_ms(launch) / 1e9)
        for name, decoder in decoders.items():

            def run(name: str = name, decoder: StepDecoder = decoder) -> None:
                tokens[name] = list(decoder.stream(7, arguments.context, arguments.steps))

            heat(decoder)
            times[name].append(event_ms(run) / arguments.steps)
            torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            walls[name].append((time.perf_counter() - start) * 1e3 / arguments.steps)
            if arguments.hot:
                clocks[name].append(torch.cuda.clock_rate())
    best = max(reads)
    top = statistics.median(sorted(reads)[len(reads) // 2 :])
    step = config.step_parameters * 2 + (arguments.context + arguments.steps / 2) * config.kv_elements_per_token * 2
    floor = step / top / 1e9
    print(
        f"{arguments.shape} context {arguments.context}: ceiling {top:.3f} (best {best:.3f}) TB/s, floor {floor:.4f} ms"
    )
    first = next(iter(decoders))
    for name, plan in plans.items():
        ms, wall = statistics.median(times[name]), statistics.median(walls[name])
        clock = f"  {statistics.median(clocks[name]):.0f} MHz" if arguments.hot else ""
        same = sum(a == b for a, b in zip(tokens[name], tokens[first], strict=True))
        print(
            f"  {name:36s} {plan.ctas} ctas {plan.vector_warps}+{plan.warps} w {plan.stages:2d} x {plan.stage_tiles} x {plan.tile_bytes} win {plan.window_stages:2d} early {plan.early_stages} heads {plan.head_groups}: "
            f"{ms:.4f} ms {ms / floor:.4f}x  wall {wall:.4f} {wall / floor:.4f}x  tokens {same}/{arguments.steps}{clock}",
            flush=True,
        )
    for _, (name, decoder) in itertools.product(range(arguments.bursts), decoders.items()):
        time.sleep(1.2)
        start = ended = time.time()
        while ended - start < 0.6:
            list(decoder.stream(7, arguments.context, arguments.steps))
            ended = time.time()
        print(f"burst {start:.3f} {ended:.3f} {name}")
    if arguments.trace:
        show_trace(base, weights, cache, arguments.context, arguments.hot)


def show_trace(plan: BlockPlan, weights: object, cache: reference.KVCache, context: int, hot: float) -> None:
    layers = plan.config.num_layers
    trace = torch.zeros(trace_words(plan), dtype=torch.int64, device="cuda")
    decoder = StepDecoder(weights, cache, plan=plan, trace=trace)  # type: ignore[arg-type]
    began = time.perf_counter()
    for _ in itertools.takewhile(lambda n: n < 5 or time.perf_counter() - began < hot, itertools.count()):
        list(decoder.stream(7, context, 8))
    torch.cuda.synchronize()
    events = trace[: plan.ctas * (layers + 1) * len(EVENTS)].view(plan.ctas, layers + 1, len(EVENTS)).cpu()
    clocks = trace[plan.ctas * (layers + 1) * len(EVENTS) :].view(plan.ctas, 4).cpu().double()
    ghz = ((clocks[:, 2] - clocks[:, 0]) / (clocks[:, 3] - clocks[:, 1])).median().item()
    print(f"  {ghz:.3f} GHz; step {(clocks[:, 2] - clocks[:, 0]).median().item() / ghz / 1e3:.1f} us")
    middle = events[:, 4 : layers - 2].double()
    middle[middle == 0] = float("nan")  # a CTA that has no part in it
    middle = middle / ghz / 1e3
    at = {name: middle[..., i] for i, name in enumerate(EVENTS)}
    orders = [[event for event in passed(role, plan.order) if event != "logits_done"] for role in ROLES]
    for before, after in itertools.chain.from_iterable(map(itertools.pairwise, orders)):
        took = at[after] - at[before]
        took = took[: plan.config.num_heads * plan.splits]
        print(
            f"    {before:>16s} -> {after:16s} mean {took.nanmean():7.2f} us  median {took.nanmedian():7.2f}  "
            f"min {took[~took.isnan()].min():7.2f}  max {took[~took.isnan()].max():7.2f}"
        )
    total = (middle[:, 1:, 0] - middle[:, :-1, 0]).nanmean()
    print(
        f"    layer {total:.2f} us; warp 0 waited for data {at['data_waited'].nanmean():.2f} us a layer, "
        f"the producer for room {at['room_waited'].nanmean():.2f}"
    )


if __name__ == "__main__":
    main()
