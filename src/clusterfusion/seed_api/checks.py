"""The two shapes of the seed, and what its functions ask of their arguments, by the seed's names for them."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from clusterfusion.architecture import DecoderConfig
from clusterfusion.arguments import index_of, require, require_dense, require_not_negated, shown
from clusterfusion.errors import ArgumentError
from clusterfusion.named_shapes import named_shape
from clusterfusion.ops.layer_checks import require_tensor
from clusterfusion.ops.layer_launch import ALIGNMENT


@dataclasses.dataclass(frozen=True)
class Shape:
    """One of the two models."""

    name: str  # of its functions: what they start with
    config: DecoderConfig

    @functools.cached_property
    def sizes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of tensors by the seed's names. Those of one dimension may also come as [1, n]."""
        h, i, d = self.config.hidden_size, self.config.intermediate_size, self.config.head_dim
        vectors = ("bias_o", "ln_weight", "ln_bias", "post_ln_weight", "post_ln_bias", "mlp_down_bias")
        return {
            "weight_qkv": (3 * h, h),
            "bias_qkv": (3 * h,),
            "weight_o": (h, h),
            "mlp_up_weight": (i, h),
            "mlp_up_bias": (i,),
            "mlp_down_weight": (h, i),
            "mlp_intermediate": (i,),
            **dict.fromkeys(vectors, (h,)),
            **dict.fromkeys(("input", "attn_output"), (1, h)),
            **dict.fromkeys(("cos", "sin"), (1, d)),
        }

    @property
    def sequential(self) -> DecoderConfig:
        """The model whose program has segments that end before and after the MLP's hidden vector."""
        return dataclasses.replace(self.config, parallel_residual=False)

    def by_heads(self, cache: Tensor) -> Tensor:
        """A cache [max_len, hidden] as [heads, max_len, head_dim]."""
        return cache.unflatten(1, (self.config.num_heads, self.config.head_dim)).transpose(0, 1)


PYTHIA_2B8 = Shape("pythia_2b8", named_shape("pythia-2.8b"))
PYTHIA_6B9 = Shape("pythia_6b9", named_shape("pythia-6.9b"))


def device_of(name: str, tensor: object) -> torch.device:
    """Where the argument that decides it lies."""
    require_dense(name, tensor, "a CPU or CUDA tensor")
    assert isinstance(tensor, Tensor)
    require(name, f"on {tensor.device}", tensor.device.type in ("cpu", "cuda"), "a CPU or CUDA tensor")
    require_not_negated(name, tensor)
    return tensor.device


def check(shape: Shape, device: torch.device, **tensors: object) -> None:
    for name, tensor in tensors.items():
        size = shape.sizes[name]
        dtype = torch.float32 if name in ("cos", "sin") else torch.float16
        # A nested tensor may not have a shape.
        if len(size) == 1 and isinstance(tensor, Tensor) and not tensor.is_nested and tensor.dim() == 2:
            size = (1, *size) if tensor.shape[0] == 1 else size
        # Most calls pass: the messages, which cost more than the check, are made for those that do not.
        if not (
            isinstance(tensor, Tensor)
            and not tensor.is_nested
            and tensor.shape == size
            and tensor.dtype == dtype
            and tensor.device == device
            and tensor.layout == torch.strided
            and tensor.is_contiguous()
            and not tensor.is_neg()
        ):
            require_tensor(name, tensor, size, dtype, device)
        elif "weight" in name or "bias" in name:
            check_aligned(name, tensor)


def check_aligned(name: str, tensor: Tensor) -> None:
    if tensor.device.type == "cuda" and tensor.data_ptr() % ALIGNMENT:
        raise ArgumentError(
            f"{name} is at address {tensor.data_ptr():#x}; it must be at a multiple of {ALIGNMENT} bytes: clone it"
        )


def check_caches(shape: Shape, device: torch.device, k_cache: object, v_cache: object) -> None:
    hidden = shape.config.hidden_size
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        require_dense(name, cache, f"a tensor [max_len, {hidden}]")
        assert isinstance(cache, Tensor)
        size, strides = list(cache.shape), cache.stride()
        require(name, f"of shape {size}", len(size) == 2 and size[0] > 0 and size[1] == hidden, f"[max_len, {hidden}]")
        require(name, cache.dtype, cache.dtype == torch.float16, "torch.float16")
        require(name, f"on {cache.device}", cache.device == device, f"on {device}")
        rows_ok = strides[0] >= hidden and strides[0] * cache.element_size() % ALIGNMENT == 0
        require(
            name,
            f"of strides {strides}",
            strides[1] == 1 and rows_ok,
            f"of dense rows, whole multiples of {ALIGNMENT} bytes apart",
        )
        check_aligned(name, cache)
        require_not_negated(name, cache)
    assert isinstance(k_cache, Tensor) and isinstance(v_cache, Tensor)
    seen, needed = ((list(t.shape), t.stride()) for t in (v_cache, k_cache))
    require("v_cache", "of shape {} and strides {}".format(*seen), seen == needed, f"laid out as k_cache is: {needed}")


def checked_position(current_seq_len: object, max_len: int, device: torch.device) -> int | Tensor:
    """An int in range, or an int32 tensor on a GPU, whose value is not looked at."""
    value, needed = current_seq_len, f"an int from 0 to {max_len - 1}, or an int32 tensor of one element on {device}"
    if isinstance(value, Tensor):
        require_dense("current_seq_len", value)
        seen = f"a {value.dtype} tensor of shape {list(value.shape)} on {value.device}"
        ok = value.numel() == 1 and value.dtype == torch.int32 and value.device == device
        require("current_seq_len", seen, ok, needed)
        require_not_negated("current_seq_len", value)
        if device.type == "cuda":
            return value
        value = value.item()
    number = index_of(value)
    if number is None or not 0 <= number < max_len:
        raise ArgumentError(f"current_seq_len is {shown(value)}; it must be {needed}")
    return number
