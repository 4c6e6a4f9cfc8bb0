// Teams: which threads of a cluster take part in a collective, and how they wait for one another.
//
// A team offers   cluster_size, threads (of this CTA in the team), rank(), thread(), and two barriers over its members:
//   block_sync()    those of this CTA;
//   cluster_sync()  those of the whole cluster; orders shared memory and DSMEM writes before it against reads after it.
// Every member calls them the same number of times, in the same order.
//
// Before the first collective of a kernel every thread of every CTA passes one hardware cluster barrier
// (cluster_arrive, cluster_wait), because a CTA that has not started yet has no shared memory to write to.
#pragma once

#include "collectives/exchange.cuh"
#include "primitives/cluster.cuh"
#include "primitives/mbarrier.cuh"
#include "primitives/named_barrier.cuh"

namespace clusterfusion {

// All threads of all CTAs. Barriers: __syncthreads (barrier 0) and the hardware cluster barrier.
template <int kClusterSize, int kThreads>
class WholeTeam {
 public:
  static_assert(is_cluster_size(kClusterSize), "clusters of 1, 2, 4 or 8 CTAs");
  static constexpr int cluster_size = kClusterSize;
  static constexpr int threads = kThreads;

  __device__ __forceinline__ unsigned rank() const { return kClusterSize == 1 ? 0 : cluster_rank(); }
  __device__ __forceinline__ int thread() const { return threadIdx.x; }
  __device__ __forceinline__ bool expired() const { return false; }  // the hardware barrier has no limit
  __device__ __forceinline__ void block_sync() { __syncthreads(); }
  __device__ __forceinline__ void cluster_sync() {
    if constexpr (kClusterSize == 1) {
      __syncthreads();
    } else {
      cluster_arrive();
      cluster_wait();
    }
  }
};

// Threads kFirstThread to kFirstThread + kThreads - 1 of every CTA, whole warps: for kernels in which other warps, say
// a producer that runs ahead, never stop. Barriers: named barrier kNamedBarrier, and one mbarrier a CTA (Scratch).
//
// Each member arrives at every CTA's mbarrier and releases its own writes. One arrival for all would do in the memory model;
// racecheck does not follow it.
// The mbarrier completes a phase when all members have arrived. Its parity is safe: a CTA's members arrive for phase n + 1
// only after all of its members left phase n, and phase n + 1 needs them, so no member can find phase n + 1 complete while
// it still waits for n. The last wait of a CTA ends after the last arrival at its mbarrier, so a CTA may exit after any
// cluster_sync.
template <int kClusterSize, int kThreads, int kFirstThread, int kNamedBarrier>
class PartialTeam {
 public:
  static_assert(is_cluster_size(kClusterSize), "clusters of 1, 2, 4 or 8 CTAs");
  static_assert(kThreads % 32 == 0 && kFirstThread % 32 == 0, "a team is made of whole warps");
  static constexpr int cluster_size = kClusterSize;
  static constexpr int threads = kThreads;

  struct Scratch {
    cuda::std::uint64_t arrived;
  };

  // One thread of each CTA, before the kernel's first cluster barrier.
  static __device__ __forceinline__ void init(Scratch& scratch) {
    mbarrier_init(&scratch.arrived, kClusterSize * kThreads);
    mbarrier_init_fence();
  }

  // Every member makes its own, once in a kernel: the object holds the parity of the phase to wait for.
  __device__ __forceinline__ explicit PartialTeam(Scratch& scratch) : scratch_(scratch) {}

  __device__ __forceinline__ unsigned rank() const { return kClusterSize == 1 ? 0 : cluster_rank(); }
  __device__ __forceinline__ int thread() const { return static_cast<int>(threadIdx.x) - kFirstThread; }
  // A wait ran out (kWaitLimitClocks): what the collectives returned since is meaningless; report it and return.
  __device__ __forceinline__ bool expired() const { return expired_; }
  __device__ __forceinline__ void block_sync() { named_barrier_sync<kNamedBarrier, kThreads>(); }
  __device__ __forceinline__ void cluster_sync() {
    block_sync();
    if constexpr (kClusterSize > 1) {
      // An arrival that releases to the cluster waits for a fence of the whole GPU: one for each peer, none for itself.
      mbarrier_arrive_local(&scratch_.arrived);
#pragma unroll
      for (unsigned other = 1; other < kClusterSize; other++) {
        mbarrier_arrive_cluster(map_shared(&scratch_.arrived, rank() ^ other));
      }
      // Having given up once, do not spend the limit again at every later barrier.
      if (!expired_) expired_ = !mbarrier_wait_cluster(&scratch_.arrived, parity_);
      parity_ ^= 1;
    }
  }

 private:
  Scratch& scratch_;
  unsigned parity_ = 0;
  bool expired_ = false;
};

}  // namespace clusterfusion
