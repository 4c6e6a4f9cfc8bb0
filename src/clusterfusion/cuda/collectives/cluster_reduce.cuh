// ClusterReduce: vectors, one a CTA, folded elementwise over a cluster; every CTA gets all of the result.
//
// Order of the fold, the same on every rank and in every run, so that all ranks hold identical bits; no atomics:
//   direct  ((v0 . v1) . v2) . ...            in rank order
//   tree    (v0 . v1) . (v2 . v3), and so on  pairs of neighbouring ranks, then pairs of pairs
//
// Barriers of one exchange: cluster size 1, one team block_sync; direct, one team cluster_sync; tree, log2(cluster size)
// team cluster_syncs. Nothing else, and none after the result may be read.
//
// Remote accesses are writes only, each before a cluster_sync that the written CTA waits for too: a CTA may exit, or use
// its scratch for something else, as soon as it has read its results and no peer's next exchange has begun.
//
// Back to back: exchange n + 2 writes the inbox of exchange n. Its writer has passed a cluster_sync of exchange n + 1, at
// which every member arrived after its last read of result n. Hence two inboxes, and no trailing barrier.
#pragma once

#include "collectives/exchange.cuh"
#include "primitives/cluster.cuh"

namespace clusterfusion {

template <typename T, int kLength, int kClusterSize, Exchange kExchange, typename Op = Sum>
class ClusterReduce {
 public:
  static_assert(is_cluster_size(kClusterSize), "clusters of 1, 2, 4 or 8 CTAs");
  using Value = Accumulator<T>;

 private:
  static constexpr int kSteps = log2_of(kClusterSize);
  static constexpr bool kTree = kExchange == Exchange::tree && kClusterSize > 1;
  static constexpr int kSlots = kTree ? 2 * kSteps : kClusterSize;  // tree: the lower and upper half of each step

 public:
  // In shared memory, at the same offset in every CTA, given to one ClusterReduce for as long as any CTA uses it.
  struct Scratch {
    alignas(16) Value inbox[2][kSlots][kLength];
  };

  // Every member of the team makes its own; it holds which of the two inboxes is next.
  __device__ __forceinline__ explicit ClusterReduce(Scratch& scratch, Op op = Op()) : scratch_(scratch), op_(op) {}

  // Folds elements 0 to count - 1 (count <= kLength, equal on all ranks). partial(i) is this CTA's element i, of type T
  // or Value; it is called once, by the member with thread() == i % team.threads, and need be visible to it alone.
  template <typename Team, typename Partial>
  __device__ __forceinline__ void exchange(Team& team, int count, Partial partial) {
    static_assert(Team::cluster_size == kClusterSize, "the team and the collective disagree about the cluster's size");
    buffer_ ^= 1;
    if constexpr (kTree) {
      exchange_tree(team, count, partial);
    } else {
      exchange_direct(team, count, partial);
    }
  }

  // Element i of the latest exchange's result, for any member and any i < count, until its next call of exchange.
  __device__ __forceinline__ Value result(int i) const {
    auto& inbox = scratch_.inbox[buffer_];
    if constexpr (kTree) {
      return op_(inbox[kSlots - 2][i], inbox[kSlots - 1][i]);
    } else {
      Value folded = inbox[0][i];
#pragma unroll
      for (int rank = 1; rank < kClusterSize; rank++) folded = op_(folded, inbox[rank][i]);
      return folded;
    }
  }

 private:
  template <typename Team, typename Partial>
  __device__ __forceinline__ void exchange_direct(Team& team, int count, Partial partial) {
    const unsigned rank = team.rank();
    for (int i = team.thread(); i < count; i += Team::threads) {
      const Value value = static_cast<Value>(partial(i));
      Value* slot = &scratch_.inbox[buffer_][rank][i];
      *slot = value;
#pragma unroll
      for (unsigned other = 1; other < kClusterSize; other++) {
        *map_shared(slot, rank ^ other) = value;  // rank ^ other: the ranks do not all write to one CTA first
      }
    }
    if constexpr (kClusterSize == 1) {
      team.block_sync();
    } else {
      team.cluster_sync();
    }
  }

  template <typename Team, typename Partial>
  __device__ __forceinline__ void exchange_tree(Team& team, int count, Partial partial) {
    const unsigned rank = team.rank();
    auto& inbox = scratch_.inbox[buffer_];
#pragma unroll
    for (int step = 0; step < kSteps; step++) {
      const unsigned upper = rank >> step & 1;  // the half of this step's pair that this CTA is in
      for (int i = team.thread(); i < count; i += Team::threads) {
        const Value value =
            step == 0 ? static_cast<Value>(partial(i)) : op_(inbox[2 * step - 2][i], inbox[2 * step - 1][i]);
        Value* slot = &inbox[2 * step + upper][i];
        *slot = value;
        *map_shared(slot, rank ^ (1u << step)) = value;
      }
      team.cluster_sync();
    }
  }

  Scratch& scratch_;
  Op op_;
  unsigned buffer_ = 0;
};

}  // namespace clusterfusion
