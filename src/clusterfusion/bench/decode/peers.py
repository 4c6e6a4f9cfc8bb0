"""transformers' greedy loops, on the engine's own tensors.

`eager` is its `generate`, with the dynamic cache. The other two are written here, kinder than its users have it: a static
cache just long enough, the step with LM head, argmax and the feeding back of the token compiled or captured whole, and all tokens
read at the end; compiled code whose guards are not asked again. So the host is ahead of the GPU also where it is slow, and
times are the GPU's. Prompts are taken in by the plain model.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from clusterfusion.bench.causal_lm import CausalLM
from clusterfusion.bench.decode.loops import Decoded, Loop
from clusterfusion.bench.device_timer import capture
from clusterfusion.bench.peers import PEERS, cache_keyword, set_length, static_cache
from clusterfusion.bench.samples import one_line
from clusterfusion.errors import ClusterFusionError
from clusterfusion.weights import DecoderWeights

EAGER, COMPILED, CAPTURED = PEERS  # to be made in this order; bench/peers.py says why
COMPILING_STEPS = 4  # it compiles, records and replays
EAGER_RUNS = 3  # it takes seconds, and differs by more from the others than from itself


class PeerLoops:
    """Makes the peers' loops over one model, which shares all its parameters."""

    def __init__(self, weights: DecoderWeights) -> None:
        self._weights = weights
        self._model: Any = None
        self._error = ""
        try:
            self._model = CausalLM.shared(weights).model
        except Exception as error:  # whatever transformers raises, or its absence
            self._error = one_line(error)

    def make(self, name: str, ids: Sequence[int], new_tokens: int) -> Loop:
        """The loop of peer `name`. What it raises is the peer's failure."""
        if self._model is None:
            raise ClusterFusionError(self._error)
        kinds: dict[str, Callable[..., Loop]] = {EAGER: GenerateLoop, COMPILED: CompiledLoop, CAPTURED: CapturedLoop}
        return kinds[name](self._model, self._weights, ids, new_tokens)


class GenerateLoop:
    """transformers' own `generate`."""

    def __init__(self, model: Any, weights: DecoderWeights, ids: Sequence[int], new_tokens: int) -> None:
        self._model, self._new_tokens = model, new_tokens
        self._prompt = torch.tensor([list(ids)], device=weights.device)
        self._mask = torch.ones_like(self._prompt)

    @torch.no_grad()
    def decode(self) -> Decoded:
        from transformers import StoppingCriteriaList

        first_s: list[float] = []
        goes_on = torch.zeros(1, dtype=torch.bool, device=self._prompt.device)

        def see(token_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            if not first_s:
                _wait(self._prompt.device)
                first_s.append(time.perf_counter())
            return goes_on

        began_s = time.perf_counter()
        made = self._model.generate(
            self._prompt,
            attention_mask=self._mask,
            do_sample=False,
            max_new_tokens=self._new_tokens,
            stopping_criteria=StoppingCriteriaList([see]),
        )
        token_ids = made[0, self._prompt.shape[1] :].tolist()
        return _decoded(token_ids, began_s, first_s[0], time.perf_counter())


class StaticLoop:
    """What the two loops over a static cache share. On the device: `token` [1, 1] is the last one chosen; `made` [new_tokens] are all,
    and `_slot` [1] is where in it the next one goes."""

    def __init__(self, model: Any, weights: DecoderWeights, ids: Sequence[int], new_tokens: int) -> None:
        config, device = weights.config, weights.device
        self._model = model
        keys = torch.empty((config.num_kv_heads, 0, config.head_dim), dtype=weights.dtype, device=device)
        self.cache = static_cache(model.config, len(ids) + new_tokens, keys)
        self._arguments = {"use_cache": True, "logits_to_keep": 1, cache_keyword(model): self.cache}
        self._prompt = torch.tensor([list(ids)], device=device)
        self.token = torch.zeros((1, 1), dtype=torch.int64, device=device)
        self.made = torch.zeros(new_tokens, dtype=torch.int64, device=device)
        self._slot = torch.zeros(1, dtype=torch.int64, device=device)

    def next_token(self, token_ids: Tensor) -> Tensor:
        """The likeliest token [1, 1] after `token_ids` [1, T], which go into the cache."""
        logits = self._model(input_ids=token_ids, **self._arguments).logits
        return logits[:, -1:].argmax(-1)

    @torch.no_grad()
    def decode(self) -> Decoded:
        began_s = time.perf_counter()
        set_length(self.cache, 0)
        self.token.copy_(self.next_token(self._prompt))
        self.made[:1].copy_(self.token[0])
        self._slot.fill_(1)
        _wait(self.made.device)
        first_s = time.perf_counter()
        self.steps(len(self.made) - 1)
        token_ids = self.made.tolist()
        return _decoded(token_ids, began_s, first_s, time.perf_counter())

    def steps(self, count: int) -> None:
        """`step`, so many times, without waiting for them."""
        raise NotImplementedError

    def stand(self) -> None:
        """As after the prompt: where a step is tried out."""
        set_length(self.cache, self._prompt.shape[1])
        self._slot.zero_()

    def step(self) -> None:
        self.token.copy_(self.next_token(self.token))
        self.made.index_copy_(0, self._slot, self.token[0])
        self._slot.add_(1)


class CompiledLoop(StaticLoop):
    """torch.compile of the step, whose CUDA graphs it makes itself. Needs PyTorch 2.6."""

    @torch.no_grad()
    def __init__(self, model: Any, weights: DecoderWeights, ids: Sequence[int], new_tokens: int) -> None:
        super().__init__(model, weights, ids, new_tokens)
        for tensor in (self.token, self.made, self._slot):  # as the cache's: the graphs may write to them
            torch._dynamo.mark_static_address(tensor)
        # Looked up here: where there is none, nothing is compiled first.
        self._unguarded = functools.partial(torch.compiler.set_stance, skip_guard_eval_unsafe=True)
        self._compiled = torch.compile(self.step, mode="reduce-overhead", fullgraph=True, dynamic=False)
        for _ in range(COMPILING_STEPS):
            self.stand()
            self._run(1)

    def steps(self, count: int) -> None:
        with self._unguarded():  # there is one compiled form, made in __init__
            self._run(count)

    def _run(self, count: int) -> None:
        for _ in range(count):
            torch.compiler.cudagraph_mark_step_begin()
            self._compiled()


class CapturedLoop(StaticLoop):
    """The step captured in one CUDA graph: the host only replays it."""

    @torch.no_grad()
    def __init__(self, model: Any, weights: DecoderWeights, ids: Sequence[int], new_tokens: int) -> None:
        super().__init__(model, weights, ids, new_tokens)
        self._graph, _ = capture(self.step, self.stand, weights.device)

    def steps(self, count: int) -> None:
        for _ in range(count):
            self._graph.replay()


def _decoded(token_ids: list[int], began_s: float, first_s: float, end_s: float) -> Decoded:
    return Decoded(tuple(token_ids), (first_s - began_s) * 1e3, (end_s - first_s) * 1e3 / (len(token_ids) - 1))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
