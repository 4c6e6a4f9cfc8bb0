"""Decode steps through the fused decoder layer: the modes split, fused and graph.

The layers, and final norm and LM head after them, run as kernels, the residual stream float32 between them; the embedding
is a PyTorch operation. In graph mode all of it is captured once, at the first step, and replayed for every position: token
and position are read from device memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from clusterfusion import reference
from clusterfusion.architecture import DecoderConfig
from clusterfusion.jit.lm_head import HeadArguments, prepare_head
from clusterfusion.ops.layer_launch import (
    CAPTURE_LOCK,
    ELEMENT_TYPES,
    ErrorRecord,
    LayerBuffers,
    LayerScratch,
    RotaryTables,
    address,
    layer_arguments,
    plan_for,
    prepare_layer,
    workspace,
)
from clusterfusion.weights import DecoderWeights, LayerWeights


class BlockDecoder:
    """Runs steps over one K/V cache, which it shares with its session. Its buffers belong to it alone, and to the stream
    that its steps run on: whoever steps on several streams orders them, and lets the last end before it is dropped.

    Device memory beside weights and cache: `plan.scratch_bytes`, two residual vectors, the rotary tables
    [max_len, rotary_dim / 2], and the logits.
    """

    @torch.inference_mode(False)  # its buffers are written in place later, in whatever mode the caller is in then
    def __init__(self, weights: DecoderWeights, cache: reference.KVCache, mode: str) -> None:
        self.plan = plan_for(weights.config, weights.device.index)
        self._weights = weights
        self._cache = cache
        self._mode = mode
        self._graph: torch.cuda.CUDAGraph | None = None
        config, device = weights.config, weights.device
        self._tables = rotary_tables(config, cache.max_len, device)
        self._token = torch.zeros(1, dtype=torch.int64, device=device)
        self._position = torch.zeros(1, dtype=torch.int32, device=device)
        self._x = [torch.empty(config.hidden_size, dtype=torch.float32, device=device) for _ in range(2)]
        self._scratch = LayerScratch(self.plan, weights.dtype, device)
        self._error = ErrorRecord()
        self._logits = torch.empty(config.vocab_size, dtype=torch.float32, device=device)
        self._launches = [launch for i, layer in enumerate(weights.layers) for launch in self._prepare(i, layer)]
        self._launch_head = self._prepare_head()

    @torch.inference_mode(False)
    @torch.no_grad()  # inside: leaving inference mode turns gradients on
    def step(self, token: int, position: int) -> Tensor:
        """Logits [vocab], float32, after `token` at `position`; its keys and values go into the cache.

        Raises DeviceError when an earlier step of this decoder failed on the GPU.
        """
        self.check_error()
        with torch.cuda.device(self._weights.device):
            return self._step(token, position)

    def _step(self, token: int, position: int) -> Tensor:
        self._token.fill_(token)
        self.set_position(position)
        if self._mode != "graph":
            self._run()
        elif self._graph is None:
            with CAPTURE_LOCK:
                self._capture()
        else:
            self._graph.replay()
        return self._logits.clone()

    def _run(self) -> None:
        self._x[0].copy_(F.embedding(self._token, self._weights.embedding)[0])
        self.run_layers()
        self._launch_head()

    @property
    def residual(self) -> Tensor:
        """Where the first layer reads the residual stream, [hidden] float32."""
        return self._x[0]

    @property
    def hidden(self) -> Tensor:
        """Where the last layer leaves it, for final norm and LM head."""
        return self._x[self._weights.config.num_layers % 2]

    def set_position(self, position: int) -> None:
        """Write the number of cached tokens to where the layers read it, in the current stream's order."""
        self._position.fill_(position)

    def run_layers(self) -> Tensor:
        """All layers at the current position, from the residual stream [hidden] in `residual`; returns where it ends."""
        for launch in self._launches:
            launch()
        return self.hidden

    def _capture(self) -> None:
        """The first step in graph mode: run once, which also sets up libraries, then capture for the later ones."""
        device = self._weights.device
        self._run()
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            self._run()
        torch.cuda.current_stream(device).wait_stream(stream)
        self._graph = graph

    def _prepare(self, index: int, layer: LayerWeights) -> list[Callable[[], None]]:
        weights = self._weights
        buffers = LayerBuffers(
            x=self._x[index % 2],
            out=self._x[1 - index % 2],
            k_cache=self._cache.k[index],
            v_cache=self._cache.v[index],
            position=self._position,
            tables=self._tables,
        )
        return prepare_layer(
            self.plan,
            weights.dtype,
            torch.float32,
            self.plan.segments if self._mode == "split" else ("whole",),
            layer_arguments(self.plan, layer, buffers, self._scratch, self._error),
            weights.device.index,
            follows_layer=index > 0,
        )

    def _prepare_head(self) -> Callable[[], None]:
        weights = self._weights
        arguments = HeadArguments(
            workspace=workspace(self.plan, self._tables, self._scratch, self._error),
            norm_weight=address("final_norm_weight", weights.final_norm_weight),
            norm_bias=address("final_norm_bias", weights.final_norm_bias),
            lm_head=address("lm_head", weights.lm_head),
            x=self.hidden.data_ptr(),
            logits=self._logits.data_ptr(),
            vocabulary=weights.config.vocab_size,
        )
        return prepare_head(self.plan, ELEMENT_TYPES[weights.dtype], arguments, weights.device.index)

    def check_error(self) -> None:
        """Raise DeviceError if a step that has ended on the GPU gave up waiting. Costs nothing but a look."""
        self._error.check("Make a new session")


def rotary_tables(config: DecoderConfig, max_len: int, device: torch.device) -> RotaryTables:
    """The tables of all positions, [max_len, rotary_dim / 2]."""
    cos, sin = reference.rotary_tables(config.rotary, torch.arange(max_len, device=device), torch.float32)
    return RotaryTables(cos, sin, row_stride=config.rotary.dim // 2)
