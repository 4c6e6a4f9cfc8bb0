"""One decode step on the CPU, following the schedule of plan/step.py: CTAs that know only what they have waited for.

Every CTA is a coroutine that takes its actions one at a time; which CTA goes next is random. Memory that CTAs share holds
each element with the version it was written as, and reading any other version gives NaN: one that is not there yet, or one
that was written over too early. Sums are the kernels', operation by operation (plan/kernel_arithmetic.py).
"""

from __future__ import annotations

import collections
import random
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from plan import kernel_arithmetic as kernel
from plan.kernel_arithmetic import Array

from clusterfusion import reference
from clusterfusion.plan import BlockPlan, step, step_schedule
from clusterfusion.plan.step import Action
from clusterfusion.weights import DecoderWeights

Schedule = Callable[[BlockPlan, int, int], Iterable[Action]]
EMBEDDING = 0  # the version of x that no CTA writes


class Memory:
    """Vectors in device memory, in one or several buffers that versions take in turn."""

    def __init__(self, dtype: type) -> None:
        self._dtype = dtype
        self._values: dict[str, Array] = {}
        self._versions: dict[str, np.ndarray] = {}

    def allocate(self, name: str, *shape: int, buffers: int = 1) -> None:
        """Rows of any shape. Nothing is written yet."""
        self._values[name] = np.full((buffers, *shape), np.nan, self._dtype)
        self._versions[name] = np.full((buffers, shape[0]), -1)

    def write(self, name: str, rows: range | int, version: int, values: Array) -> None:
        at = rows if isinstance(rows, int) else slice(rows.start, rows.stop)
        buffer = version % len(self._values[name])
        self._values[name][buffer, at] = values
        self._versions[name][buffer, at] = version

    def read(self, name: str, version: int, rows: range | None = None) -> Array:
        """A copy of all rows, or of some; NaN where they have another version."""
        buffer = version % len(self._values[name])
        values = self._values[name][buffer].copy()
        values[self._versions[name][buffer] != version] = np.nan
        return values if rows is None else values[rows.start : rows.stop]

    def rows_of(self, name: str, version: int) -> int:
        """How many rows have this version: what a poll of value and epoch sees."""
        return int((self._versions[name][version % len(self._values[name])] == version).sum())


