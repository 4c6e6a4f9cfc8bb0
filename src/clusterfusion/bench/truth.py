"""Float64 ground truth of a decoder, and the engine's own final hidden state, from public parts alone.

The hidden state here is what the final norm reads. A session returns logits only, so `HiddenProbe` runs the layers a
second time as the session's mode does, over a cache of its own, and hands the state out only where the logits that come of
it are the session's to the bit.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from clusterfusion import reference
from clusterfusion.bench.divergence import first_bit_difference
from clusterfusion.engine import Engine
from clusterfusion.engine.block_decoder import BlockDecoder
from clusterfusion.engine.memory import require_memory
from clusterfusion.errors import ClusterFusionError
from clusterfusion.weights import DecoderWeights


def hidden_states(
    weights: DecoderWeights, token_ids: Tensor, cache: reference.KVCache, position: int, dtype: torch.dtype
) -> Tensor:
    """The residual stream after the last layer [T, hidden]: `reference.forward` up to the final norm, which see."""
    x = F.embedding(token_ids, weights.embedding).to(reference.accumulate_dtype(dtype))
    positions = torch.arange(position, position + len(token_ids), device=x.device)
    cos, sin = reference.rotary_tables(weights.config.rotary, positions, dtype=x.dtype)
    for i, layer in enumerate(weights.layers):
        x = reference.decoder_layer(weights.config, layer, x, cos, sin, cache.k[i], cache.v[i], position, dtype=dtype)
    return x


def logits_of(weights: DecoderWeights, hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """Final norm and LM head over hidden states [..., hidden]."""
    x = reference.norm(weights.config, hidden, weights.final_norm_weight, weights.final_norm_bias)
    return reference.linear(x, weights.lm_head, None, dtype)


class Truth:
    """The float64 reference over a text that is taken in piece by piece."""

    def __init__(self, weights: DecoderWeights, tokens: int) -> None:
        """Makes room for `tokens` tokens. Raises DeviceError where the cache does not fit."""
        needed = weights.config.kv_elements_per_token * tokens * torch.float64.itemsize
        require_memory(f"a float64 K/V cache of {tokens} tokens", needed, weights.device)
        self._weights = weights
        self._cache = reference.KVCache.allocate(weights.config, tokens, torch.float64, weights.device)
        self._position = 0

    @torch.no_grad()
    def push(self, ids: list[int]) -> tuple[Tensor, Tensor]:
        """Hidden states [T, hidden] and logits [T, vocab] after each of the next tokens, float64."""
        tokens = torch.tensor(ids, device=self._weights.device)
        hidden = hidden_states(self._weights, tokens, self._cache, self._position, torch.float64)
        self._position += len(ids)
        return hidden, logits_of(self._weights, hidden, torch.float64)


def true_logits(weights: DecoderWeights, ids: list[int]) -> Tensor:
    """Float64 reference logits [vocab] after `ids`."""
    tokens = torch.tensor(ids, device=weights.device)
    cache = reference.KVCache.allocate(weights.config, len(ids), torch.float64, weights.device)
    return reference.forward(weights, tokens, cache, 0, dtype=torch.float64)


class HiddenProbe:
    """The engine's final hidden state, token by token beside a session. `reason` says why there is none, once there is
    none."""

    def __init__(self, engine: Engine, tokens: int) -> None:
        self._engine = engine
        self._cache = reference.KVCache.allocate(engine.config, tokens, engine.dtype, engine.device)
        self._decoder: BlockDecoder | None = None
        self._position = 0
        self.reason: str | None = None

    @torch.no_grad()
    def step(self, token: int, logits: Tensor) -> Tensor | None:
        """The hidden state [hidden] of `token`, after which the session returned `logits`; None once it is not to be
        had."""
        if self.reason is not None:
            return None
        try:
            hidden, own_logits = self._run(token)
        except ClusterFusionError as error:
            self.reason = str(error)
            return None
        if first_bit_difference(own_logits[None], logits[None]) is not None:
            self.reason = f"the layers run by themselves do not give the bits of mode {self._engine.mode} (token {self._position})"
            return None
        self._position += 1
        return hidden

    def _run(self, token: int) -> tuple[Tensor, Tensor]:
        weights, mode = self._engine.weights, self._engine.mode
        if mode == "reference":
            ids = torch.tensor([token], device=weights.device)
            hidden = hidden_states(weights, ids, self._cache, self._position, weights.dtype)[-1]
            return hidden, logits_of(weights, hidden, weights.dtype)
        if self._decoder is None:
            self._decoder = BlockDecoder(weights, self._cache, "split" if mode == "split" else "fused")
        logits = self._decoder.step(token, self._position)
        hidden = self._decoder.hidden.clone()
        torch.cuda.synchronize(weights.device)
        self._decoder.check_error()
        return hidden, logits
