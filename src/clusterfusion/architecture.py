"""What a decoder is: shapes, norm, activation, rotary embedding and residual form, as immutable data.

`DecoderConfig` describes a whole family of models with one set of fields, so that the reference, the plans and the
kernels branch on what a model *does* and never on its name. `DecoderConfig.from_dict` reads a checkpoint's
`config.json`; whatever it finds there and cannot honour is refused by name.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from clusterfusion.errors import UnsupportedModelError

Norm = Literal["layer_norm", "rms_norm"]
Activation = Literal["gelu", "gelu_tanh", "silu"]
Family = Literal["gpt_neox", "llama"]
RotaryScaling = Literal["none", "linear", "llama3"]


@dataclasses.dataclass(frozen=True)
class RotaryConfig:
    """Rotary position embedding (Su et al. 2021), pairing dimension i with i + dim/2, or with `neighbours` 2i with 2i + 1.

    `nominal_dim` is `int(head_dim * rotary_pct)`; frequencies are `theta ** (-2i / nominal_dim)`. `dim` dimensions
    rotate: `nominal_dim` rounded up to even, which is what transformers does with an odd one. The rest pass through.
    `scaling` is "linear" (Chen et al. 2023: every frequency divided by `factor`) or "llama3" (only wavelengths longer
    than `original_max_position / high_freq_factor` are stretched, smoothly).
    """

    nominal_dim: int
    theta: float = 10000.0
    scaling: RotaryScaling = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    neighbours: bool = False

    @property
    def dim(self) -> int:
        """How many leading dimensions of a head rotate; even."""
        return self.nominal_dim + self.nominal_dim % 2

    def __post_init__(self) -> None:
        _require("rotary theta", self.theta, self.theta > 0 and math.isfinite(self.theta), "a positive number")
        _require("rotary dimension", self.nominal_dim, self.nominal_dim >= 0, "zero or more")
        _require("rotary scaling factor", self.factor, self.factor > 0, "a positive number")
        if self.scaling == "llama3":
            _require(
                "rotary high_freq_factor",
                self.high_freq_factor,
                self.high_freq_factor > self.low_freq_factor > 0,
                f"more than low_freq_factor ({self.low_freq_factor}), and both positive",
            )
            _require("rotary original_max_position", self.original_max_position, self.original_max_position > 0, "> 0")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer, as every part of this package sees it. Sizes are in elements, not bytes.

    `parallel_residual`: x' = x + attn(norm1 x) + mlp(norm2 x); otherwise x'' = x + attn(norm1 x), x' = x'' + mlp(norm2 x'').
    `gated_mlp`: down(act(gate x) * up x) (SwiGLU, Shazeer 2020) instead of down(act(up x)).
    `num_kv_heads` < `num_heads`: grouped-query attention (Ainslie et al. 2023).
    `attention_bias` is for q, k, v and the output projection; `mlp_bias` for every MLP projection.
    `fused_qkv`: the checkpoint holds one matrix whose rows go head by head, q then k then v of `head_dim` rows each.
    """

    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rotary: RotaryConfig
    norm: Norm
    norm_eps: float
    activation: Activation
    gated_mlp: bool
    parallel_residual: bool
    attention_bias: bool
    mlp_bias: bool
    tied_embeddings: bool
    fused_qkv: bool
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"):
            _require(name, getattr(self, name), getattr(self, name) > 0, "a positive integer")
        _require("head_dim", self.head_dim, self.head_dim > 0, "a positive integer")
        _require("max_position_embeddings", self.max_position, self.max_position > 0, "a positive integer")
        _require("norm eps", self.norm_eps, self.norm_eps > 0, "a positive number")
        _require(
            "num_key_value_heads",
            self.num_kv_heads,
            self.num_heads % self.num_kv_heads == 0,
            f"a divisor of num_attention_heads ({self.num_heads})",
        )
        _require(
            "rotary dimension", self.rotary.dim, self.rotary.dim <= self.head_dim, f"at most head_dim ({self.head_dim})"
        )

    @property
    def q_size(self) -> int:
        """Rows of the query projection: num_heads * head_dim."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Rows of the key projection, and of the value projection: num_kv_heads * head_dim."""
        return self.num_kv_heads * self.head_dim

    @property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer."""
        h, i = self.hidden_size, self.intermediate_size
        matrices = (self.q_size + 2 * self.kv_size) * h + h * self.q_size + (3 if self.gated_mlp else 2) * h * i
        biases = (self.q_size + 2 * self.kv_size + h) * self.attention_bias
        biases += ((2 if self.gated_mlp else 1) * i + h) * self.mlp_bias
        norms = 2 * h * (2 if self.norm == "layer_norm" else 1)
        return matrices + biases + norms

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model; tied embeddings count once."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        final_norm = self.hidden_size * (2 if self.norm == "layer_norm" else 1)
        return self.num_layers * self.layer_parameters + embeddings + final_norm

    @property
    def step_parameters(self) -> int:
        """Parameters that one decode step reads: all but the embedding table, of which it reads one row."""
        h = self.hidden_size
        final_norm = h * (2 if self.norm == "layer_norm" else 1)
        return self.num_layers * self.layer_parameters + self.vocab_size * h + h + final_norm

    @property
    def kv_elements_per_token(self) -> int:
        """Elements that one token adds to the K/V cache, all layers together."""
        return 2 * self.num_layers * self.kv_size

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> DecoderConfig:
        """Read a checkpoint's `config.json`, given as a mapping.

        Raises UnsupportedModelError naming the field and the value seen when the model needs something that is not
        implemented, or when a needed field is missing or malformed. No field is ignored unless it is known not to
        change what the model computes at inference.
        """
        from clusterfusion.config_json import read_config  # the reader depends on the class, not the reverse

        return read_config(raw)


def _require(name: str, seen: object, ok: bool, needed: str) -> None:
    if not ok:
        raise UnsupportedModelError(f"{name} is {seen!r}; it must be {needed}")
