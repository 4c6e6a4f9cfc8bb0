"""What the tests of decoder_layer call it with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import clusterfusion
from clusterfusion import reference
from clusterfusion.architecture import DecoderConfig
from clusterfusion.weights import LayerWeights

ROOM = 40


class LayerCase:
    """A layer, a cache of noise, and a call's arguments."""

    def __init__(
        self, config: DecoderConfig, weights: LayerWeights, dtype: torch.dtype, x_dtype: torch.dtype = torch.float32
    ) -> None:
        self.config, self.weights = config, weights
        generator = torch.Generator().manual_seed(5)

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.x = noise(1, config.hidden_size).to(x_dtype)
        self.k, self.v = (noise(config.num_kv_heads, ROOM, config.head_dim).to(dtype) for _ in range(2))
        self.cos, self.sin = reference.rotary_tables(config.rotary, torch.arange(ROOM), torch.float32)

    def arguments(self, **changes: Any) -> dict[str, Any]:
        return {
            "x": self.x,
            "layer_weights": self.weights,
            "k_cache": self.k,
            "v_cache": self.v,
            "position": 7,
            "cos": self.cos,
            "sin": self.sin,
            "rotary_dim": self.config.rotary.dim,
            "eps": self.config.norm_eps,
            "activation": self.config.activation,
            "parallel_residual": self.config.parallel_residual,
        } | changes

    def call(self, **changes: Any) -> tuple[Tensor, Tensor, Tensor]:
        return clusterfusion.decoder_layer(**self.arguments(**changes))
