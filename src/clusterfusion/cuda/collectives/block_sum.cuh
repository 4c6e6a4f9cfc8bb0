// BlockSum: sums of one or more floats a thread over this CTA's members of a team, in a fixed order.
//
// Order: a butterfly over the lanes of a warp (all lanes get identical bits), then the warps in order.
// Barriers: one team block_sync in add, before which every member has read the totals of the call before: the
// caller's business, met by any team barrier in between (a ClusterReduce exchange has one).
#pragma once

namespace clusterfusion {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarpSize = 32;

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) value += __shfl_xor_sync(kAllLanes, value, mask);
  return value;
}

template <int kValues, int kThreads>
class BlockSum {
 public:
  static_assert(kThreads % kWarpSize == 0, "a team is made of whole warps");
  static constexpr int kWarps = kThreads / kWarpSize;

  struct Scratch {
    float of_warp[kValues][kWarps];
  };

  __device__ __forceinline__ explicit BlockSum(Scratch& scratch) : scratch_(scratch) {}

  template <typename Team, int kCount>
  __device__ __forceinline__ void add(Team& team, const float (&values)[kCount]) {
    static_assert(kCount <= kValues && Team::threads == kThreads, "the scratch is for another shape");
#pragma unroll
    for (int i = 0; i < kCount; i++) {
      const float sum = warp_sum(values[i]);
      if (team.thread() % kWarpSize == 0) scratch_.of_warp[i][team.thread() / kWarpSize] = sum;
    }
    team.block_sync();
  }

  // Total i of the latest add, for any member.
  __device__ __forceinline__ float total(int i) const {
    float sum = scratch_.of_warp[i][0];
#pragma unroll
    for (int warp = 1; warp < kWarps; warp++) sum += scratch_.of_warp[i][warp];
    return sum;
  }

 private:
  Scratch& scratch_;
};

}  // namespace clusterfusion
