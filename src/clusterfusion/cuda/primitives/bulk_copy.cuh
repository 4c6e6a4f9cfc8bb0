// Bulk copies from global to shared memory that complete on an mbarrier of this CTA.
#pragma once

#include <cuda/ptx>
#include <cuda/std/cstdint>

#include "primitives/mbarrier.cuh"

namespace clusterfusion {

// Weights are read once a step and K/V once: both leave the L2 first. The encoded form of an evict-first policy.
constexpr cuda::std::uint64_t kEvictFirst = 0x12F0000000000000ull;

// Copies `bytes` to `shared`; they count at `barrier` on arrival. One thread issues. libcu++ has no form with a cache
// policy for this instruction. Its destination is shared::cta, not shared::cluster, for which code for sm_120 would look
// whether the address is a peer's and call an emulation.
__device__ __forceinline__ void bulk_copy(SharedAddress shared, const void* global, unsigned bytes, SharedAddress barrier) {
  asm volatile(
      "cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(shared),
      "l"(global), "r"(bytes), "r"(barrier), "l"(kEvictFirst)
      : "memory");
}

// Orders this thread's later copies behind what it has seen written by ordinary stores.
__device__ __forceinline__ void async_proxy_fence() { asm volatile("fence.proxy.async;" ::: "memory"); }

// A tensor map (CUtensorMap), encoded by the driver on the host; a kernel gets it as a __grid_constant__ parameter.
struct alignas(128) TensorMap {
  char opaque[128];
};

// Copies the box of `map` whose first element is (c0, c1, c2), innermost first. What lies outside the tensor is filled with
// zeros; all of the box counts at `barrier`. `shared` is aligned to 128 bytes. One thread issues.
__device__ __forceinline__ void tensor_copy(
    SharedAddress shared, const TensorMap* map, int c0, int c1, int c2, SharedAddress barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cta.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(shared),
      "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(barrier), "l"(kEvictFirst)
      : "memory");
}

}  // namespace clusterfusion
