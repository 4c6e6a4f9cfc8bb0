"""One decode step on the CPU, following the schedule of plan/step.py: CTAs that know only what they have waited for.

Each role of each CTA is a coroutine that takes its actions one at a time; which one goes next is random. Memory that CTAs
share, and places that the roles of a CTA share, hold what they hold with the version it was written as, and reading any
other version gives NaN: one that is not there yet, or one that was written over too early. Signals between roles are
awaited by parity, as in the kernel. Sums are the kernels', operation by operation (plan/kernel_arithmetic.py).
"""

from __future__ import annotations

import collections
import random
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from plan import kernel_arithmetic as kernel
from plan.kernel_arithmetic import Array
from tiny_models import relative_error

from clusterfusion import reference
from clusterfusion.plan import BlockPlan, step, step_schedule
from clusterfusion.plan.block import Role
from clusterfusion.plan.block_check import ROLES, of_group
from clusterfusion.plan.step import Action
from clusterfusion.weights import DecoderWeights

Schedule = Callable[[BlockPlan, int, Role, int], Iterable[Action]]
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

    def complete(self, name: str, version: int, rows: range) -> bool:
        """Whether these rows have this version: what a poll of tagged values sees."""
        return bool((self._versions[name][version % len(self._values[name]), rows.start : rows.stop] == version).all())


