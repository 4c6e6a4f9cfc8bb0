// Dependencies between the CTAs of a grid whose CTAs are all resident: counters in global memory that only grow.
#pragma once

#include <cuda/std/cstdint>

#include "primitives/mbarrier.cuh"

namespace clusterfusion {

constexpr unsigned kSpinNanoseconds = 100;  // 0 cost the whole-step prototype 2% of its bandwidth, 40 the step 0.3%

// Releases this thread's earlier writes, and those of threads it has synchronised with, to the whole GPU.
__device__ __forceinline__ void grid_arrive(unsigned* counter) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}

// Counts without releasing anything; the end of the launch makes it visible.
__device__ __forceinline__ void grid_count(unsigned* counter) {
  asm volatile("red.relaxed.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}

__device__ __forceinline__ unsigned load_acquire(const unsigned* counter) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}

// Waits until `counter` has reached `target`; counters may wrap. False when kWaitLimitClocks have passed.
__device__ __forceinline__ bool grid_wait(const unsigned* counter, unsigned target) {
  const auto met = [&] { return static_cast<int>(load_acquire(counter) - target) >= 0; };
  if (met()) return true;
  const long long start = clock64();
  bool done = false;
  while (!(done = met()) && clock64() - start < kWaitLimitClocks) __nanosleep(kSpinNanoseconds);
  return done;
}

}  // namespace clusterfusion
