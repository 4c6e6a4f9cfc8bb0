"""How a CTA's shared memory, warps and registers are spent on the stream of weights: tiles, stages, window, warps of each role.

What covers a wait for other CTAs is what streams on meanwhile: the ring's stages, and the tiles that waiting tile warps have in
registers, where they do. Both are chosen together for the most bytes. Measured on an H200 (lab/decode_step.md).
"""

from __future__ import annotations

from typing import NamedTuple

from clusterfusion.architecture import DecoderConfig
from clusterfusion.plan.limits import PlanLimits
from clusterfusion.plan.sizes import (
    BARRIER_BYTES,
    ELEMENT_BYTES,
    TENSOR_COPY_ALIGNMENT,
    cache_tile_bytes,
    cache_tile_tokens,
    even_parts,
    fixed_shared_bytes,
    head_groups,
    round_up,
    tokens_a_pass,
    value_spans,
)

# Two rows of hidden_size a tile, where the registers of a warp hold them: each read of x is for both, and there is more to hold.
ROWS_A_TILE = 2
MOST_TILE_BYTES = 10240  # that the registers of a warp hold
# Copies of 5 KB and less are slow: as many tiles a stage as make it about as large as this.
TARGET_STAGE_BYTES = 8192
MOST_STAGE_TILES = 4
MAX_STAGES = 64

WARPS = (6, 7, 8, 9, 10, 11)  # of tiles, to choose from
SCARCE_WARPS = (2, 3, 4, 5)  # where shared memory is scarce
# Vector warps hold a vector of hidden_size in registers between them: so many quads a thread, and the norms' weights for them.
QUADS_A_THREAD = 4
FEWEST_VECTOR_WARPS, FEWEST_AT_EASE, MOST_VECTOR_WARPS = 5, 6, 8
SCARCE_VECTOR_WARPS = 4
GOOD_COVER = 0.95  # of the most there can be: of such choices, the one with the fewest quads a thread
# Vector, tile and producer warps together: with more, a thread has fewer than 128 registers.
MOST_WARPS = 16
# A bundle of more value_spans (sizes.py) than this is wide: its sums are so many registers of a thread that the rest no longer fits 128. A CTA
# has so few warps then that a thread has more; and stages of one tile or two, since only the fewest of WARPS, 6, are left for tiles.
MOST_SPANS_AT_EASE = 2
MOST_WARPS_OF_WIDE, MOST_STAGE_TILES_OF_WIDE = 12, 2
SCARCE_SHARED_BYTES = 128 * 1024

# In flight, at most, from memory to a CTA. Messages between CTAs queue behind it; but who is behind the others catches up with it, as long as those that
# wait for it leave it the memory: they have no more stages in flight than EARLY_BYTES take, until what they wait for is there.
# The whole step of 410M, 1.4B, 2.8B, 6.9B, LLaMA 1B, LLaMA 8B: best with 40 KB, 48, 60, 72, 64 to 72 and 72 KB; and 16 KB, 32, 40, 32, 24 to 32
# and 32 KB.
NARROW_HIDDEN_SIZE = 2048
NARROW_WINDOW_BYTES, NARROW_EARLY_BYTES = 40960, 16384  # below it
WINDOW_BYTES_AN_ELEMENT = 24  # of hidden_size, from there on
MOST_WINDOW_BYTES, EARLY_BYTES = 73728, 32768


class Ring(NamedTuple):
    """Fields of BlockPlan. Where shared memory does not suffice, `stages` is 0 and `shared_bytes` what it would take at least."""

    vector_warps: int
    warps: int
    stages: int
    tile_bytes: int
    stage_tiles: int
    window_stages: int
    early_stages: int
    head_groups: int
    tile_tokens: int
    shared_bytes: int


def window_bytes(config: DecoderConfig) -> int:
    """In flight, at most, from memory to a CTA: with sequential residual, where CTAs wait for one another most often, the most."""
    if config.hidden_size < NARROW_HIDDEN_SIZE:
        return NARROW_WINDOW_BYTES
    if not config.parallel_residual:
        return MOST_WINDOW_BYTES
    return min(WINDOW_BYTES_AN_ELEMENT * config.hidden_size, MOST_WINDOW_BYTES)


def early_bytes(config: DecoderConfig) -> int:
    """As many of these as whole stages take, or more, while what they are multiplied by is not there yet."""
    return NARROW_EARLY_BYTES if config.hidden_size < NARROW_HIDDEN_SIZE else EARLY_BYTES


