"""Tensor maps: what a GPU's copy engine needs to know of a tensor to fetch boxes of it with one instruction each."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

from clusterfusion.errors import DeviceError

TensorMap = ctypes.c_byte * 128  # the struct of that name in cuda/primitives/bulk_copy.cuh
_ALIGNMENT = 128
_INTRODUCED_IN = 12000  # CUDA version
# CUtensorMapDataType and the default CUtensorMapInterleave, -Swizzle, -L2promotion and -FloatOOBfill.
_DATA_TYPES = {"float16": 6, "bfloat16": 9}
_NONE = 0


@functools.lru_cache(maxsize=4096)  # a map says where a tensor lies, not what is in it: the same facts, the same map
def encode_tensor_map(
    element_type: str, address: int, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]
) -> bytes:
    """A map of float16 or bfloat16 elements at `address`, as the bytes of a TensorMap.

    `sizes` and `box` in elements, innermost dimension first; `strides` in bytes, of all dimensions but the innermost,
    which is dense. Address and strides are multiples of 16 bytes, a box is at most 256 long on every side. Raises
    DeviceError if the driver refuses.
    """
    rank = len(sizes)
    buffer = (ctypes.c_byte * (ctypes.sizeof(TensorMap) + _ALIGNMENT))()
    start = -ctypes.addressof(buffer) % _ALIGNMENT
    status = _encoder()(
        ctypes.addressof(buffer) + start,
        _DATA_TYPES[element_type],
        rank,
        address,
        (ctypes.c_uint64 * rank)(*sizes),
        (ctypes.c_uint64 * rank)(*strides),
        (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*[1] * rank),
        *[_NONE] * 4,
    )
    if status:
        raise DeviceError(
            f"the driver refuses a tensor map of sizes {sizes}, strides {strides}, box {box}: error {status}"
        )
    return bytes(buffer)[start : start + ctypes.sizeof(TensorMap)]


@functools.cache
def _encoder() -> Any:
    """The driver's cuTensorMapEncodeTiled. cuda.bindings wraps it, but around a struct that it does not align."""
    from cuda.bindings import driver

    status, address, _ = driver.cuGetProcAddress(b"cuTensorMapEncodeTiled", _INTRODUCED_IN, 0)
    if status != driver.CUresult.CUDA_SUCCESS or not address:
        raise DeviceError(f"the driver has no cuTensorMapEncodeTiled ({status.name}): it is older than CUDA 12")
    pointer, word = ctypes.c_void_p, ctypes.c_uint32
    encode = ctypes.CFUNCTYPE(ctypes.c_int, pointer, word, word, pointer, *[pointer] * 4, *[word] * 4)
    return encode(int(address))
