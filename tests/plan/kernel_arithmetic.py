"""The sums of the decoder's device functions in NumPy, operation by operation in their order.

What is not an order is rounded once where the GPU may round otherwise: exp2, erf, tanh, 1 / sqrt. `dtype` of the arrays is
that of the arithmetic: float32 as in the kernels, or float64 for the same order with hardly any rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]

VECTOR, WARP = 8, 32
LOG2E = 1.4426950408889634


def loads_together(vector_warps: int) -> int:
    """Quads of partials that a thread has under way together: Attention::load_attention."""
    return 12 if vector_warps < 6 else 16


def fma(a: Array, b: Array, c: Array) -> Array:
    """a * b + c in c's dtype. For float32 by way of float64, whose product is exact; rounded twice, which shows in one of
    2^29 results."""
    return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(c.dtype)


def exp2(x: Array) -> Array:
    return np.exp2(x.astype(np.float64)).astype(x.dtype)


def butterfly(values: Array) -> Array:
    """Sum over the last axis, the 32 lanes of a warp: warp_sum of collectives/block_sum.cuh."""
    lanes = np.arange(WARP)
    for mask in (16, 8, 4, 2, 1):
        values = values + values[..., lanes ^ mask]
    return values[..., 0]


def gemv(weights: Array, x: Array, parts: Sequence[int]) -> Array:
    """weights [rows, columns] times x [columns]: the sums [rows, parts] of ops/gemv.cuh. Lane l takes the vectors of eight
    l, l + 32, ... of each part, in order, into two sums, of a vector's first four elements and its last."""
    sums = []
    start = 0
    for elements in parts:
        steps = -(-elements // (VECTOR * WARP))
        padding = (0, steps * VECTOR * WARP - elements)  # lanes without a vector add nothing, and fma(0, 0, sum) is sum
        w = np.pad(weights[:, start : start + elements], ((0, 0), padding)).reshape(-1, steps, WARP, VECTOR)
        v = np.pad(x[start : start + elements], padding).reshape(steps, WARP, VECTOR)
        halves = [np.zeros((len(weights), WARP), x.dtype) for _ in range(2)]
        for step in range(steps):
            for k in range(VECTOR):
                halves[k // 4] = fma(w[:, step, :, k], v[step, :, k], halves[k // 4])
        sums.append(butterfly(halves[0] + halves[1]))
        start += elements
    assert start == weights.shape[1] == len(x)
    return np.stack(sums, axis=1)


def layer_norm(x: Array, weight: Array, bias: Array, eps: float, warps: int) -> Array:
    """VectorWarps::normalise over the threads of so many vector warps, thread t holding elements 4 t to 4 t + 3 and so on."""
    hidden, threads, dtype = len(x), warps * WARP, x.dtype.type
    held, deal, block_sum = _dealt(hidden, warps)
    values = deal(x)
    inverse = dtype(1) / dtype(hidden)
    total = np.zeros(threads, x.dtype)
    for row in values:
        total = total + row
    values = np.where(held, values - block_sum(total) * inverse, 0).astype(x.dtype)
    total, squares = np.zeros(threads, x.dtype), np.zeros(threads, x.dtype)
    for row in values:
        total, squares = total + row, fma(row, row, squares)
    rest = block_sum(total) * inverse
    variance = block_sum(squares) * inverse - rest * rest
    variance = dtype(0) if variance < 0 else variance  # NaN stays
    scale = dtype(1 / math.sqrt(float(variance) + eps)) if variance == variance else dtype(math.nan)
    scales, shifts = np.full(values.shape, scale), np.full(values.shape, -rest * scale)
    return undeal(fma(fma(values, scales, shifts), deal(weight), deal(bias)), hidden)


def rms_scale(x: Array, eps: float, warps: int) -> Array:
    """What RMSNorm multiplies a vector by: [1]."""
    hidden, dtype = len(x), x.dtype.type
    _, deal, block_sum = _dealt(hidden, warps)
    values = deal(x)
    squares = np.zeros(warps * WARP, x.dtype)
    for row in values:
        squares = fma(row, row, squares)
    mean = block_sum(squares) * (dtype(1) / dtype(hidden))
    return np.array([1 / math.sqrt(float(mean) + eps) if mean == mean else math.nan], dtype)


def _dealt(hidden: int, warps: int) -> tuple[Array, Callable[[Array], Array], Callable[[Array], Array]]:
    """Which elements of [items * 4, threads] there are; what deals a vector out so; and the sum over all threads."""
    threads = warps * WARP
    items = -(-hidden // (4 * threads))

    def deal(vector: Array) -> Array:
        padded = np.pad(vector, (0, items * threads * 4 - hidden))
        return padded.reshape(items, threads, 4).transpose(0, 2, 1).reshape(items * 4, threads)

    def block_sum(of_thread: Array) -> Array:
        total, *others = butterfly(of_thread.reshape(warps, WARP))
        for warp in others:
            total = total + warp
        return total

    return deal(np.ones(hidden, bool)), deal, block_sum


def undeal(values: Array, hidden: int) -> Array:
    quads, threads = len(values) // 4, values.shape[1]
    return values.reshape(quads, 4, threads).transpose(0, 2, 1).reshape(-1)[:hidden]


def gelu(x: Array, tanh: bool) -> Array:
    wide = x.astype(np.float64)
    if tanh:
        inner = 0.79788456080286536 * (wide + 0.044715 * wide**3)
        return (0.5 * wide * (1 + np.tanh(inner))).astype(x.dtype)
    erf = np.array([math.erf(value) for value in wide * math.sqrt(0.5)], np.float64)
    return (0.5 * wide * (1 + erf)).astype(x.dtype)


def silu(x: Array) -> Array:
    wide = x.astype(np.float64)
    return (wide / (1 + np.exp(-wide))).astype(x.dtype)


# -- attention ---------------------------------------------------------------------------------------------------------
# A partial is [head_dim + 2]: values, then maximum and sum. One with maximum -infinity is empty.


def group_sum(values: Array) -> Array:
    """Sum over the last axis, the lanes that share a token, by halving strides from the next power of two."""
    values = values.copy()
    lanes = values.shape[-1]
    for stride in (16, 8, 4, 2, 1):
        if stride < lanes:
            count = min(stride, lanes - stride)
            values[..., :count] += values[..., stride : stride + count]
    return values[..., 0]


class AttentionWarp:
    """One slot: a warp's running softmax over its tiles (ops/attention.cuh)."""

    def __init__(self, query: Array) -> None:
        self.lanes = len(query) // VECTOR
        self.together = WARP // self.lanes  # tokens taken at once, each by a group of lanes
        self.query = query.reshape(self.lanes, VECTOR)
        self.maximum = query.dtype.type(-math.inf)
        self.sums = np.zeros(self.together, query.dtype)
        self.values = np.zeros((self.together, self.lanes, VECTOR), query.dtype)

    def add_tile(self, keys: Array, values: Array) -> None:
        """Keys and values [tokens, head_dim] of one tile: token t belongs to group t % together."""
        tokens = len(keys)
        split = (tokens, self.lanes, VECTOR)
        dots = np.zeros(split[:2], keys.dtype)
        for i in range(VECTOR):
            dots = fma(np.broadcast_to(self.query[:, i], split[:2]), keys.reshape(split)[:, :, i], dots)
        scores = group_sum(dots)
        maximum = np.maximum(self.maximum, scores.max())
        keep = exp2(self.maximum - maximum)
        self.maximum = maximum
        self.sums, self.values = self.sums * keep, self.values * keep
        weights = exp2(scores - maximum)
        for token in range(tokens):
            group = token % self.together
            self.sums[group] += weights[token]
            self.values[group] = fma(weights[token], values.reshape(split)[token], self.values[group])

    def partials(self) -> Array:
        """[1, head_dim + 2]."""
        total, values = self.sums.dtype.type(0), np.zeros_like(self.values[0])
        for group in range(self.together):
            total, values = total + self.sums[group], values + self.values[group]
        return np.concatenate((values.reshape(-1), [self.maximum, total])).astype(self.sums.dtype)[None]


class GroupedAttentionWarp:
    """The same of several query heads [queries, head_dim] over the same keys and values, a block of tokens at a time
    (ops/grouped_attention.cuh): all are merged as single ones are. A tensor core's sums, whose order is its own, are one product here."""

    BLOCK = 16  # tokens
    GROUPS = 8  # of lanes: token t of a block belongs to group t % GROUPS

    def __init__(self, queries: Array) -> None:
        count, size = queries.shape
        self.queries = queries
        self.maximum = np.full(count, -math.inf, queries.dtype)
        self.sums = np.zeros((count, self.GROUPS), queries.dtype)
        self.values = np.zeros((count, size), queries.dtype)

    def add_tile(self, keys: Array, values: Array) -> None:
        for first in range(0, len(keys), self.BLOCK):
            self._add_block(keys[first : first + self.BLOCK], values[first : first + self.BLOCK])

    def _add_block(self, keys: Array, values: Array) -> None:
        scores = self.queries @ keys.T
        maximum = np.maximum(self.maximum, scores.max(axis=1))
        keep = exp2(self.maximum - maximum)
        self.maximum = maximum
        weights = exp2(scores - maximum[:, None])
        self.sums *= keep[:, None]
        for token in range(len(keys)):
            self.sums[:, token % self.GROUPS] += weights[:, token]
        self.values = self.values * keep[:, None] + weights @ values

    def partials(self) -> Array:
        """[queries, head_dim + 2]."""
        sums = self.sums
        while sums.shape[1] > 1:  # a butterfly over a head's lanes
            half = sums.shape[1] // 2
            sums = sums[:, :half] + sums[:, half:]
        return np.concatenate((self.values, self.maximum[:, None], sums), axis=1).astype(self.values.dtype)


def merge_in_rounds(partials: Array, each: int) -> Array:
    """One partial of several [count, head_dim + 2], in order, so many at a time: Attention::load_attention."""
    merged = np.zeros(partials.shape[1], partials.dtype)
    maximum = partials.dtype.type(-math.inf)
    for first in range(0, len(partials), each):
        together = partials[first : first + each]
        highest = max(maximum, *(partial[-2] for partial in together))
        base = partials.dtype.type(0) if highest == -math.inf else highest
        merged = merged * exp2(maximum - base)
        maximum = highest
        for partial in together:
            if partial[-2] != -math.inf:  # an empty one adds zeros
                merged = fma(exp2(partial[-2] - base), partial, merged)
        merged[-2] = 0
    merged[-2] = maximum
    return merged


def merge(partials: Array) -> Array:
    """One partial of several [count, head_dim + 2], in order."""
    merged = np.zeros(partials.shape[1], partials.dtype)
    maximum = max((partial[-2] for partial in partials), default=partials.dtype.type(-math.inf))
    for partial in partials:
        if partial[-2] != -math.inf:  # an empty one adds zeros
            merged = fma(exp2(partial[-2] - maximum), partial, merged)
    merged[-2] = maximum
    return merged
