"""What a decode step has to read, of the layers alone or whole, and so the time that none can beat on a GPU of known read
ceiling."""

from __future__ import annotations

from clusterfusion.architecture import DecoderConfig

ELEMENT_BYTES = 2  # weights and K/V, float16 and bfloat16 alike


def layer_weight_bytes(config: DecoderConfig) -> int:
    """Bytes of one decoder layer's weights: matrices, biases and norms."""
    return config.layer_parameters * ELEMENT_BYTES


def weight_bytes(config: DecoderConfig) -> int:
    """Bytes of the weights of all layers; no embedding, final norm or LM head."""
    return config.num_layers * layer_weight_bytes(config)


def kv_bytes(config: DecoderConfig, context: int) -> int:
    """Bytes of the keys and values of `context` cached tokens, all layers together."""
    return context * config.kv_elements_per_token * ELEMENT_BYTES


def step_bytes(config: DecoderConfig, context: int) -> int:
    """Bytes that one step of the layers reads after `context` cached tokens. Activations, tables and the new token's own
    keys and values are left out: they stay on chip or count for less than a thousandth."""
    return weight_bytes(config) + kv_bytes(config, context)


def whole_step_weight_bytes(config: DecoderConfig, element_bytes: int = ELEMENT_BYTES) -> int:
    """Bytes of the weights that a whole step reads: all layers, final norm, LM head, and one row of the embedding."""
    return config.step_parameters * element_bytes


def mean_cached_tokens(context: int, new_tokens: int) -> float:
    """Cached tokens that a step meets on average while `new_tokens` are decoded after `context`. The first token comes of
    the prompt; the steps after it meet `context` tokens, and one more each."""
    return context + (new_tokens - 2) / 2


def decode_bytes(config: DecoderConfig, context: int, new_tokens: int, element_bytes: int = ELEMENT_BYTES) -> float:
    """Bytes that a whole step reads on average while `new_tokens` are decoded after `context` tokens."""
    kv = mean_cached_tokens(context, new_tokens) * config.kv_elements_per_token * element_bytes
    return whole_step_weight_bytes(config, element_bytes) + kv


def floor_ms(bytes_read: float, read_ceiling: float) -> float:
    """Milliseconds that reading `bytes_read` takes at `read_ceiling` bytes a second."""
    return bytes_read / read_ceiling * 1e3
