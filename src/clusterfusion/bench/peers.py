"""transformers' GPTNeoXModel on our weights (shared, not copied): the same layers, input, K/V cache and position.

What runs is the model's forward from `inputs_embeds`: its layers, the attention mask and rotary tables that it makes each
step, and its final norm. The static cache is as long as the context needs, which is kind to it: it attends over all of
its length.
"""

from __future__ import annotations

import dataclasses
import gc
import inspect
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clusterfusion import reference
from clusterfusion.bench.device_timer import capture
from clusterfusion.bench.samples import Candidate, one_line
from clusterfusion.errors import ClusterFusionError
from clusterfusion.weights import DecoderWeights

# Set up in this order. torch.compile's own CUDA graphs drop cuBLAS's workspaces while they are recorded; a graph captured
# before that would go on writing to them.
PEERS = ("transformers eager", "transformers compile", "transformers CUDA graph")
CACHE_UNIT = 16  # tokens; attention kernels want a mask of such a multiple
FEWEST_SAMPLES = 20
SAMPLE_BUDGET_S = 2.0  # of one peer at one context, unless FEWEST_SAMPLES take longer
MOST_DIFFERENCE = 0.1  # relative, between a peer's result and ours: bfloat16 over 30 layers; beyond, something is wrong

_HIDDEN_ACT = {"gelu": "gelu", "gelu_tanh": "gelu_fast"}
_LAYER_TENSORS = {
    "input_layernorm.weight": "input_norm_weight",
    "input_layernorm.bias": "input_norm_bias",
    "post_attention_layernorm.weight": "post_norm_weight",
    "post_attention_layernorm.bias": "post_norm_bias",
    "attention.query_key_value.weight": "qkv_weight",
    "attention.query_key_value.bias": "qkv_bias",
    "attention.dense.weight": "o_weight",
    "attention.dense.bias": "o_bias",
    "mlp.dense_h_to_4h.weight": "up_weight",
    "mlp.dense_h_to_4h.bias": "up_bias",
    "mlp.dense_4h_to_h.weight": "down_weight",
    "mlp.dense_4h_to_h.bias": "down_bias",
}


@dataclasses.dataclass(frozen=True)
class PeerSetup:
    """A peer at one context: ready to be timed, or the error that ended it. `difference` from ours is relative."""

    name: str
    candidate: Candidate | None
    difference: float | None
    error: str | None


def shared_model(weights: DecoderWeights) -> Any:
    """A transformers GPTNeoXModel in eval mode whose parameters are our tensors. Raises ImportError without
    transformers."""
    from transformers import GPTNeoXConfig, GPTNeoXModel

    c = weights.config
    config = GPTNeoXConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        max_position_embeddings=c.max_position,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": c.rotary.theta,
            "partial_rotary_factor": c.rotary.nominal_dim / c.head_dim,
        },
        layer_norm_eps=c.norm_eps,
        use_parallel_residual=c.parallel_residual,
        attention_bias=c.attention_bias,
        hidden_act=_HIDDEN_ACT[c.activation],
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        model = GPTNeoXModel(config)
    state = {
        "embed_in.weight": weights.embedding,
        "final_layer_norm.weight": weights.final_norm_weight,
        "final_layer_norm.bias": weights.final_norm_bias,
    }
    for i, layer in enumerate(weights.layers):
        for name, field in _LAYER_TENSORS.items():
            tensor = getattr(layer, field)
            if tensor is not None:
                state[f"layers.{i}.{name}"] = tensor
    model.load_state_dict(state, strict=True, assign=True)
    model.rotary_emb = type(model.rotary_emb)(config).to(weights.device)  # its tables are no parameters: still on meta
    return model.eval().requires_grad_(False)


