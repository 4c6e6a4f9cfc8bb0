"""Kernels loaded on a GPU and launched on PyTorch's current stream."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from clusterfusion.errors import ArgumentError, DeviceError
from clusterfusion.jit.cache import default_cache
from clusterfusion.jit.compiler import CompiledProgram, KernelSource
from clusterfusion.jit.device import device_limits
from clusterfusion.jit.resources import KernelResources

if TYPE_CHECKING:
    import torch

_DYNAMIC_SHARED_BYTES_WITHOUT_OPT_IN = 48 * 1024
_PORTABLE_CLUSTER_SIZE = 8

# One argument of a kernel: a tensor or None becomes a pointer; numbers come as ctypes, which fixes their width.
KernelArgument = Any


@dataclass(frozen=True)
class LaunchShape:
    """One launch: `clusters` clusters of `cluster_size` CTAs of `threads` threads, all along x.

    A cooperative launch guarantees that all CTAs are resident together, or is refused.
    """

    clusters: int
    threads: int
    cluster_size: int = 1
    dynamic_shared_bytes: int = 0
    cooperative: bool = False


class LoadedKernel:
    """One instance on one device. Made by `load_kernel`."""

    def __init__(self, instance: str, handle: Any, resources: KernelResources, device_index: int) -> None:
        self.instance = instance
        self.resources = resources
        self.device_index = device_index
        self._handle = handle
        self._prepared: set[LaunchShape] = set()

    def launch(self, shape: LaunchShape, *arguments: KernelArgument) -> None:
        """Launches on the current PyTorch stream of the kernel's device, and returns without waiting for it.

        Raises ArgumentError for an argument without a fixed width; DeviceError for a shape that does not fit.
        """
        import torch
        from cuda.core import Stream, launch

        if shape.clusters == 0:
            return
        values = [_kernel_argument(self.instance, argument) for argument in arguments]
        with torch.cuda.device(self.device_index):
            self._prepare(shape)
            stream = Stream.from_handle(torch.cuda.current_stream(self.device_index).cuda_stream)
            launch(stream, _config(shape), self._handle, *values)

    def prepare(
        self, shape: LaunchShape, arguments: ctypes.Structure, *, overlaps_previous: bool = False
    ) -> Callable[[], None]:
        """A launch with one struct passed by value, to be repeated at little cost, also while a graph is captured.

        The struct is copied at each launch, so its fields may be changed between launches. With `overlaps_previous` the
        launch may start before the one ahead of it on the stream has ended (programmatic dependent launch); the kernel
        itself waits where it has to. Raises as `launch` does.
        """
        import torch
        from cuda.bindings import driver

        with torch.cuda.device(self.device_index):
            self._prepare(shape)
        cluster, cooperative, overlap = (driver.CUlaunchAttribute() for _ in range(3))
        cluster.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        cluster.value.clusterDim.x = shape.cluster_size
        cluster.value.clusterDim.y = cluster.value.clusterDim.z = 1
        cooperative.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
        cooperative.value.cooperative = int(shape.cooperative)
        overlap.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        overlap.value.programmaticStreamSerializationAllowed = 1
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = shape.clusters * shape.cluster_size, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = shape.threads, 1, 1
        config.sharedMemBytes = shape.dynamic_shared_bytes
        config.attrs = [cluster, cooperative] + [overlap] * overlaps_previous
        config.numAttrs = len(config.attrs)
        function = driver.CUfunction(int(self._handle.handle))  # the driver takes a CUkernel in a CUfunction's place
        addresses = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        parameters = ctypes.addressof(addresses)
        index = self.device_index

        def launch_prepared(keep: tuple[Any, ...] = (addresses, arguments)) -> None:
            # A null stream means the current context's, so the kernel's device has to be the current one.
            with torch.cuda.device(index):
                config.hStream = torch.cuda.current_stream(index).cuda_stream
                (status,) = driver.cuLaunchKernelEx(config, function, parameters, 0)
            if status != driver.CUresult.CUDA_SUCCESS:
                raise DeviceError(f"{self.instance}: the driver refuses the launch: {status.name}")

        return launch_prepared

    def require_room(self, shape: LaunchShape) -> None:
        """Raise DeviceError unless the device takes a launch of this shape, all CTAs of a cooperative one together."""
        import torch

        with torch.cuda.device(self.device_index):
            self._prepare(shape)

    def max_active_clusters(self, shape: LaunchShape) -> int:
        """How many clusters of this shape the device can hold at once, from the driver's occupancy calculator."""
        import torch

        with torch.cuda.device(self.device_index):
            self._raise_limits(shape)
            return self._max_active_clusters(shape)

    def _max_active_clusters(self, shape: LaunchShape) -> int:
        import torch
        from cuda.core import Device, Stream

        Device(self.device_index).set_current()
        stream = Stream.from_handle(torch.cuda.current_stream(self.device_index).cuda_stream)
        return int(self._handle.occupancy.max_active_clusters(_config(shape), stream=stream))

    def _prepare(self, shape: LaunchShape) -> None:
        if shape in self._prepared:
            return
        limits = device_limits(self.device_index)
        shared = shape.dynamic_shared_bytes + self.resources.static_shared_bytes
        if shared > limits.shared_bytes_per_block:
            raise DeviceError(
                f"{self.instance} asks for {shared} bytes of shared memory a block; {limits.name} has "
                f"{limits.shared_bytes_per_block}"
            )
        self._raise_limits(shape)
        if shape.cooperative:
            resident = self._max_active_clusters(shape)
            if shape.clusters > resident:
                raise DeviceError(
                    f"{self.instance} needs {shape.clusters} clusters of {shape.cluster_size} CTAs resident together; "
                    f"{limits.name} holds {resident} now"
                )
        self._prepared.add(shape)

    def _raise_limits(self, shape: LaunchShape) -> None:
        """Tells the driver about what a kernel may not use without asking."""
        from cuda.bindings import driver

        attribute = driver.CUfunction_attribute
        wanted = []
        if shape.dynamic_shared_bytes + self.resources.static_shared_bytes > _DYNAMIC_SHARED_BYTES_WITHOUT_OPT_IN:
            wanted.append((attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shape.dynamic_shared_bytes))
        if shape.cluster_size > _PORTABLE_CLUSTER_SIZE:
            wanted.append((attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1))
        for name, value in wanted:
            (status,) = driver.cuKernelSetAttribute(name, value, self._handle.handle, self.device_index)
            if status != driver.CUresult.CUDA_SUCCESS:
                raise DeviceError(f"{self.instance}: the driver refuses {name.name} = {value}: {status.name}")


