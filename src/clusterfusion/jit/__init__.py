"""CUDA kernels compiled at run time: sources -> specialisation -> NVRTC -> cache -> load -> launch.

Nothing here imports `cuda` or `torch` before it is needed: compiling needs cuda-core and NVRTC but no GPU, and only
launching needs a GPU and PyTorch.

`sources`     the CUDA files of the package, and everything that one of them includes
`toolchain`   NVRTC and the libcu++ headers on this machine
`compiler`    a program and the template instances wanted of it -> cubin
`resources`   registers, spills, stack and shared memory of each kernel
`cache`       compiled programs, in memory and on disk, shared by processes
`device`      facts about the GPU
`launch`      a kernel, loaded and launched on PyTorch's current stream
Modules named after a program in `cuda/programs/` are its host twin: they choose and name its instances.
"""