def cache_keyword(model: Any) -> str:
    """What this version of transformers calls the cache in `model.forward`."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def static_cache(config: Any, tokens: int, keys: Tensor) -> Any:
    """An allocated StaticCache with room for `tokens`, and no more than a mask needs. `keys` [..., kv_heads, _, head_dim]
    says what a layer's look like. Raises ImportError without transformers."""
    from transformers import StaticCache

    cache = StaticCache(config=config, max_cache_len=-(-tokens // CACHE_UNIT) * CACHE_UNIT)
    cache.early_initialization(1, keys.shape[-3], keys.shape[-1], keys.dtype, keys.device)
    return cache


def set_length(cache: Any, tokens: int) -> None:
    """A StaticCache holds `tokens` tokens again; what stands after them will be written over."""
    for layer in cache.layers:
        layer.cumulative_length.fill_(tokens)


def forget_compiled() -> None:
    """Frees what torch.compile made, its CUDA graphs included, and hands cached memory back."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


class StaticCacheStep:
    """One step of a GPTNeoXModel after `context` tokens whose keys and values are copied from our cache."""

    @torch.no_grad()
    def __init__(self, model: Any, kv: reference.KVCache, x: Tensor, context: int) -> None:
        self.model: Callable[..., Any] = model
        self.context = context
        self.cache = static_cache(model.config, context + 1, kv.k)
        self._keyword = cache_keyword(model)
        for i, layer in enumerate(self.cache.layers):
            layer.keys[0, :, :context] = kv.k[i, :, :context]
            layer.values[0, :, :context] = kv.v[i, :, :context]
        self._x = x.to(kv.k.dtype).view(1, 1, -1).clone()
        self._position = torch.full((1, 1), context, dtype=torch.int64, device=x.device)

    def prepare(self) -> None:
        """The cache holds `context` tokens again."""
        set_length(self.cache, self.context)

    @torch.no_grad()
    def run(self) -> Tensor:
        """The normed hidden state after the last layer [1, 1, hidden]."""
        cache = {self._keyword: self.cache}
        out = self.model(inputs_embeds=self._x, position_ids=self._position, use_cache=True, **cache)
        return out.last_hidden_state


class Peers:
    """All peers of one model. What one of them raises is kept as its error and never leaves here."""

    def __init__(self, weights: DecoderWeights, kv: reference.KVCache, x: Tensor) -> None:
        self._weights, self._kv, self._x = weights, kv, x
        self._error: str | None = None
        try:
            self._model = shared_model(weights)
        except Exception as error:
            self._error = one_line(error)

    def set_up(self, name: str, context: int, expected: Tensor, samples: int) -> PeerSetup:
        """The peer `name` at `context`. `expected` is our residual vector after the last layer [hidden]."""
        if self._error is not None:
            return PeerSetup(name, None, None, self._error)
        try:
            return self._set_up(name, context, expected, samples)
        except Exception as error:
            return PeerSetup(name, None, None, one_line(error))

    def _set_up(self, name: str, context: int, expected: Tensor, samples: int) -> PeerSetup:
        step = StaticCacheStep(self._model, self._kv, self._x, context)
        prepare, run = step.prepare, step.run
        if name == "transformers CUDA graph":
            graph, out = capture(step.run, step.prepare, self._weights.device)

            def run() -> Tensor:
                graph.replay()
                return out

        elif name == "transformers compile":
            step.model = torch.compile(self._model, mode="reduce-overhead", fullgraph=True, dynamic=False)

            def prepare() -> None:
                step.prepare()
                torch.compiler.cudagraph_mark_step_begin()

        for _ in range(3):  # compiling, recording, replaying
            prepare()
            result = run().clone()
        difference = self._difference(result, expected)
        if not difference <= MOST_DIFFERENCE:
            raise ClusterFusionError(
                f"its result differs from ours by {difference:.2g} of its length, more than {MOST_DIFFERENCE}: it does "
                "not compute the same"
            )
        count = affordable_samples(_seconds(prepare, run, self._weights.device), samples)
        return PeerSetup(name, Candidate(name, prepare, run, count, may_fail=True), difference, None)

    def _difference(self, result: Tensor, expected: Tensor) -> float:
        w = self._weights
        ours = reference.norm(w.config, expected.float(), w.final_norm_weight, w.final_norm_bias)
        return float((result.flatten().float() - ours).norm() / ours.norm())

    def forget_context(self) -> None:
        """Frees what the last context's peers held: caches, graphs and compiled code."""
        forget_compiled()


def affordable_samples(seconds: float, samples: int) -> int:
    """How many samples of a peer that takes `seconds` each: `samples`, or what the budget holds, or the fewest."""
    return min(samples, max(FEWEST_SAMPLES, int(SAMPLE_BUDGET_S / max(seconds, 1e-9))))


def _seconds(prepare: Callable[[], None], run: Callable[[], object], device: torch.device) -> float:
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    prepare()
    run()
    torch.cuda.synchronize(device)
    return time.perf_counter() - began
