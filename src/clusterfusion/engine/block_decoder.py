"""Decode steps through the fused decoder layer: the modes split, fused and graph.

The layers run as kernels, the residual stream float32 between them; embedding, final norm and LM head are PyTorch
operations. In graph mode all of it is captured once, at the first step, and replayed for every position: token and
position are read from device memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from clusterfusion import reference
from clusterfusion.architecture import DecoderConfig
from clusterfusion.errors import DeviceError, UnsupportedModelError
from clusterfusion.jit.decoder_block import (
    ERROR_WORDS,
    ElementType,
    LayerArguments,
    prepare,
)
from clusterfusion.jit.device import architecture_of, device_limits
from clusterfusion.plan import BlockPlan, PlanLimits, plan_block
from clusterfusion.plan.block import COUNTER_WORDS, PARTIAL_PADDING
from clusterfusion.weights import DecoderWeights, LayerWeights

_DEPENDENCIES = ("q, k and v", "attention", "the MLP's hidden vector", "the middle residual", "its cluster")
_ALIGNMENT = 16  # bytes; bulk copies need it
_CAPTURE_LOCK = threading.Lock()


def plan_for(config: DecoderConfig, device_index: int) -> BlockPlan:
    """The plan of a model's layers on a GPU. Raises UnsupportedModelError or DeviceError saying what rules it out."""
    limits = device_limits(device_index)
    architecture_of(limits.compute_capability, limits.name)
    return plan_block(config, PlanLimits(limits.name, limits.multiprocessors, limits.shared_bytes_per_block))


