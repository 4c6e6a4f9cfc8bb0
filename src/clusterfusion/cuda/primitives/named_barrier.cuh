// Barriers among some of a CTA's warps.
#pragma once

namespace clusterfusion {

constexpr int kNamedBarriers = 16;  // a CTA has so many; number 0 is __syncthreads

// Waits for kThreads threads of this CTA at barrier kId. The unaligned form, since lanes may come from a wait loop.
template <int kId, int kThreads>
__device__ __forceinline__ void named_barrier_sync() {
  static_assert(kId > 0 && kId < kNamedBarriers, "barrier 0 belongs to __syncthreads");
  static_assert(kThreads % 32 == 0, "barriers count whole warps");
  asm volatile("barrier.sync %0, %1;" ::"n"(kId), "n"(kThreads) : "memory");
}

}  // namespace clusterfusion
