// mbarrier objects in shared memory, one function an instruction.
#pragma once

#include <cuda/ptx>
#include <cuda/std/cstdint>

namespace clusterfusion {

// Clocks after which a wait gives up: about 9 s at 1.98 GHz. A wait that is met takes microseconds.
constexpr long long kWaitLimitClocks = 1LL << 34;

// One thread sets the number of arrivals that complete a phase; mbarrier_init_fence and a cluster barrier follow.
__device__ __forceinline__ void mbarrier_init(cuda::std::uint64_t* barrier, unsigned arrivals) {
  cuda::ptx::mbarrier_init(barrier, arrivals);
}

// Makes this thread's mbarrier_init visible to the cluster, once a cluster barrier has been passed.
__device__ __forceinline__ void mbarrier_init_fence() {
  cuda::ptx::fence_mbarrier_init(cuda::ptx::sem_release, cuda::ptx::scope_cluster);
}

// Arrives at a barrier of this CTA; releases to the CTA.
__device__ __forceinline__ void mbarrier_arrive_local(cuda::std::uint64_t* barrier) {
  cuda::ptx::mbarrier_arrive(barrier);
}

// This thread arrives once at `barrier` and announces `bytes` that copies will bring.
__device__ __forceinline__ void mbarrier_arrive_expect(cuda::std::uint64_t* barrier, unsigned bytes) {
  cuda::ptx::mbarrier_arrive_expect_tx(
      cuda::ptx::sem_release, cuda::ptx::scope_cta, cuda::ptx::space_shared, barrier, bytes);
}

// A place in this CTA's shared memory as 32 bits, for whoever needs it again and again: computed here and kept. From a pointer it is
// computed anew at each use.
using SharedAddress = unsigned;
__device__ __forceinline__ SharedAddress shared_address(const void* pointer) {
  SharedAddress address = static_cast<SharedAddress>(__cvta_generic_to_shared(pointer));
  asm volatile("" : "+r"(address));
  return address;
}
__device__ __forceinline__ void mbarrier_arrive_expect(SharedAddress barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void mbarrier_wait_local(SharedAddress barrier, unsigned parity) {
  for (unsigned met = 0; met == 0;) {
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(met)
                 : "r"(barrier), "r"(parity)
                 : "memory");
  }
}

// Whether the phase of parity `parity` of a barrier of this CTA is over.
__device__ __forceinline__ bool mbarrier_is_over(SharedAddress barrier, unsigned parity) {
  unsigned over;
  asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
               : "=r"(over)
               : "r"(barrier), "r"(parity)
               : "memory");
  return over != 0;
}

// Waits for the phase of parity `parity` of a barrier that only this CTA uses. Not bounded: a phase of the ring waits
// for copies and for this CTA's own warps, never for another CTA.
__device__ __forceinline__ void mbarrier_wait_local(cuda::std::uint64_t* barrier, unsigned parity) {
  while (!cuda::ptx::mbarrier_try_wait_parity(barrier, parity)) {
  }
}

// Arrives at a barrier in any CTA of the cluster (an address from map_shared); releases to the cluster.
__device__ __forceinline__ void mbarrier_arrive_cluster(cuda::std::uint64_t* mapped_barrier) {
  cuda::ptx::mbarrier_arrive(
      cuda::ptx::sem_release, cuda::ptx::scope_cluster, cuda::ptx::space_cluster, mapped_barrier);
}

// Stores a 32-bit value, or four of them in 16 bytes, in a peer's shared memory; its bytes count at `mapped_barrier`, an mbarrier there, with
// which it is seen. Both addresses from map_shared, of the same CTA.
template <typename T>
__device__ __forceinline__ void mbarrier_store(T* mapped, T value, cuda::std::uint64_t* mapped_barrier) {
  static_assert(sizeof(T) == 4, "32 bits");
  cuda::ptx::st_async(mapped, value, mapped_barrier);
}
__device__ __forceinline__ void mbarrier_store(float4* mapped, float4 value, cuda::std::uint64_t* mapped_barrier) {
  const float values[4] = {value.x, value.y, value.z, value.w};
  cuda::ptx::st_async(&mapped->x, values, mapped_barrier);
}

// Waits for the phase of parity `parity` of a barrier in this CTA to complete; acquires from the cluster.
// False when kWaitLimitClocks have passed: the caller reports it, and nothing it waited for may be used.
// Phase n and phase n + 2 share a parity: the caller must see to it that n + 1 cannot complete before it has left here.
__device__ __forceinline__ bool mbarrier_wait_cluster(cuda::std::uint64_t* barrier, unsigned parity) {
  const auto met = [&] {
    return cuda::ptx::mbarrier_try_wait_parity(cuda::ptx::sem_acquire, cuda::ptx::scope_cluster, barrier, parity);
  };
  if (met()) return true;
  const long long start = clock64();
  bool done = false;
  while (!(done = met()) && clock64() - start < kWaitLimitClocks) {
  }
  return done;
}

}  // namespace clusterfusion