class BlockDecoder:
    """Runs steps over one K/V cache, which it shares with its session. Its buffers belong to it alone.

    Device memory beside weights and cache: `plan.scratch_bytes`, two residual vectors, the rotary tables
    [max_len, rotary_dim / 2], and in graph mode the logits.
    """

    @torch.inference_mode(False)  # its buffers are written in place later, in whatever mode the caller is in then
    def __init__(self, weights: DecoderWeights, cache: reference.KVCache, mode: str) -> None:
        self.plan = plan_for(weights.config, weights.device.index)
        self._weights = weights
        self._cache = cache
        self._mode = mode
        self._graph: torch.cuda.CUDAGraph | None = None
        self._graph_logits: Tensor | None = None
        _require_dense_cache(cache)
        config, device = weights.config, weights.device
        positions = torch.arange(cache.max_len, device=device)
        self._cos, self._sin = reference.rotary_tables(config.rotary, positions, torch.float32)
        self._token = torch.zeros(1, dtype=torch.int64, device=device)
        self._position = torch.zeros(1, dtype=torch.int32, device=device)
        self._x = [torch.empty(config.hidden_size, dtype=torch.float32, device=device) for _ in range(2)]
        partial = config.head_dim + PARTIAL_PADDING
        self._scratch = {
            "qkv": torch.empty(3 * config.hidden_size, dtype=torch.float32, device=device),
            "partials": torch.empty(
                config.num_heads * self.plan.partials_per_head * partial, dtype=torch.float32, device=device
            ),
            "middle": torch.empty(config.hidden_size, dtype=torch.float32, device=device),
            "h": torch.empty(config.intermediate_size, dtype=weights.dtype, device=device),
            "counters": torch.zeros(COUNTER_WORDS, dtype=torch.int32, device=device),
        }
        # In host memory that the GPU writes to: looking for an error costs no synchronisation.
        self._error = torch.zeros(ERROR_WORDS, dtype=torch.int32, device="cpu", pin_memory=True)
        self._launches = [launch for i, layer in enumerate(weights.layers) for launch in self._prepare(i, layer)]

    @torch.no_grad()
    @torch.inference_mode(False)
    def step(self, token: int, position: int) -> Tensor:
        """Logits [vocab], float32, after `token` at `position`; its keys and values go into the cache.

        Raises DeviceError when an earlier step of this decoder failed on the GPU.
        """
        self.check_error()
        with torch.cuda.device(self._weights.device):
            return self._step(token, position)

    def _step(self, token: int, position: int) -> Tensor:
        self._token.fill_(token)
        self._position.fill_(position)
        if self._mode != "graph":
            return self._run()
        if self._graph is None:
            with _CAPTURE_LOCK:  # entering a capture synchronises the device, which another capture forbids
                return self._capture()
        self._graph.replay()
        assert self._graph_logits is not None
        return self._graph_logits.clone()

    def _run(self) -> Tensor:
        weights, config = self._weights, self._weights.config
        self._x[0].copy_(F.embedding(self._token, weights.embedding)[0])
        for launch in self._launches:
            launch()
        x = self._x[config.num_layers % 2]
        x = reference.norm(config, x, weights.final_norm_weight, weights.final_norm_bias)
        return reference.linear(x, weights.lm_head, None, weights.dtype)

    def _capture(self) -> Tensor:
        """The first step in graph mode: run once, which also sets up libraries, then capture for the later ones."""
        device = self._weights.device
        logits = self._run()
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            self._graph_logits = self._run()
        torch.cuda.current_stream(device).wait_stream(stream)
        self._graph = graph
        return logits

    def _prepare(self, index: int, layer: LayerWeights) -> list[Callable[[], None]]:
        config, cache = self._weights.config, self._cache
        k, v = cache.k[index], cache.v[index]
        arguments = LayerArguments(
            norm1_weight=_address(layer.input_norm_weight),
            norm1_bias=_address(layer.input_norm_bias),
            norm2_weight=_address(layer.post_norm_weight),
            norm2_bias=_address(layer.post_norm_bias),
            qkv_weight=_address(layer.qkv_weight),
            qkv_bias=_address(layer.qkv_bias),
            o_weight=_address(layer.o_weight),
            o_bias=_address(layer.o_bias),
            up_weight=_address(layer.up_weight),
            up_bias=_address(layer.up_bias),
            down_weight=_address(layer.down_weight),
            down_bias=_address(layer.down_bias),
            k_cache=k.data_ptr(),
            v_cache=v.data_ptr(),
            head_stride=k.stride(0),
            token_stride=k.stride(1),
            cos=self._cos.data_ptr(),
            sin=self._sin.data_ptr(),
            table_stride=config.rotary.dim // 2,
            position=self._position.data_ptr(),
            x=self._x[index % 2].data_ptr(),
            out=self._x[1 - index % 2].data_ptr(),
            error=self._error.data_ptr(),
            eps=config.norm_eps,
            **{name: tensor.data_ptr() for name, tensor in self._scratch.items()},
        )
        dtype: ElementType = "bfloat16" if self._weights.dtype == torch.bfloat16 else "float16"
        segments = self.plan.segments if self._mode == "split" else ("whole",)
        device_index = self._weights.device.index
        return [prepare(self.plan, dtype, "float32", segment, arguments, device_index) for segment in segments]

    def check_error(self) -> None:
        """Raise DeviceError if a step that has ended on the GPU gave up waiting. Costs nothing but a look."""
        which, cta, expected, seen, *_ = self._error.tolist()
        if which:
            raise DeviceError(
                f"a decode step gave up waiting for {_DEPENDENCIES[which - 1]}: CTA {cta} saw {seen} arrivals of "
                f"{expected}; results since then are wrong. Make a new session"
            )


def _require_dense_cache(cache: reference.KVCache) -> None:
    for tensor in (cache.k, cache.v):
        strides = tensor.stride()
        dense = strides[3] == 1 and all(stride * tensor.element_size() % _ALIGNMENT == 0 for stride in strides[:3])
        if not dense or strides != cache.k.stride() or tensor.data_ptr() % _ALIGNMENT:
            raise UnsupportedModelError(
                f"a K/V cache of strides {strides} cannot be streamed: heads must be dense, all strides multiples of "
                f"{_ALIGNMENT} bytes, keys and values alike"
            )


def _address(tensor: Tensor | None) -> int | None:
    if tensor is None:
        return None
    address = tensor.data_ptr()
    if not tensor.is_contiguous():
        raise UnsupportedModelError(
            f"a weight tensor of shape {list(tensor.shape)} has strides {tensor.stride()}; the kernels read dense rows: "
            "use mode='reference', or make it contiguous"
        )
    if address % _ALIGNMENT:
        raise UnsupportedModelError(
            f"a weight tensor of shape {list(tensor.shape)} lies at an address that is no multiple of {_ALIGNMENT} bytes; "
            "use mode='reference', or clone the tensor"
        )
    return address
