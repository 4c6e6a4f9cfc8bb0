"""A prompt through the decoder in as few launches as it takes: what the host spends on launching is most of a short prompt's
time to first token.

A GPT-NeoX layer with parallel residual is 8 launches: residual and both norms; q, k and v; rotary embedding and K/V cache;
attention; output projection; up; activation; down. Matrix products are cuBLAS's, with the bias inside. All tensors that a chunk
of the prompt needs are made once and used by every layer, so that a layer makes hardly a view of its own.

Arithmetic is that of reference.py: operands of matrix products, the keys and values among them, are rounded to the weights'
dtype; norms, rotary embedding and the residual stream are float32 (float64 for float64). On a CPU the two fused operations are
PyTorch's, in any dtype.

Why so, and why without a CUDA graph: docs/decisions/0005-prefill.md.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from clusterfusion import reference
from clusterfusion.architecture import DecoderConfig
from clusterfusion.ops.layer_launch import address
from clusterfusion.ops.residual_norms import ResidualNorms
from clusterfusion.ops.rotary_to_cache import RotaryToCache
from clusterfusion.weights import DecoderWeights, LayerWeights

# Of a longer prompt so many tokens go through all layers at a time. Matrix products are as fast with these as with more, and
# what a chunk needs stays small: 30 bytes a token for each of hidden_size (Pythia-12B: 0.3 GB).
CHUNK_TOKENS = 2048
_FLASH_HEAD_MULTIPLE, _FLASH_HEAD_MOST = 8, 256
_GELU = {"gelu": "none", "gelu_tanh": "tanh"}


class Prefill:
    """Takes prompts into one K/V cache, which it shares with its session. Not for several threads at once."""

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, weights: DecoderWeights, cache: reference.KVCache, chunk_tokens: int = CHUNK_TOKENS) -> None:
        """Weights and cache have one dtype; on a GPU it is float16 or bfloat16. Raises UnsupportedModelError for weights that
        cannot be read where they lie, DeviceError on a GPU that is not supported, CompileError."""
        config, dtype, device = weights.config, weights.dtype, weights.device
        self._weights, self._cache, self._chunk_tokens = weights, cache, chunk_tokens
        self._norms = ResidualNorms(config, dtype, device)
        self._rotary = RotaryToCache(config, dtype, device)
        self._layers = [_Layer.of(layer) for layer in weights.layers]
        if device.type == "cuda":
            for layer in weights.layers:
                _require_readable_norms(layer)
            address("final_norm_weight", weights.final_norm_weight)
            address("final_norm_bias", weights.final_norm_bias)
        positions = torch.arange(cache.max_len, device=device)
        self._cos, self._sin = reference.rotary_tables(config.rotary, positions, reference.accumulate_dtype(dtype))

    @torch.inference_mode(False)
    @torch.no_grad()  # inside: leaving inference mode turns gradients on
    def run(self, ids: Tensor, position: int, *, last_only: bool = True) -> Tensor:
        """Logits after `ids` [T], int64 on the weights' device, which stand at positions `position` … `position + T - 1`.

        Reads the first `position` entries of the cache and writes the next T. Returns [vocab] for the last token, or
        [T, vocab] with last_only=False, in accumulate_dtype of the weights' dtype. The caller has checked that ids are in the
        vocabulary and the cache has room.
        """
        if self._weights.device.type == "cuda":
            with torch.cuda.device(self._weights.device):
                return self._run(ids, position, last_only)
        return self._run(ids, position, last_only)

    def _run(self, ids: Tensor, position: int, last_only: bool) -> Tensor:
        logits = []
        for start in range(0, len(ids), self._chunk_tokens):
            chunk = ids[start : start + self._chunk_tokens]
            wanted = len(chunk) if not last_only else int(start + len(chunk) == len(ids))
            hidden = self._chunk(chunk, position + start, wanted)
            if hidden is not None:
                rows = F.linear(hidden, self._weights.lm_head)
                logits.append(rows.to(reference.accumulate_dtype(rows.dtype)))
        if last_only:
            return logits[0][0]
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    def _chunk(self, ids: Tensor, position: int, wanted: int) -> Tensor | None:
        """The normed hidden state of the last `wanted` tokens of `ids` [wanted, hidden]; None if nobody wants any."""
        weights, config = self._weights, self._weights.config
        tokens, end = len(ids), position + len(ids)
        w = _Work.allocate(config, tokens, weights.dtype, weights.device)
        k, v = self._cache.k, self._cache.v
        rotate_and_cache = self._rotary.bind(
            *(w.q, w.k, w.v, k[:, :, position:end], v[:, :, position:end]),
            *(self._cos[position:end], self._sin[position:end]),
        )
        k_cached, v_cached = k[:, None, :, :end].unbind(0), v[:, None, :, :end].unbind(0)
        mask = self._mask(tokens, position)
        deltas: tuple[Tensor, ...] = (F.embedding(ids, weights.embedding),)
        last = len(self._layers) - 1
        for i, (layer, own) in enumerate(zip(self._layers, weights.layers, strict=True)):
            norms = [(own.input_norm_weight, own.input_norm_bias, w.normed)]
            if config.parallel_residual:
                norms.append((own.post_norm_weight, own.post_norm_bias, w.normed_for_mlp))
            self._norms(w.x, deltas, norms, fresh=i == 0)
            for projection, out in zip(layer.qkv, w.qkv, strict=True):
                projection(w.normed, out)
            rotate_and_cache(i)
            if i == last and wanted < tokens:  # from here on a token's row is read by nobody but its own logits
                if not wanted:
                    return None
                w = w.tail(wanted)
                mask = self._mask(wanted, end - wanted)
            layer.o(_attend(w.queries, k_cached[i], v_cached[i], mask), w.attended)
            if config.parallel_residual:
                deltas = (w.attended, self._mlp(layer, w, w.normed_for_mlp))
            else:
                self._norms(w.x, (w.attended,), [(own.post_norm_weight, own.post_norm_bias, w.normed)])
                deltas = (self._mlp(layer, w, w.normed),)
        self._norms(w.x, deltas, [(weights.final_norm_weight, weights.final_norm_bias, w.normed)])
        return w.normed

    def _mlp(self, layer: _Layer, w: _Work, normed: Tensor) -> Tensor:
        config = self._weights.config
        layer.up(normed, w.up)
        if layer.gate is None:
            hidden = _activate(config, w.up)
        else:
            assert w.gate is not None
            layer.gate(normed, w.gate)
            hidden = _activate(config, w.gate).mul_(w.up)
        layer.down(hidden, w.down)
        return w.down

    def _mask(self, tokens: int, position: int) -> Tensor | None:
        """Who sees whom, [T, P + T], where attention has to be told: FlashAttention is not."""
        device = self._weights.device
        if tokens <= 1 or _flash_takes(self._weights.config.head_dim, device):
            return None
        visible = torch.arange(position + tokens, device=device)
        return visible <= visible[position:, None]


def _flash_takes(head_dim: int, device: torch.device) -> bool:
    return device.type == "cuda" and head_dim % _FLASH_HEAD_MULTIPLE == 0 and head_dim <= _FLASH_HEAD_MOST


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Causal attention of q [1, heads, T, head_dim], the last T tokens of k and v [1, kv_heads, P + T, head_dim], to
    [T, heads * head_dim]."""
    if _flash_takes(q.shape[-1], q.device):
        # PyTorch's own FlashAttention (Dao 2023), by the name that torch.nn.attention.bias calls it by: `is_causal` then means
        # that the last query sees the last key, so a chunk after others needs no mask. scaled_dot_product_attention would build
        # a cuDNN graph for every new length of prompt where cuDNN is preferred, and spends host time on choosing.
        out = torch.ops.aten._scaled_dot_product_flash_attention.default(q, k, v, 0.0, True)[0]
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=k.shape[1] != q.shape[1])
    return out.transpose(1, 2).reshape(q.shape[2], -1)