def tells_uses_apart(stages: int, teams: int, window: int) -> bool:
    """Whether nobody who waits for a stage can see an older use of it (cuda/ops/ring.cuh): it is always the same team's, or the ring holds
    a stage of every team and all that may be in flight."""
    return stages % teams == 0 or stages >= teams + window


def is_scarce(limits: PlanLimits) -> bool:
    return limits.shared_bytes_per_block < SCARCE_SHARED_BYTES


def enough_bytes(config: DecoderConfig, limits: PlanLimits) -> int:
    """So deep a ring must be at least, where there is a choice."""
    return 2 * TARGET_STAGE_BYTES if is_scarce(limits) else window_bytes(config)


def choose_ring(config: DecoderConfig, limits: PlanLimits, ctas: int, queries: int) -> Ring:
    """The ring of a CTA that attends bundles of so many `queries`."""
    scarce = is_scarce(limits)
    row_bytes = config.hidden_size * ELEMENT_BYTES
    wide = value_spans(config, queries) > MOST_SPANS_AT_EASE
    fits_registers = ROWS_A_TILE * row_bytes <= MOST_TILE_BYTES and not wide
    rows = ROWS_A_TILE if fits_registers and not scarce else 1
    pass_bytes = cache_tile_bytes(config, tokens_a_pass(config))  # cached tokens fit a tile too
    tile_bytes = round_up(max(rows * row_bytes, pass_bytes), TENSOR_COPY_ALIGNMENT)
    tile_tokens = cache_tile_tokens(config, tile_bytes)
    groups = head_groups(config, tile_bytes)
    stage_tiles = 1
    most_stage_tiles = MOST_STAGE_TILES_OF_WIDE if wide else MOST_STAGE_TILES
    while stage_tiles < most_stage_tiles and tile_bytes * stage_tiles * 3 // 2 <= TARGET_STAGE_BYTES:
        stage_tiles *= 2
    if not even_parts(config, tile_bytes):
        stage_tiles = 1
    stage_bytes = tile_bytes * stage_tiles
    stage_room = stage_bytes + BARRIER_BYTES
    holds = tile_bytes <= MOST_TILE_BYTES and limits.holds_tiles
    window = max(1, window_bytes(config) // stage_bytes)

    def fixed(warps: int) -> int:
        return fixed_shared_bytes(config, ctas, queries, tile_bytes, warps, groups)

    def stages_with(warps: int) -> int:
        room = min(max((limits.shared_bytes_per_block - fixed(warps)) // stage_room, 0), MAX_STAGES)
        teams = warps // stage_tiles
        return room if tells_uses_apart(room, teams, window) else room // teams * teams

    def least_bytes(warps: int) -> int:  # a stage of every team
        return fixed(warps) + warps // stage_tiles * stage_room

    def cover(warps: int) -> int:
        stages = stages_with(warps)
        held = warps * tile_bytes if stages and holds else 0
        return stages * stage_bytes + held

    def quads(vectors: int) -> int:  # of x, a thread
        return -(-config.hidden_size // (4 * 32 * vectors))

    most_warps = MOST_WARPS_OF_WIDE if wide else MOST_WARPS
    fewest = FEWEST_VECTOR_WARPS if wide else min(max(quads(QUADS_A_THREAD), FEWEST_VECTOR_WARPS), MOST_VECTOR_WARPS)
    choices = [
        (vectors, warps)
        for vectors in ([SCARCE_VECTOR_WARPS] if scarce else range(fewest, MOST_VECTOR_WARPS + 1))
        for warps in WARPS
        if vectors + warps < most_warps and warps % stage_tiles == 0
    ]
    if not any(stages_with(warps) for _, warps in choices):
        choices = [(choices[0][0], warps) for warps in SCARCE_WARPS if warps % stage_tiles == 0]
    most = max(cover(warps) for _, warps in choices)
    good = [(v, w) for v, w in choices if cover(w) >= GOOD_COVER * most]
    vector_warps, warps = min(
        good, key=lambda c: (quads(c[0]), -cover(c[1]), max(0, FEWEST_AT_EASE - c[0]), c[0], -c[1])
    )
    stages = stages_with(warps)
    return Ring(
        vector_warps=vector_warps,
        warps=warps,
        stages=stages,
        tile_bytes=tile_bytes,
        stage_tiles=stage_tiles,
        window_stages=max(1, min(stages, window)),
        early_stages=max(1, min(stages, window, -(-early_bytes(config) // stage_bytes))),
        head_groups=groups,
        tile_tokens=tile_tokens,
        shared_bytes=fixed(warps) + stages * stage_room if stages else min(least_bytes(warps) for _, warps in choices),
    )
