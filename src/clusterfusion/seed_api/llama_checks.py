"""What the seed's LLaMA functions ask of their arguments, by the seed's names for them."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from clusterfusion.architecture import DecoderConfig
from clusterfusion.arguments import require, require_dense
from clusterfusion.errors import ArgumentError
from clusterfusion.named_shapes import named_shape
from clusterfusion.ops.attention_half import AttentionWeights, WeightOrder
from clusterfusion.ops.layer_checks import Pairing, require_tensor
from clusterfusion.seed_api.checks import check_aligned

LLAMA = named_shape("llama-2-7b")
HIDDEN, HEADS, HEAD_DIM = LLAMA.hidden_size, LLAMA.num_heads, LLAMA.head_dim


def half_config(eps: float, pairing: Pairing) -> DecoderConfig:
    """The model whose attention half the functions are; its MLP does not run."""
    rotary = dataclasses.replace(LLAMA.rotary, neighbours=pairing == "neighbours")
    return dataclasses.replace(LLAMA, norm_eps=eps, rotary=rotary)


def check_rows(device: torch.device, rows: int, **tensors: object) -> None:
    for name, tensor in tensors.items():
        require_tensor(name, tensor, (rows, HIDDEN), torch.float16, device)


def checked_weights(
    device: torch.device, weight_qkv: Tensor, weight_o: Tensor, rms_input_weight: Tensor, order: WeightOrder
) -> AttentionWeights:
    matrices = {"weight_qkv": (weight_qkv, 3 * HIDDEN), "weight_o": (weight_o, HIDDEN)}
    for name, (tensor, rows) in matrices.items():
        require_tensor(name, tensor, (rows, HIDDEN), torch.float16, device)
        check_aligned(name, tensor)
    norm = rms_input_weight
    require_dense("rms_input_weight", norm, f"a tensor of shape [{HIDDEN}]")
    one_row = norm.dim() == 2 and norm.shape[0] == 1
    require_tensor("rms_input_weight", norm, (1, HIDDEN) if one_row else (HIDDEN,), torch.float16, device)
    check_aligned("rms_input_weight", norm)
    q, k, v = weight_qkv.chunk(3)
    return AttentionWeights(norm.view(-1), q, k, v, weight_o, order)


def check_cached(device: torch.device, k_cache: Tensor, v_cache: Tensor) -> None:
    """Two caches that hold the cached tokens and no others."""
    needed = f"[cached tokens, {HIDDEN}]"
    require_dense("k_cache", k_cache, f"a tensor {needed}")
    shape = list(k_cache.shape)
    require("k_cache", f"of shape {shape}", len(shape) == 2 and shape[1] == HIDDEN, needed)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        require_tensor(name, cache, (shape[0], HIDDEN), torch.float16, device)
        check_aligned(name, cache)


def by_heads(cache: Tensor) -> Tensor:
    """A cache [tokens, hidden] as [heads, tokens, head_dim]."""
    return cache.unflatten(1, (HEADS, HEAD_DIM)).transpose(0, 1)


def check_angles(device: torch.device, cos: Tensor, sin: Tensor, widths: tuple[int, ...]) -> None:
    needed = " or ".join(f"[1, {width}]" for width in widths)
    require_dense("cos", cos, f"a tensor {needed}")
    shape = list(cos.shape)
    require("cos", f"of shape {shape}", shape in [[1, width] for width in widths], needed)
    for name, table in (("cos", cos), ("sin", sin)):
        require_tensor(name, table, (1, shape[1]), torch.float32, device)


def check_written(name: str, written: Tensor, **others: Tensor) -> None:
    """That the call may write a contiguous tensor, and that this changes none of the others, contiguous ones too."""
    if written.is_inference() and not torch.is_inference_mode_enabled():
        raise ArgumentError(f"{name} was made in inference mode; it must be used there, or be made outside")
    start, end = _bytes_of(written)
    for other_name, other in others.items():
        first, last = _bytes_of(other)
        if max(first, start) < min(last, end):
            raise ArgumentError(
                f"{name} shares memory with {other_name}, and the call writes it; it must have memory of its own: clone it"
            )


def _bytes_of(tensor: Tensor) -> tuple[int, int]:
    start = tensor.data_ptr()
    return start, start + tensor.numel() * tensor.element_size()