def _activate(config: DecoderConfig, x: Tensor) -> Tensor:
    """reference.activation, in place."""
    if config.activation == "silu":
        return F.silu(x, inplace=True)
    return torch.ops.aten.gelu_(x, approximate=_GELU[config.activation])


def _require_readable_norms(layer: LayerWeights) -> None:
    for name in ("input_norm_weight", "input_norm_bias", "post_norm_weight", "post_norm_bias"):
        address(name, getattr(layer, name))


@dataclasses.dataclass(frozen=True)
class _Projection:
    """A matrix and a bias ready to be multiplied by, as views of the weights: weight [columns, rows], bias [rows]."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> _Projection:
        """Of a matrix [rows, columns], or of the heads of one [heads, head_dim, columns]."""
        return cls(weight.flatten(0, -2).t(), None if bias is None else bias.flatten())

    def __call__(self, x: Tensor, out: Tensor) -> None:
        """out [T, rows] = x [T, columns] times the matrix, plus the bias; rounded once where cuBLAS adds it."""
        if self.bias is None:
            torch.mm(x, self.weight, out=out)
        else:
            torch.addmm(self.bias, x, self.weight, out=out)


@dataclasses.dataclass(frozen=True)
class _Layer:
    """A layer's matrices: q, k and v as one, or three."""

    qkv: tuple[_Projection, ...]
    o: _Projection
    gate: _Projection | None
    up: _Projection
    down: _Projection

    @classmethod
    def of(cls, layer: LayerWeights) -> _Layer:
        if layer.qkv_weight is not None:
            pairs: tuple[tuple[Tensor, Tensor | None], ...] = ((layer.qkv_weight, layer.qkv_bias),)
        else:
            pairs = (
                (layer.q_weight, layer.q_bias),
                (layer.k_weight, layer.k_bias),
                (layer.v_weight, layer.v_bias),
            )
        return cls(
            qkv=tuple(_Projection.of(*pair) for pair in pairs),
            o=_Projection.of(layer.o_weight, layer.o_bias),
            gate=None if layer.gate_weight is None else _Projection.of(layer.gate_weight, layer.gate_bias),
            up=_Projection.of(layer.up_weight, layer.up_bias),
            down=_Projection.of(layer.down_weight, layer.down_bias),
        )


