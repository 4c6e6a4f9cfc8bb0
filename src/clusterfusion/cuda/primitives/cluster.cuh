// Thread block clusters: who am I, where is a peer's shared memory, and the hardware's cluster barrier.
#pragma once

#include <cuda/ptx>

namespace clusterfusion {

// Rank of this CTA in its cluster, 0 to cluster size - 1.
__device__ __forceinline__ unsigned cluster_rank() { return cuda::ptx::get_sreg_cluster_ctarank(); }

// Generic address of `local`, an object in this CTA's shared memory, in the shared memory of the CTA of rank `rank`.
// Plain loads and stores through it are DSMEM accesses. Needs the same shared memory layout in every CTA.
// No memory clobber and not volatile: mapa computes an address and reads no memory. libcu++ has no wrapper for it.
template <typename T>
__device__ __forceinline__ T* map_shared(T* local, unsigned rank) {
  T* remote;
  asm("mapa.u64 %0, %1, %2;" : "=l"(remote) : "l"(local), "r"(rank));
  return remote;
}

// Arrival of this thread at the cluster's hardware barrier; releases its earlier writes to the whole cluster.
// Every thread of every CTA takes part: a kernel whose warps have roles uses an mbarrier instead (PartialTeam).
__device__ __forceinline__ void cluster_arrive() { cuda::ptx::barrier_cluster_arrive(cuda::ptx::sem_release); }

// The same without releasing anything: for a barrier that is only to be passed together.
__device__ __forceinline__ void cluster_arrive_relaxed() { cuda::ptx::barrier_cluster_arrive(cuda::ptx::sem_relaxed); }

// Waits for every thread of the cluster to have arrived; acquires what they released.
__device__ __forceinline__ void cluster_wait() { cuda::ptx::barrier_cluster_wait(cuda::ptx::sem_acquire); }

}  // namespace clusterfusion
