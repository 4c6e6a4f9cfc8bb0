"""Weights without a checkpoint: the same bits for the same seed, on any device and any PyTorch version.

PyTorch's generators differ between CPU and GPU, so the values come from an integer hash of (seed, tensor, element)
instead: Wellons' `lowbias32` mixer. Matrices are uniform with the standard deviation of the published models'
initialisation, norms scatter around one and biases around zero, so that no term of the mathematics is idle.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import torch
from torch import Tensor

from clusterfusion.architecture import DecoderConfig
from clusterfusion.errors import ArgumentError
from clusterfusion.weights import DecoderWeights, assemble, expected_tensors

MATRIX_STD = 0.02
_CHUNK = {"cpu": 1 << 17, "cuda": 1 << 24}  # elements; on the CPU the passes stay in cache
_MASK = 0xFFFFFFFF


def random_weights(
    config: DecoderConfig,
    *,
    seed: int = 0,
    dtype: torch.dtype,
    device: torch.device,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> DecoderWeights:
    """Weights of `config`'s shapes, reproducible from `seed` (0 … 2**32 - 1). Raises ArgumentError for another seed."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= _MASK:
        raise ArgumentError(f"seed is {seed!r}; it must be an integer from 0 to {_MASK}")
    tensors: dict[str, Tensor] = {}
    for name, shape in expected_tensors(config).items():
        if len(shape) == 2:
            centre, std = 0.0, MATRIX_STD
        elif "norm" in name and name.endswith("weight"):
            centre, std = 1.0, 0.1
        else:
            centre, std = 0.0, 0.05
        stream = _mix_int(_mix_int(seed) ^ zlib.crc32(name.encode()))
        tensors[name] = uniform(shape, centre, std, stream, dtype, device)
        on_bytes(tensors[name].nbytes)
    return assemble(config, tensors)


def uniform(
    shape: tuple[int, ...], centre: float, std: float, stream: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A tensor of independent uniform values with mean `centre` and standard deviation `std`."""
    out = torch.empty(shape, dtype=dtype, device=device)
    flat = out.view(-1)
    step = 2.0 * std * 3.0**0.5 / (1 << 24)
    chunk = _CHUNK.get(device.type, 1 << 20)
    for start in range(0, flat.numel(), chunk):
        index = torch.arange(start, min(start + chunk, flat.numel()), device=device)
        high = index >> 32
        bits = _mix(_mix(index.bitwise_and_(_MASK)).bitwise_xor_(high).bitwise_xor_(stream))
        values = (bits >> 8).sub_(1 << 23).to(torch.float32)  # 24 bits: exact
        flat[start : start + len(index)] = values.mul_(step).add_(centre)
    return out


def _mix(x: Tensor) -> Tensor:
    """lowbias32 in place, on an int64 tensor that holds 32-bit values."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x &= _MASK
    x ^= x >> 15
    x *= 0x846CA68B
    x &= _MASK
    x ^= x >> 16
    return x


def _mix_int(x: int) -> int:
    x ^= x >> 16
    x = (x * 0x7FEB352D) & _MASK
    x ^= x >> 15
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x >> 16)
