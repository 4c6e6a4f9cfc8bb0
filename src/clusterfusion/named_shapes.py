"""Named model shapes, for measuring without a checkpoint and for planning. Sizes follow the published config.json files."""

from __future__ import annotations

from typing import Any

from clusterfusion.architecture import DecoderConfig
from clusterfusion.errors import ArgumentError


def _neox(
    layers: int, hidden: int, heads: int, vocab: int = 50304, *, intermediate: int | None = None, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": "gpt_neox",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "intermediate_size": intermediate or 4 * hidden,
        "vocab_size": vocab,
        "max_position_embeddings": 2048,
        "rotary_pct": 0.25,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "dtype": "float16",
    } | more


def _llama(
    layers: int, hidden: int, heads: int, kv_heads: int, intermediate: int, vocab: int, positions: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
        "vocab_size": vocab,
        "max_position_embeddings": positions,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "bfloat16",
    } | more


def _llama3(*sizes: int, factor: float | None = None, **more: Any) -> dict[str, Any]:
    layers, hidden, heads, intermediate = sizes
    shape = _llama(
        layers, hidden, heads, 8, intermediate, 128256, 8192, rope_theta=500000.0, bos_token_id=128000,
        eos_token_id=128001,
    )  # fmt: skip
    if factor is not None:  # 3.1 and 3.2
        shape["max_position_embeddings"] = 131072
        shape["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    return shape | more


def _smollm(layers: int, hidden: int, heads: int, kv_heads: int, intermediate: int) -> dict[str, Any]:
    return _llama(
        layers, hidden, heads, kv_heads, intermediate, 49152, 2048, tie_word_embeddings=True, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip


_SHAPES: dict[str, dict[str, Any]] = {
    "pythia-14m": _neox(6, 128, 4),
    "pythia-31m": _neox(6, 256, 8),
    "pythia-70m": _neox(6, 512, 8),
    "pythia-160m": _neox(12, 768, 12),
    "pythia-410m": _neox(24, 1024, 16),
    "pythia-1b": _neox(16, 2048, 8),
    "pythia-1.4b": _neox(24, 2048, 16),
    "pythia-2.8b": _neox(32, 2560, 32),
    "pythia-6.9b": _neox(32, 4096, 32, 50432),
    "pythia-12b": _neox(36, 5120, 40, 50688),
    "gpt-neox-20b": _neox(44, 6144, 64, 50432, hidden_act="gelu_fast"),
    "redpajama-incite-3b": _neox(32, 2560, 32, 50432, rotary_pct=1.0, use_parallel_residual=False),
    "redpajama-incite-7b": _neox(32, 4096, 32, 50432, rotary_pct=1.0, use_parallel_residual=False),
    "stablelm-alpha-3b": _neox(16, 4096, 32, 50688, max_position_embeddings=4096),
    "stablelm-alpha-7b": _neox(16, 6144, 48, 50432, max_position_embeddings=4096),
    "llama-2-7b": _llama(32, 4096, 32, 32, 11008, 32000, 4096, dtype="float16"),
    "llama-2-13b": _llama(40, 5120, 40, 40, 13824, 32000, 4096, dtype="float16"),
    "llama-2-70b": _llama(80, 8192, 64, 8, 28672, 32000, 4096, dtype="float16"),
    "llama-3-8b": _llama3(32, 4096, 32, 14336),
    "llama-3-70b": _llama3(80, 8192, 64, 28672),
    "llama-3.1-8b": _llama3(32, 4096, 32, 14336, factor=8.0),
    "llama-3.1-70b": _llama3(80, 8192, 64, 28672, factor=8.0),
    "llama-3.2-1b": _llama3(16, 2048, 32, 8192, factor=32.0, head_dim=64, tie_word_embeddings=True),
    "llama-3.2-3b": _llama3(28, 3072, 24, 8192, factor=32.0, head_dim=128, tie_word_embeddings=True),
    "tinyllama-1.1b": _llama(22, 2048, 32, 4, 5632, 32000, 2048),
    "smollm-135m": _smollm(30, 576, 9, 3, 1536),
    "smollm-360m": _smollm(32, 960, 15, 5, 2560),
    "smollm-1.7b": _smollm(24, 2048, 32, 32, 8192),
}

NAMED_SHAPES: tuple[str, ...] = tuple(_SHAPES)


def named_shape(name: str) -> DecoderConfig:
    """The DecoderConfig of a named shape, such as "pythia-2.8b". Raises ArgumentError for an unknown name."""
    raw = _SHAPES.get(name.lower()) if isinstance(name, str) else None
    if raw is None:
        raise ArgumentError(f"named shape {name!r} is unknown; known are {', '.join(NAMED_SHAPES)}")
    return DecoderConfig.from_dict(raw)
