// ClusterGather: vectors, one a CTA, joined in rank order; every CTA gets all of them. Values are moved, never changed.
//
// Barriers of one exchange: cluster size 1, one team block_sync; direct, one team cluster_sync; tree, log2(cluster size)
// team cluster_syncs, step s forwarding the 2^s vectors held so far. Nothing else.
//
// Exit, reuse and back-to-back calls: as in cluster_reduce.cuh. Remote accesses are writes only, each before a
// cluster_sync that the written CTA waits for too; two inboxes, so that no trailing barrier is needed.
#pragma once

#include "collectives/exchange.cuh"
#include "primitives/cluster.cuh"

namespace clusterfusion {

template <typename T, int kLength, int kClusterSize, Exchange kExchange>
class ClusterGather {
 public:
  static_assert(is_cluster_size(kClusterSize), "clusters of 1, 2, 4 or 8 CTAs");
  static constexpr int kTotal = kClusterSize * kLength;

  // In shared memory, at the same offset in every CTA, given to one ClusterGather for as long as any CTA uses it.
  struct Scratch {
    alignas(16) T inbox[2][kTotal];
  };

  // Every member of the team makes its own; it holds which of the two inboxes is next.
  __device__ __forceinline__ explicit ClusterGather(Scratch& scratch) : scratch_(scratch) {}

  // mine(i) is this CTA's element i < kLength; it is called once, by the member with thread() == i % team.threads.
  template <typename Team, typename Mine>
  __device__ __forceinline__ void exchange(Team& team, Mine mine) {
    static_assert(Team::cluster_size == kClusterSize, "the team and the collective disagree about the cluster's size");
    buffer_ ^= 1;
    T* inbox = scratch_.inbox[buffer_];
    const unsigned rank = team.rank();
    for (int i = team.thread(); i < kLength; i += Team::threads) {
      T* slot = &inbox[rank * kLength + i];
      const T value = mine(i);
      *slot = value;
      if constexpr (kExchange == Exchange::direct) {
#pragma unroll
        for (unsigned other = 1; other < kClusterSize; other++) *map_shared(slot, rank ^ other) = value;
      } else if constexpr (kClusterSize > 1) {
        *map_shared(slot, rank ^ 1) = value;
      }
    }
    if constexpr (kClusterSize == 1) {
      team.block_sync();
    } else {
      team.cluster_sync();
      if constexpr (kExchange == Exchange::tree) forward(team, inbox, rank);
    }
  }

  // The vectors of all ranks, rank r's at r * kLength; for any member, until its next call of exchange.
  __device__ __forceinline__ const T* result() const { return scratch_.inbox[buffer_]; }

 private:
  // Steps 1 and up of the tree: the pair exchanges the groups of 2^step vectors that the steps before have joined.
  template <typename Team>
  __device__ __forceinline__ void forward(Team& team, T* inbox, unsigned rank) {
#pragma unroll
    for (int step = 1; step < log2_of(kClusterSize); step++) {
      const unsigned group = 1u << step;
      T* mine = inbox + (rank & ~(group - 1)) * kLength;
      T* theirs = map_shared(mine, rank ^ group);
      for (int i = team.thread(); i < static_cast<int>(group) * kLength; i += Team::threads) theirs[i] = mine[i];
      team.cluster_sync();
    }
  }

  Scratch& scratch_;
  unsigned buffer_ = 0;
};

}  // namespace clusterfusion
