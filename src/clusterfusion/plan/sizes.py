"""How large things are that a plan is made of: rows, tiles of cached tokens, bundles of query heads, shared memory."""

from __future__ import annotations

from clusterfusion.architecture import DecoderConfig

ELEMENT_BYTES = 2  # weights and K/V are 16-bit
VECTOR = 8  # elements in 16 bytes, the unit of bulk copies
# 132 or 128 CTAs are resident in clusters of 2 on an H200, only 120 in clusters of 4: a tenth of the bandwidth.
CLUSTER_SIZE = 2
BARRIER_BYTES = 2 * 8  # of a stage of the ring: mbarriers that say that it is full, and empty
MAX_TILE_TOKENS = 256  # the longest side of a tensor copy's box
MAX_TILE_PASSES = 16  # of a warp over a tile: their scores are in registers
TENSOR_COPY_ALIGNMENT = 128  # bytes, in shared memory
PARTIAL_PADDING = 4  # floats beside a head's values in a partial: maximum, sum, and two to fill 16 bytes
# The most query heads that a bundle has, where they are of up to 64 dimensions, or of more; and the most value_spans, which see. With more,
# registers do not suffice.
MOST_QUERIES, MOST_WIDE_QUERIES = 8, 6
MOST_VALUE_SPANS = 4
MOST_HEAD_GROUPS = 2  # of a plan's own choice
LEAST_PART_BYTES = 2048  # of a row of o, for a head group: a copy each


def qkv_rows(config: DecoderConfig) -> int:
    """Rows of the projection of q, k and v."""
    return config.q_size + 2 * config.kv_size


def bundle_sizes(config: DecoderConfig) -> list[int]:
    """How many query heads a bundle may have, the most first: of those that share a K/V head, all or an even part, as many as
    one CTA takes."""
    group = config.num_heads // config.num_kv_heads
    most = min(group, MOST_QUERIES if config.head_dim <= 64 else MOST_WIDE_QUERIES)
    return [n for n in range(most, 0, -1) if group % n == 0 and value_spans(config, n) <= MOST_VALUE_SPANS]


def head_groups(config: DecoderConfig, tile_bytes: int) -> int:
    """Groups of K/V heads, alike, that come one after another where nothing else hides attention: with sequential residual."""
    fits = [
        groups
        for groups in range(1, MOST_HEAD_GROUPS + 1)
        if config.num_kv_heads % groups == 0
        and LEAST_PART_BYTES <= config.q_size // groups * ELEMENT_BYTES <= tile_bytes
    ]
    return 1 if config.parallel_residual or not fits else fits[-1]


def by_groups(first: int, last: int, total: int, groups: int) -> tuple[range, ...]:
    """A CTA's rows of a matrix whose `total` rows come in so many groups of the same size: of each group a range, numbered as the
    matrix's rows are. Without groups the CTA would have rows `first` up to `last`; over the groups it has as many (Hermite's
    identity), and over all CTAs each row is had once."""
    size = total // groups
    return tuple(
        range(group * size + (first + group) // groups, group * size + (last + group) // groups)
        for group in range(groups)
    )


def value_spans(config: DecoderConfig, queries: int) -> int:
    """How many blocks of four query heads by 64 dimensions cover the output of a bundle of so many `queries`: a warp that attends it
    has their sums in registers, 16 a lane for each block. None for a bundle of one head, which is attended another way."""
    return 0 if queries == 1 else -(-queries // 4) * -(-config.head_dim // 64)


def tokens_a_pass(config: DecoderConfig) -> int:
    """Cached tokens that a warp takes at once with one query head. A tile is of whole passes, whoever takes it."""
    return 32 // (config.head_dim // VECTOR)


def cache_tile_tokens(config: DecoderConfig, tile_bytes: int) -> int:
    """The most cached tokens whose keys and values fit `tile_bytes`, in whole passes of a warp, at least one."""
    together = tokens_a_pass(config)
    tokens = together
    while (
        tokens + together <= min(MAX_TILE_TOKENS, MAX_TILE_PASSES * together)
        and cache_tile_bytes(config, tokens + together) <= tile_bytes
    ):
        tokens += together
    return tokens


def even_parts(config: DecoderConfig, tile_bytes: int) -> bool:
    """Whether rows that are longer than a tile are cut into tiles that are all alike."""
    return all(
        elements // VECTOR % -(-elements * ELEMENT_BYTES // tile_bytes) == 0
        for elements in (config.q_size, config.intermediate_size)
    )


def fixed_shared_bytes(
    config: DecoderConfig,
    ctas: int,
    queries: int,
    tile_bytes: int,
    warps: int,
    groups: int,
) -> int:
    """Shared memory beside the ring, with so many head `groups`, in the order of the program's struct, with room for its padding. The
    program asserts at compile time that its struct fits."""
    c = config
    vector = 4 * max(c.hidden_size, c.q_size)
    hidden = round_up(c.intermediate_size * ELEMENT_BYTES, 16)
    vectors = vector + (max(vector, hidden) if c.parallel_residual else hidden)
    partial = queries * 4 * (c.head_dim + PARTIAL_PADDING)
    out_rows = -(-c.hidden_size // ctas) + 1
    down_parts = -(-c.intermediate_size * ELEMENT_BYTES // tile_bytes)
    o_parts = groups * -(-c.q_size // groups * ELEMENT_BYTES // tile_bytes)
    slots = (warps + 1) * partial
    if not c.parallel_residual and slots <= hidden:  # they lie where h will be
        slots = 16
    attention = (queries + 2) * 4 * c.head_dim + slots + CLUSTER_SIZE * partial
    up_rows = -(-c.intermediate_size // ctas) + 3 + -(-(c.q_size + c.intermediate_size) // c.hidden_size)
    bias_rows = -(-qkv_rows(c) // ctas) + 1 + up_rows + 2 * out_rows
    if c.gated_mlp:
        bias_rows += up_rows + 2 * up_rows  # the gates', and the sums of both
    # o and down sums, biases, and the CTA's rows of the residual; a candidate a tile warp.
    rows = 4 * (out_rows * (1 + o_parts + down_parts) + bias_rows) + 16 * warps
    return vectors + attention + rows + 768


def cache_tile_bytes(config: DecoderConfig, tokens: int) -> int:
    """Of a tile that holds the keys and, behind them, the values of so many tokens of a head."""
    half = tokens * config.head_dim * ELEMENT_BYTES
    return round_up(half, TENSOR_COPY_ALIGNMENT) + half


def round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