class StepInterpreter:
    """A step of one model at one position, ready to be run in any order of its CTAs.

    `cache` is not written; keys and values of the new token are in `new_keys` and `new_values` [layers, heads, head_dim]
    after a run. `dtype` is that of the arithmetic; weights, h, keys and values are rounded to the weights' own.
    """

    def __init__(
        self,
        plan: BlockPlan,
        weights: DecoderWeights,
        cache: reference.KVCache,
        token: int,
        position: int,
        *,
        dtype: type = np.float32,
        schedule: Schedule = step_schedule,
    ) -> None:
        self.plan, self.config, self.weights = plan, plan.config, weights
        self.token, self.position, self.dtype, self.schedule = token, position, dtype, schedule
        self.keys, self.values = self.array(cache.k[:, :, :position]), self.array(cache.v[:, :, :position])
        angles = reference.rotary_tables(self.config.rotary, torch.tensor([position]), dtype=torch.float64)
        self.cos, self.sin = (table[0].numpy().astype(dtype) for table in angles)

    def run(self, seed: int) -> tuple[Array, int]:
        """Logits [vocab] and the greedy token. CTAs go on in random order, some of them much slower than others."""
        c, plan = self.config, self.plan
        order = random.Random(seed)
        self.counters: collections.Counter[tuple[str, int]] = collections.Counter()
        self.memory = memory = Memory(self.dtype)
        memory.allocate("x", c.hidden_size, buffers=step.X_BUFFERS)
        memory.allocate("middle", c.hidden_size)
        memory.allocate("qkv", 3 * c.hidden_size)
        memory.allocate("h", c.intermediate_size)
        memory.allocate("partials", c.num_heads * plan.partials_per_head, c.head_dim + 2)
        memory.allocate("logits", c.vocab_size)
        for cluster in range(plan.ctas // plan.cluster_size):
            memory.allocate(f"inbox {cluster}", plan.cluster_size, c.head_dim + 2)
        self.new_keys = np.full((c.num_layers, c.num_heads, c.head_dim), np.nan, self.dtype)
        self.new_values = self.new_keys.copy()
        self.chosen: int | None = None

        ctas = [Cta(self, number) for number in range(plan.ctas)]
        running = {cta: cta.run() for cta in ctas}
        speed = {cta: 10 ** order.uniform(-2, 2) for cta in ctas}
        while running:
            ready = [cta for cta in running if cta.ready()]
            assert ready, f"deadlock: {[cta.waits_for for cta in running][:3]}"
            cta = order.choices(ready, [speed[cta] for cta in ready])[0]
            if next(running[cta], "done") == "done":
                del running[cta]
        assert self.chosen is not None
        return memory.read("logits", c.num_layers), self.chosen

    def array(self, tensor: torch.Tensor) -> Array:
        return tensor.detach().to(torch.float64).numpy().astype(self.dtype)

    def rounded(self, values: Array) -> Array:
        """Values as the weights' dtype holds them."""
        return self.array(torch.from_numpy(values).to(self.weights.dtype))

    def rows(self, matrix: torch.Tensor, rows: range) -> Array:
        return self.array(matrix[rows.start : rows.stop])

    def bias(self, vector: torch.Tensor | None, rows: range) -> Array:
        return np.zeros(len(rows), self.dtype) if vector is None else self.rows(vector, rows)


class Cta:
    """One CTA. What it keeps from action to action is what the kernel keeps in shared memory and registers."""

    def __init__(self, step_: StepInterpreter, cta: int) -> None:
        self.s, self.cta = step_, cta
        self.plan, self.config = step_.plan, step_.config
        self.head, self.split = divmod(cta, step_.plan.splits)
        self.cluster, self.rank = divmod(cta, step_.plan.cluster_size)
        self.waits_for: Action | None = None
        self.normed: dict[str, tuple[int, Array]] = {}
        self.partial = self.o_sums = self.down_sums = np.empty(0)

    def ready(self) -> bool:
        wait = self.waits_for
        if wait is None:
            return True
        if wait.name in ("x", "middle"):
            return self.s.memory.rows_of(wait.name, wait.layer) >= wait.target
        return self.s.counters[self._counter(wait.name)] >= wait.target

    def run(self) -> Iterator[None]:
        for action in self.s.schedule(self.plan, self.cta, self.s.position):
            if action.kind == "wait":
                self.waits_for = action
                yield
                self.waits_for = None
                continue
            {"read": self.read, "publish": self.publish, "arrive": self.arrive}[action.kind](action)
            yield

    def _counter(self, name: str) -> tuple[str, int]:
        return name, self.cluster if name == "exchange" else 0

    # -- reads

    def read(self, action: Action) -> None:
        if action.name == "kv":
            self.partial = self.attend(action)
            return
        s, layer, rows = self.s, action.layer, action.rows
        parts = step.row_parts(self.plan, action.name)
        if action.name == "lm_head":
            w = s.weights
            assert w.final_norm_bias is not None
            x = self.norm("x", layer, w.final_norm_weight, w.final_norm_bias)
            s.memory.write("logits", rows, layer, kernel.gemv(s.rows(w.lm_head, rows), x, parts)[:, 0])
            return
        weights = s.weights.layers[layer]
        assert weights.qkv_weight is not None and weights.input_norm_bias is not None
        assert weights.post_norm_bias is not None
        if action.name == "qkv":
            x = self.norm("x", layer, weights.input_norm_weight, weights.input_norm_bias)
            value = kernel.gemv(s.rows(weights.qkv_weight, rows), x, parts)[:, 0]
            s.memory.write("qkv", rows, layer, value + s.bias(weights.qkv_bias, rows))
        elif action.name == "up":
            before = "x" if self.config.parallel_residual else "middle"
            x = self.norm(before, layer, weights.post_norm_weight, weights.post_norm_bias)
            value = kernel.gemv(s.rows(weights.up_weight, rows), x, parts)[:, 0] + s.bias(weights.up_bias, rows)
            h = kernel.gelu(value, tanh=self.config.activation == "gelu_tanh")
            s.memory.write("h", rows, layer, s.rounded(h))
        elif action.name == "o":
            self.o_sums = kernel.gemv(s.rows(weights.o_weight, rows), self.attention(layer), parts)
        else:
            assert action.name == "down"
            h = s.memory.read("h", layer)
            self.down_sums = kernel.gemv(s.rows(weights.down_weight, rows), h, parts)

    def x(self, version: int) -> Array:
        if version == EMBEDDING:
            return self.s.array(self.s.weights.embedding[self.s.token])
        return self.s.memory.read("x", version)

    def norm(self, of: str, version: int, weight: torch.Tensor, bias: torch.Tensor) -> Array:
        """A vector normed, from memory as it is at the first use of this version by this CTA: later ones find the normed
        vector in shared memory. The two norms of parallel residual share one load."""
        if self.normed.get(of, (-1,))[0] != version:
            self.normed[of] = version, self.x(version) if of == "x" else self.s.memory.read(of, version)
        values = self.normed[of][1]
        return kernel.layer_norm(
            values, self.s.array(weight), self.s.array(bias), self.config.norm_eps, self.plan.warps
        )

    def attention(self, layer: int) -> Array:
        """The attention's output of all heads [hidden]: BlockConsumer::load_attention."""
        each = self.s.memory.read("partials", layer).reshape(self.config.num_heads, -1, self.config.head_dim + 2)
        merged = [kernel.merge(partials) for partials in each]
        return np.concatenate([partial[:-2] / partial[-1] for partial in merged])

    def attend(self, action: Action) -> Array:
        """This CTA's partial of its head: BlockConsumer::attend up to the exchange."""
        s, plan, layer = self.s, self.plan, action.layer
        query, key, value = self.load_heads(layer)
        slots: dict[int, kernel.AttentionWarp] = {}
        for number, tile in enumerate(action.rows):
            tokens = slice(tile * plan.tile_tokens, min((tile + 1) * plan.tile_tokens, s.position))
            warp = slots.setdefault(number % plan.warps, kernel.AttentionWarp(query))
            warp.add_tile(s.keys[layer, self.head, tokens], s.values[layer, self.head, tokens])
        partials = [slots[slot].partial() for slot in sorted(slots)]
        if self.split == 0:
            s.new_keys[layer, self.head], s.new_values[layer, self.head] = key, value
            partials.append(self.new_token(query, key, value))
        return kernel.merge(np.array(partials, s.dtype).reshape(-1, self.config.head_dim + 2))

    def load_heads(self, layer: int) -> tuple[Array, Array, Array]:
        """q, k, v of the head: rotated, q scaled, k and v as the cache holds them."""
        s, size = self.s, self.config.head_dim
        rows = range(3 * self.head * size, 3 * (self.head + 1) * size)
        q, k, v = s.memory.read("qkv", layer, rows).reshape(3, size)
        half = self.config.rotary.dim // 2

        def rotate(of: Array) -> Array:
            first, second, rest = of[:half], of[half : 2 * half], of[2 * half :]
            rotated = (
                kernel.fma(second, -s.sin, first * s.cos),
                kernel.fma(first, s.sin, second * s.cos),
            )
            return np.concatenate((*rotated, rest))

        scale = s.dtype(size**-0.5) * s.dtype(kernel.LOG2E)
        return rotate(q) * scale, s.rounded(rotate(k)), s.rounded(v)

    def new_token(self, query: Array, key: Array, value: Array) -> Array:
        padding = (0, -len(key) % kernel.WARP)
        lanes = np.zeros(kernel.WARP, self.s.dtype)
        for q, k in zip(
            np.pad(query, padding).reshape(-1, kernel.WARP), np.pad(key, padding).reshape(-1, kernel.WARP), strict=True
        ):
            lanes = kernel.fma(q, k, lanes)
        return np.concatenate((value, [kernel.butterfly(lanes), 1])).astype(self.s.dtype)

    # -- what others may see

    def arrive(self, action: Action) -> None:
        s, layer = self.s, action.layer
        if action.name == "exchange":
            s.memory.write(f"inbox {self.cluster}", self.rank, layer, self.partial)
        if action.name == "attention":
            merged = self.plan.merged_ctas
            inbox = s.memory.read(f"inbox {self.cluster}", layer) if merged > 1 else self.partial[None]
            at = self.head * self.plan.partials_per_head + self.split // merged
            s.memory.write("partials", at, layer, kernel.merge(inbox))
        s.counters[self._counter(action.name)] += 1
        if action.name == "token" and s.counters["token", 0] == self.plan.ctas:
            s.chosen = int(s.memory.read("logits", layer).argmax())

    def publish(self, action: Action) -> None:
        """The CTA's rows of x of the next layer, or of the residual between attention and MLP."""
        s, rows = self.s, action.rows
        if action.name == "middle":
            s.memory.write("middle", rows, action.layer, self.attended(action.layer, rows))
            return
        layer = action.layer - 1
        parallel = self.config.parallel_residual
        value = self.attended(layer, rows) if parallel else s.memory.read("middle", layer, rows)
        mlp = self.folded(s.bias(s.weights.layers[layer].down_bias, rows), self.down_sums)
        s.memory.write("x", rows, action.layer, value + mlp)

    def attended(self, layer: int, rows: range) -> Array:
        residual = self.x(layer)[rows.start : rows.stop]
        return residual + self.folded(self.s.bias(self.s.weights.layers[layer].o_bias, rows), self.o_sums)

    def folded(self, bias: Array, sums: Array) -> Array:
        """A bias and the parts of a row, in order."""
        for part in sums.T:
            bias = bias + part
        return bias