@dataclasses.dataclass(frozen=True)
class _Work:
    """What T tokens of a prompt need on their way through the layers, each tensor used anew by every layer. All but x are of
    the weights' dtype."""

    x: Tensor  # the residual stream [T, hidden], of accumulate_dtype
    normed: Tensor  # [T, hidden]
    normed_for_mlp: Tensor  # [T, hidden]; with sequential residual the same as `normed`
    qkv: tuple[Tensor, ...]  # what the projections write, [T, rows] each
    q: Tensor  # [T, heads, head_dim], a view of qkv
    k: Tensor  # [T, kv_heads, head_dim]
    v: Tensor
    queries: Tensor  # q as attention takes it, [1, heads, T, head_dim]
    attended: Tensor  # [T, hidden], after the output projection
    gate: Tensor | None  # [T, intermediate]
    up: Tensor  # [T, intermediate]
    down: Tensor  # [T, hidden]

    @classmethod
    def allocate(cls, config: DecoderConfig, tokens: int, dtype: torch.dtype, device: torch.device) -> _Work:
        def empty(columns: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(tokens, columns, dtype=dtype, device=device)

        c = config
        if c.fused_qkv:
            qkv: tuple[Tensor, ...] = (empty(c.q_size + 2 * c.kv_size),)
            q, k, v = qkv[0].view(tokens, c.num_heads, 3, c.head_dim).unbind(2)
        else:
            qkv = (empty(c.q_size), empty(c.kv_size), empty(c.kv_size))
            q, k, v = (out.unflatten(1, (-1, c.head_dim)) for out in qkv)
        normed = empty(c.hidden_size)
        return cls(
            x=empty(c.hidden_size, reference.accumulate_dtype(dtype)),
            normed=normed,
            normed_for_mlp=empty(c.hidden_size) if c.parallel_residual else normed,
            qkv=qkv,
            q=q,
            k=k,
            v=v,
            queries=q.transpose(0, 1)[None],
            attended=empty(c.hidden_size),
            gate=empty(c.intermediate_size) if c.gated_mlp else None,
            up=empty(c.intermediate_size),
            down=empty(c.hidden_size),
        )

    def tail(self, tokens: int) -> _Work:
        """That of the last `tokens` tokens alone, the same memory."""
        tensors: dict[str, Any] = {
            name: value[-tokens:] for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return dataclasses.replace(self, **tensors | {"queries": self.queries[:, :, -tokens:]})
