"""Facts about the GPU that decide what can be compiled for it and how much fits."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from clusterfusion.errors import DeviceError

# Compute capabilities with clusters, distributed shared memory and bulk copies. Code for "sm_90a" runs on exactly 9.0.
SUPPORTED_CAPABILITIES = ((9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1))


@dataclass(frozen=True)
class DeviceLimits:
    """What a GPU offers. Shared memory and L2 in bytes; `shared_bytes_per_block` is the most a block can opt in to.

    How many clusters are resident together depends on the kernel as well: `launch.LoadedKernel.max_active_clusters`.
    """

    name: str
    compute_capability: tuple[int, int]
    multiprocessors: int
    shared_bytes_per_block: int
    shared_bytes_per_multiprocessor: int
    registers_per_multiprocessor: int
    l2_bytes: int
    cooperative_launch: bool
    cluster_launch: bool

    @property
    def architecture(self) -> str:
        """The compiler's name for this device, e.g. "sm_90a". Raises DeviceError for one that is not supported."""
        return architecture_of(self.compute_capability, self.name)


def architecture_of(compute_capability: tuple[int, int], name: str = "the GPU") -> str:
    """The compiler's name for a compute capability. Raises DeviceError unless it is in SUPPORTED_CAPABILITIES."""
    if compute_capability not in SUPPORTED_CAPABILITIES:
        supported = ", ".join(f"{major}.{minor}" for major, minor in SUPPORTED_CAPABILITIES)
        raise DeviceError(
            f"{name} has compute capability {compute_capability[0]}.{compute_capability[1]}; the kernels need one of "
            f"{supported} (Hopper or Blackwell). The same functions run on CPU tensors anywhere"
        )
    return f"sm_{compute_capability[0]}{compute_capability[1]}a"


@functools.cache
def device_limits(index: int = 0) -> DeviceLimits:
    """Facts of CUDA device `index`, asked of the driver. Raises DeviceError without cuda-core, a driver or that GPU."""
    from clusterfusion.jit.toolchain import INSTALL_HINT

    try:
        from cuda.core import Device
    except ImportError as error:
        raise DeviceError(f"the kernels need cuda-core and cuda-bindings ({error}): {INSTALL_HINT}") from error
    try:
        device = Device(index)
        properties = device.properties
        return DeviceLimits(
            name=device.name,
            compute_capability=(properties.compute_capability_major, properties.compute_capability_minor),
            multiprocessors=properties.multiprocessor_count,
            shared_bytes_per_block=properties.max_shared_memory_per_block_optin,
            shared_bytes_per_multiprocessor=properties.max_shared_memory_per_multiprocessor,
            registers_per_multiprocessor=properties.max_registers_per_multiprocessor,
            l2_bytes=properties.l2_cache_size,
            cooperative_launch=properties.cooperative_launch,
            cluster_launch=properties.cluster_launch,
        )
    except Exception as error:  # which type depends on whether the library, the driver or the device is missing
        raise DeviceError(
            f"no CUDA device {index}: {type(error).__name__}: {error}. Is the NVIDIA driver there?"
        ) from error


def is_device_memory(address: int, device_index: int) -> bool:
    """Whether an address lies in memory of CUDA device `device_index`, as the driver tells it."""
    import torch
    from cuda.bindings import driver

    attribute = driver.CUpointer_attribute
    wanted = (attribute.CU_POINTER_ATTRIBUTE_MEMORY_TYPE, attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL)
    with torch.cuda.device(device_index):
        answers = [driver.cuPointerGetAttribute(name, address) for name in wanted]
    if any(status != driver.CUresult.CUDA_SUCCESS for status, _ in answers):
        return False  # an address that no allocation of CUDA's has
    kind, ordinal = (int(value) for _, value in answers)
    return kind == int(driver.CUmemorytype.CU_MEMORYTYPE_DEVICE) and ordinal == device_index