@functools.cache
def load_kernel(source: KernelSource, instance: str, device_index: int) -> LoadedKernel:
    """`instance` of `source`, compiled for CUDA device `device_index` through the cache, and loaded; once a process.

    Raises CompileError and DeviceError as `compile_program` and `device_limits` do.
    """
    program, code = _load_program(source, device_limits(device_index).architecture)
    return LoadedKernel(instance, code.get_kernel(program.symbols[instance]), program.resources[instance], device_index)


@functools.cache
def _load_program(source: KernelSource, architecture: str) -> tuple[CompiledProgram, Any]:
    """The program and its cuda.core.ObjectCode, which loads itself on every device that one of its kernels runs on."""
    from cuda.core import ObjectCode

    program = default_cache().get(source, architecture)
    return program, ObjectCode.from_cubin(program.cubin, name=source.program)


def _config(shape: LaunchShape) -> Any:
    from cuda.core import LaunchConfig

    # With a cluster, cuda.core counts the grid in clusters.
    return LaunchConfig(
        grid=(shape.clusters, 1, 1),
        cluster=(shape.cluster_size, 1, 1) if shape.cluster_size > 1 else None,
        block=(shape.threads, 1, 1),
        shmem_size=shape.dynamic_shared_bytes,
        is_cooperative=shape.cooperative,
    )


def _kernel_argument(instance: str, argument: torch.Tensor | ctypes._SimpleCData[Any] | None) -> Any:
    if argument is None:
        return 0  # a null pointer: cuda.core passes an int as 8 bytes
    if isinstance(argument, ctypes._SimpleCData):
        return argument
    if hasattr(argument, "data_ptr"):
        return argument.data_ptr()
    raise ArgumentError(
        f"argument {argument!r} of {instance} is a {type(argument).__name__}; it must be a tensor, None or a ctypes number"
    )
