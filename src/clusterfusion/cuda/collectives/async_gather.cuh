// AsyncGather: vectors of 32-bit values, or of four of them, one a CTA, joined in rank order; every CTA gets all of them. What ClusterGather does, by
// stores that count their bytes at the reader's mbarrier (st.async): nobody waits for a fence of the whole GPU, as an arrival that
// releases ordinary stores to the cluster does.
//
// Each of the inboxes, two, has an mbarrier. A phase of it completes when all senders of this CTA have stored their own elements and those
// of all peers have arrived. Members may read the result until their next block_sync, with which an exchange begins: behind it
// nobody of this CTA still waits for or reads the exchange before. So a peer that sends for exchange n + 2 into the inbox of n,
// for which it needed this CTA's elements of n + 1, overwrites what nobody reads, and no wait by parity can see n + 2 in place of n.
// The last wait of a CTA ends after everything that peers send it, so it may exit then.
//
// One inbox suffices where a peer can come to its next exchange only after every member of this CTA has read the result of the last
// one. Then each phase is over in both senses before anything of the next arrives.
#pragma once

#include "collectives/exchange.cuh"
#include "primitives/cluster.cuh"
#include "primitives/mbarrier.cuh"

namespace clusterfusion {

template <typename T, int kLength, int kClusterSize, int kInboxes = 2>
class AsyncGather {
 public:
  static_assert(is_cluster_size(kClusterSize), "clusters of 1, 2, 4 or 8 CTAs");
  static_assert(sizeof(T) == 4 || sizeof(T) == 16, "a store moves 32 bits, or four times as many");
  static_assert(kInboxes == 1 || kInboxes == 2, "more are of no use");
  static constexpr int kTotal = kClusterSize * kLength;

  // In shared memory, at the same offset in every CTA, given to one AsyncGather for as long as any CTA uses it.
  struct Scratch {
    alignas(16) T inbox[kInboxes][kTotal];
    cuda::std::uint64_t complete[kInboxes];
  };

  // One thread of each CTA, before the kernel's first cluster barrier. kThreads: of the team.
  template <int kThreads>
  static __device__ __forceinline__ void init(Scratch& scratch) {
    constexpr int kSenders = kLength < kThreads ? kLength : kThreads;
    for (int i = 0; i < kInboxes; i++) mbarrier_init(&scratch.complete[i], kSenders);
    mbarrier_init_fence();
  }

  // Every member of the team makes its own; it counts the exchanges.
  __device__ __forceinline__ explicit AsyncGather(Scratch& scratch) : scratch_(scratch) {}

  // mine(i) is this CTA's element i < kLength; it is called once, by the member with thread() == i % team.threads.
  template <typename Team, typename Mine>
  __device__ __forceinline__ void exchange(Team& team, Mine mine) {
    team.block_sync();
    // Having given up once, it neither spends the limit again at every later exchange, nor arrives for a phase that has not ended.
    if (expired_) return;
    const int which = count_ % kInboxes;
    T* inbox = scratch_.inbox[which];
    cuda::std::uint64_t* complete = &scratch_.complete[which];
    const unsigned rank = kClusterSize == 1 ? 0 : cluster_rank();
    for (int i = team.thread(); i < kLength; i += Team::threads) {
      T* slot = &inbox[rank * kLength + i];
      const T value = mine(i);
      *slot = value;
#pragma unroll
      for (unsigned other = 1; other < kClusterSize; other++) {
        mbarrier_store(map_shared(slot, rank ^ other), value, map_shared(complete, rank ^ other));
      }
    }
    if (team.thread() == 0) {
      mbarrier_arrive_expect(complete, (kClusterSize - 1) * kLength * sizeof(T));
    } else if (team.thread() < kLength) {
      mbarrier_arrive_local(complete);
    }
    expired_ = !mbarrier_wait_cluster(complete, count_ / kInboxes & 1);
    count_++;
  }

  // The vectors of all ranks, rank r's at r * kLength; for any member, until its next block_sync.
  __device__ __forceinline__ const T* result() const { return scratch_.inbox[(count_ - 1) % kInboxes]; }
  // A wait ran out (kWaitLimitClocks): what came since is meaningless; report it and return.
  __device__ __forceinline__ bool expired() const { return expired_; }

 private:
  Scratch& scratch_;
  unsigned count_ = 0;
  bool expired_ = false;
};

}  // namespace clusterfusion