class StepInterpreter:
    """A step of one model at one position, ready to be run in any order of its CTAs.

    `cache` is not written; keys and values of the new token are in `new_keys` and `new_values` [layers, kv_heads, head_dim]
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
        """Logits [vocab] and the greedy token. The roles of all CTAs go on in random order, some of them much slower than others."""
        c, plan = self.config, self.plan
        order = random.Random(seed)
        self.counters: collections.Counter[tuple[str, int]] = collections.Counter()
        self.memory = memory = Memory(self.dtype)
        memory.allocate("x", c.hidden_size, buffers=step.X_BUFFERS)
        memory.allocate("qkv", c.q_size + 2 * c.kv_size)
        memory.allocate("h", c.intermediate_size)
        memory.allocate("partials", c.num_heads * plan.partials_per_head, c.head_dim + 2)
        memory.allocate("logits", c.vocab_size)
        for cluster in range(plan.ctas // plan.cluster_size):
            memory.allocate(f"inbox {cluster}", plan.cluster_size, plan.queries, c.head_dim + 2)
        self.new_keys = np.full((c.num_layers, c.num_kv_heads, c.head_dim), np.nan, self.dtype)
        self.new_values = self.new_keys.copy()
        self.chosen: int | None = None

        actors = [Actor(cta, role) for number in range(plan.ctas) for cta in [Cta(self, number)] for role in ROLES]
        running = {actor: actor.run() for actor in actors}
        speed = {actor: 10 ** order.uniform(-2, 2) for actor in actors}
        while running:
            ready = [actor for actor in running if actor.ready()]
            assert ready, f"deadlock: {[actor.waits_for for actor in running][:3]}"
            actor = order.choices(ready, [speed[actor] for actor in ready])[0]
            if next(running[actor], "done") == "done":
                del running[actor]
        assert self.chosen is not None
        return memory.read("logits", c.num_layers), self.chosen

    def array(self, tensor: torch.Tensor) -> Array:
        return tensor.detach().to(torch.float64).numpy().astype(self.dtype)

    def rounded(self, values: Array) -> Array:
        """Values as the weights' dtype holds them."""
        return self.array(torch.from_numpy(values).to(self.weights.dtype))

    def projection(self, layer: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight [rows, hidden] and bias of q, k and v: K/V head by K/V head the queries that share it, its key, its value."""
        weights, kv_heads = self.weights.layers[layer], self.config.num_kv_heads

        def joined(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            q = q.unflatten(0, (kv_heads, -1)).flatten(1, 2)  # [kv_heads, rows, ...]
            return torch.cat((q, k, v), dim=1).flatten(0, 1)

        weight = joined(weights.q_weight, weights.k_weight, weights.v_weight)
        if weights.q_bias is None or weights.k_bias is None or weights.v_bias is None:
            return weight, None
        return weight, joined(weights.q_bias, weights.k_bias, weights.v_bias)

    def rows(self, matrix: torch.Tensor, rows: range) -> Array:
        return self.array(matrix[rows.start : rows.stop])

    def bias(self, vector: torch.Tensor | None, rows: range) -> Array:
        return np.zeros(len(rows), self.dtype) if vector is None else self.rows(vector, rows)


class Actor:
    """A role of a CTA under way."""

    def __init__(self, cta: Cta, role: Role) -> None:
        self.cta, self.role = cta, role
        self.waits_for: Action | None = None

    def ready(self) -> bool:
        return self.waits_for is None or self.cta.met(self.waits_for)

    def run(self) -> Iterator[None]:
        cta = self.cta
        do = {
            "read": cta.read,
            "finish": cta.finish,
            "publish": cta.publish,
            "arrive": cta.arrive,
            "load": cta.load,
            "place": cta.place,
            "signal": cta.signal,
        }
        for action in cta.s.schedule(cta.plan, cta.cta, self.role, cta.s.position):
            if action.kind in ("wait", "await"):
                self.waits_for = action
                yield
                self.waits_for = None
                continue
            do[action.kind](action)
            yield


class Cta:
    """One CTA. What it keeps from action to action is what the kernel keeps in shared memory and registers."""

    def __init__(self, step_: StepInterpreter, cta: int) -> None:
        self.s, self.cta = step_, cta
        self.plan, self.config = step_.plan, step_.config
        self.bundle, self.split = divmod(cta, step_.plan.splits)
        self.heads = range(self.bundle * self.plan.queries, (self.bundle + 1) * self.plan.queries)
        self.kv_head = self.plan.kv_head(cta)
        self.cluster, self.rank = divmod(cta, step_.plan.cluster_size)
        self.rounds: collections.Counter[str] = collections.Counter()  # of every signal, completed
        self.shared: dict[str, tuple[tuple[str, int], Array]] = {}  # places: what is there
        self.loaded: dict[str, Array] = {}
        self.own = np.empty(0)  # the CTA's rows of x, then of middle
        self.partial = self.qkv = self.logits = np.empty(0)
        self.down_shape: tuple[int, ...] = ()
        self.new: tuple[Array, Array, Array] = (np.empty(0),) * 3  # the new token's queries, key and value

    def met(self, wait: Action) -> bool:
        """By parity, an await of round n passes when n is the last complete round, or n - 2, and so on."""
        if wait.kind == "await":
            return self.rounds[wait.label] % 2 != wait.layer % 2
        if wait.name in step.TAGGED:
            name, version = step.version(self.plan, wait.name, wait.layer)
            return self.s.memory.complete(name, version, wait.rows)
        return self.s.counters[self._counter(wait)] >= wait.target

    def _counter(self, action: Action) -> tuple[str, int]:
        return action.label, self.cluster if action.name == "exchange" else 0

    # -- between roles

    def signal(self, action: Action) -> None:
        self.rounds[action.label] += 1

    def put(self, place: str, content: str, layer: int, values: Array) -> None:
        self.shared[place] = (content, layer), values

    def find(self, place: str, content: str, layer: int) -> Array:
        """What is in a place of shared memory; NaN where it is not that content."""
        found, values = self.shared.get(place, (None, np.empty(0)))
        if found == (content, layer):
            return values
        sizes = {"hidden": len(self.plan.hidden_group(0)), "attended": self.config.q_size // self.plan.head_groups}
        size = sizes.get(content, self.config.hidden_size)
        return np.full(size if place[:2] in ("x1", "x2") else 1, np.nan, self.s.dtype)

    @property
    def parts_of_x1(self) -> Iterator[tuple[str, slice]]:
        """The places that x1 is made of, one a head group's attention, and which elements of another vector lie in each."""
        last, size = self.plan.head_groups - 1, self.config.q_size // self.plan.head_groups
        for group in range(last + 1):
            yield of_group("x1", group), slice(group * size, (group + 1) * size if group < last else None)

    def put_x1(self, content: str, layer: int, values: Array) -> None:
        for place, part in self.parts_of_x1:
            self.put(place, content, layer, values[part])

    def find_x1(self, content: str, layer: int) -> Array:
        """A vector that takes all of x1."""
        whole = np.empty(self.config.hidden_size, self.s.dtype)
        for place, part in self.parts_of_x1:
            found, values = self.shared.get(place, (None, np.empty(0)))
            whole[part] = values if found == (content, layer) else np.nan
        return whole

    def load(self, action: Action) -> None:
        memory, layer = self.s.memory, action.layer
        if action.name in ("x", "middle"):
            values = self.x(action.name, layer)
        elif action.name == "qkv":
            values = memory.read("qkv", layer, action.rows)
            if action.rows != self.plan.attended_rows(self.cta)[0]:  # the queries are there already
                values = np.concatenate((self.loaded["qkv"], values))
        elif action.name == "partials":
            values = self.attention(layer, action.group)
        else:
            values = memory.read("h", layer, action.rows)
        self.loaded[of_group(action.name, action.group)] = values
        if action.name == "x" and layer == 0:
            rows = self.plan.rows(self.config.hidden_size, self.cta)
            self.own = values[rows.start : rows.stop]

    def place(self, action: Action) -> None:
        name, layer = action.name, action.layer
        if name == "attended":
            self.put(of_group("x1", action.group), name, layer, self.loaded[of_group("partials", action.group)])
        elif name == "hidden":
            self.put(of_group("x2", action.group), name, layer, self.loaded[of_group("h", action.group)])
        elif name == "queries":
            queries, key, value = self.rotated()
            self.put("queries", name, layer, queries)
            self.new = queries, key, value
            if self.split == 0:
                self.s.new_keys[layer, self.kv_head], self.s.new_values[layer, self.kv_head] = key, value
        elif name in ("scale", "middle_scale"):
            of = self.loaded["x" if name == "scale" else "middle"]
            self.put(name, name, layer, kernel.rms_scale(of, self.config.norm_eps, self.plan.vector_warps))
            if name == "scale":
                self.put("biases", "biases", layer, np.zeros(1, self.s.dtype))
        elif name == "middle_normed":
            weights = self.s.weights.layers[layer]
            normed = self.norm("middle", weights.post_norm_weight, weights.post_norm_bias)
            self.put_x1(name, layer, normed)
        elif layer == self.config.num_layers:
            w = self.s.weights
            self.put_x1(name, layer, self.norm("x", w.final_norm_weight, w.final_norm_bias))
        else:
            weights = self.s.weights.layers[layer]
            self.put_x1(name, layer, self.norm("x", weights.input_norm_weight, weights.input_norm_bias))
            if self.config.parallel_residual:
                self.put("x2", name, layer, self.norm("x", weights.post_norm_weight, weights.post_norm_bias))
            if self.config.norm != "rms_norm":
                self.put("biases", "biases", layer, np.zeros(1, self.s.dtype))

    # -- reads

    def read(self, action: Action) -> None:
        if action.name == "kv":
            self.put("slots", "kv", action.layer, self.attend(action))
            return
        s, layer, rows, group = self.s, action.layer, action.rows, action.group
        parts = step.row_parts(self.plan, action.name)
        if action.name == "lm_head":
            x = self.find_x1("normed", layer)
            self.logits = kernel.gemv(s.rows(s.weights.lm_head, rows), x, parts)[:, 0]
            return
        weights = s.weights.layers[layer]
        if action.name == "qkv":
            x = self.find_x1("normed", layer)
            weight, _ = s.projection(layer)
            self.qkv = kernel.gemv(s.rows(weight, rows), x, parts)[:, 0]
        elif action.name == "up":
            parallel = self.config.parallel_residual
            x = self.find("x2", "normed", layer) if parallel else self.find_x1("middle_normed", layer)
            value = kernel.gemv(s.rows(weights.up_weight, rows), x, parts)[:, 0]
            if weights.gate_weight is not None:
                gate = kernel.gemv(s.rows(weights.gate_weight, rows), x, parts)[:, 0]
                self.put(of_group("up_sums", group), "up", layer, np.stack((gate, value)))
                return
            h = self.activation(self.scaled(value, self.scale_of_up, layer, self.bias(weights.up_bias, layer, rows)))
            s.memory.write("h", rows, layer, s.rounded(h))
        elif action.name == "o":
            x = self.find(of_group("x1", group), "attended", layer)
            here = step.group_parts(self.plan, "o", group)
            weight = s.rows(weights.o_weight, rows)[:, group * len(x) : (group + 1) * len(x)]
            sums = kernel.gemv(weight, x, parts[here.start : here.stop])
            self.put(of_group("o_sums", group), "o", layer, sums)
        else:
            assert action.name == "down"
            x = self.find(of_group("x2", group), "hidden", layer)
            columns, here = self.plan.hidden_group(group), step.group_parts(self.plan, "down", group)
            weight = s.rows(weights.down_weight, rows)[:, columns.start : columns.stop]
            sums = kernel.gemv(weight, x, parts[here.start : here.stop])
            if (
                rows.start > self.plan.rows(self.config.hidden_size, self.cta).start
            ):  # the first rows' are there already
                sums = np.concatenate((np.broadcast_to(self.find("down_sums", "down", layer), self.down_shape), sums))
            self.down_shape = sums.shape
            self.put(of_group("down_sums", group), "down", layer, sums)

    def finish(self, action: Action) -> None:
        """The CTA's rows of h, of the sums of its gates and of up."""
        layer, rows = action.layer, action.rows
        weights = self.s.weights.layers[layer]
        sums = np.broadcast_to(self.find(of_group("up_sums", action.group), "up", layer), (2, len(rows)))
        gate = self.scaled(sums[0], self.scale_of_up, layer, self.bias(weights.gate_bias, layer, rows))
        up = self.scaled(sums[1], self.scale_of_up, layer, self.bias(weights.up_bias, layer, rows))
        self.s.memory.write("h", rows, layer, self.s.rounded(self.activation(gate) * up))

    @property
    def scale_of_up(self) -> str:
        return "scale" if self.config.parallel_residual else "middle_scale"

    def scaled(self, sums: Array, scale: str, layer: int, biases: Array) -> Array:
        """CtaState::scaled: sums over a normed vector, an RMSNorm's factor and biases."""
        if self.config.norm != "rms_norm":
            return sums + biases
        return kernel.fma(sums, np.broadcast_to(self.find(scale, scale, layer), sums.shape), biases)

    def activation(self, x: Array) -> Array:
        name = self.config.activation
        return kernel.silu(x) if name == "silu" else kernel.gelu(x, tanh=name == "gelu_tanh")

    def bias(self, vector: torch.Tensor | None, layer: int, rows: range) -> Array:
        return self.s.bias(vector, rows) + self.find("biases", "biases", layer)

    def x(self, name: str, layer: int) -> Array:
        """A version of the residual stream."""
        stream, version = step.version(self.plan, name, layer)
        if version == EMBEDDING:
            return self.s.array(self.s.weights.embedding[self.s.token])
        return self.s.memory.read(stream, version)

    def norm(self, of: str, weight: torch.Tensor, bias: torch.Tensor | None) -> Array:
        """A vector that has been loaded, normed, but for an RMSNorm's factor. The two norms of parallel residual share one load."""
        w, eps, warps = self.s.array(weight), self.config.norm_eps, self.plan.vector_warps
        if self.config.norm == "rms_norm":
            return self.loaded[of] * w
        assert bias is not None
        return kernel.layer_norm(self.loaded[of], w, self.s.array(bias), eps, warps)

    def attention(self, layer: int, group: int) -> Array:
        """The attention's output of a group's heads [q_size / head_groups]: Attention::load_attention."""
        plan, each = self.plan, self.s.memory.read("partials", layer)
        heads = self.config.num_heads // plan.head_groups
        each = each.reshape(self.config.num_heads, -1, self.config.head_dim + 2)[group * heads : (group + 1) * heads]
        warps = plan.vector_warps
        own = -(-heads * self.config.head_dim // (4 * kernel.WARP * warps))  # quads of a thread
        together = own if own < 3 else 2 if self.config.head_dim // 4 % 4 else 4
        loaded = min(plan.partials_per_head, kernel.loads_together(warps) // together)
        each = each[:, : plan.used_partials(self.s.position)]
        merged = [kernel.merge_in_rounds(partials, loaded) for partials in each]
        return np.concatenate([partial[:-2] / partial[-1] for partial in merged])

    def attend(self, action: Action) -> Array:
        """The slots that the tile warps fill with cached tokens, [slots, queries, head_dim + 2]: TileWarps::cached."""
        s, plan, layer = self.s, self.plan, action.layer
        shape = plan.queries, self.config.head_dim
        queries = np.broadcast_to(self.find("queries", "queries", layer), shape)
        slots: dict[int, kernel.AttentionWarp | kernel.GroupedAttentionWarp] = {}
        for number, tile in enumerate(action.rows):
            tokens = slice(tile * plan.tile_tokens, min((tile + 1) * plan.tile_tokens, s.position))
            slot = number % plan.warps
            if slot not in slots:
                one = plan.queries == 1
                slots[slot] = kernel.AttentionWarp(queries[0]) if one else kernel.GroupedAttentionWarp(queries)
            slots[slot].add_tile(s.keys[layer, self.kv_head, tokens], s.values[layer, self.kv_head, tokens])
        partials = [slots[slot].partials() for slot in sorted(slots)]
        return np.array(partials, s.dtype).reshape(-1, plan.queries, self.config.head_dim + 2)

    def merged_slots(self, layer: int) -> Array:
        """This CTA's partials of its bundle's heads [queries, head_dim + 2]: Attention::attend up to the exchange."""
        each = self.find("slots", "kv", layer)
        if each.ndim == 1:  # something else is there
            each = np.broadcast_to(each, (1, self.plan.queries, self.config.head_dim + 2))
        if self.split == 0:
            queries, key, value = self.new
            newest = np.stack([self.new_token(query, key, value) for query in queries])
            each = np.concatenate((each, newest[None]))
        return np.stack([kernel.merge(each[:, q]) for q in range(self.plan.queries)])

    def rotated(self) -> tuple[Array, Array, Array]:
        """The bundle's queries [queries, head_dim], its k and v: rotated, q scaled, k and v as the cache holds them."""
        s, size = self.s, self.config.head_dim
        *queries, k, v = self.loaded["qkv"].reshape(-1, size)
        half = self.config.rotary.dim // 2

        def rotate(of: Array) -> Array:
            first, second, rest = of[:half], of[half : 2 * half], of[2 * half :]
            rotated = (
                kernel.fma(second, -s.sin, first * s.cos),
                kernel.fma(first, s.sin, second * s.cos),
            )
            return np.concatenate((*rotated, rest))

        scale = s.dtype(size**-0.5) * s.dtype(kernel.LOG2E)
        return np.stack([rotate(q) * scale for q in queries]), s.rounded(rotate(k)), s.rounded(v)

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
        merges = "exchange" if self.plan.merged_ctas > 1 else "attention"
        works = self.plan.works(self.cta, s.position)
        if action.name == merges and works:
            self.partial = self.merged_slots(layer)
        if action.name == "exchange":
            s.memory.write(f"inbox {self.cluster}", self.rank, layer, self.partial)
        if action.name == "attention" and works:
            merged = self.plan.merged_ctas
            inbox = s.memory.read(f"inbox {self.cluster}", layer) if merged > 1 else self.partial[None]
            for q, head in enumerate(self.heads):
                at = head * self.plan.partials_per_head + self.split // merged
                s.memory.write("partials", at, layer, kernel.merge(inbox[:, q]))
        if action.name == "token":
            rows = self.plan.rows(self.config.vocab_size, self.cta)
            s.memory.write("logits", rows, layer, self.scaled(self.logits, "scale", layer, np.zeros_like(self.logits)))
        s.counters[self._counter(action)] += 1
        if action.name == "token" and s.counters["token", 0] == self.plan.ctas:
            s.chosen = int(s.memory.read("logits", layer).argmax())

    def publish(self, action: Action) -> None:
        """The CTA's rows of q, k, v, of x of the next layer, or of the residual between attention and MLP."""
        name, version = step.version(self.plan, action.name, action.layer)
        if action.name == "qkv":
            bias = self.bias(self.s.projection(action.layer)[1], action.layer, action.rows)
            self.s.memory.write(name, action.rows, version, self.scaled(self.qkv, "scale", action.layer, bias))
            return
        of_layer = action.layer - (action.name == "x")
        weights = self.s.weights.layers[of_layer]
        value = self.own
        if self.config.parallel_residual or action.name == "middle":
            value = value + self.folded("o", weights.o_bias, of_layer, action.rows)
        if action.name == "x":
            value = value + self.folded("down", weights.down_bias, of_layer, action.rows)
        self.own = value
        self.s.memory.write(name, action.rows, version, value)

    def folded(self, matrix: str, bias: torch.Tensor | None, layer: int, rows: range) -> Array:
        """A bias and the parts of a row's sum, in order."""
        value = self.bias(bias, layer, rows)
        for group in range(self.plan.hidden_groups if matrix == "down" else self.plan.head_groups):
            for part in self.find(of_group(f"{matrix}_sums", group), matrix, layer).T:
                value = value + part
        return value


def check_computes(interpreter: StepInterpreter, ids: torch.Tensor, cache: reference.KVCache) -> None:
    """That the step of the last of `ids` is the reference's, its key and value too, and in other orders of the CTAs the same bits.
    The reference writes the cache."""
    logits, token = interpreter.run(seed=0)
    position = interpreter.position
    wanted = reference.forward(interpreter.weights, ids[-1:], cache, position)
    assert relative_error(torch.from_numpy(logits), wanted) < 1e-5
    assert token == int(wanted.argmax())
    for new, cached in ((interpreter.new_keys, cache.k), (interpreter.new_values, cache.v)):
        assert relative_error(torch.from_numpy(new), cached[:, :, position]) < 1e-5
    for seed in range(1, 4):
        again, token_again = interpreter.run(seed)
        assert np.array_equal(again, logits) and token_again == token, f"other bits in another order, {seed}"
