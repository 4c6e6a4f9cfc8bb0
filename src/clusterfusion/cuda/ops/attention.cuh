// Decode attention over cached tokens, by online softmax (Milakov and Gimelshein 2018; Dao et al. 2022), of one query head. Of several
// that share keys and values: ops/grouped_attention.cuh.
//
// A tile holds kTokens keys and, behind them, their values, token after token. Tile t of a CTA's share goes to slot
// t % (warps), one warp each; slots are merged in order, then the CTAs of the cluster in rank order, so the bits depend on
// the split and not on timing or on the launch form. Scores are in units of log2: q carries 1 / sqrt(head_dim) * log2(e).
#pragma once

#include <cuda/std/limits>

#include "ops/gemv.cuh"
#include "ops/ring.cuh"
#include "primitives/vector.cuh"

namespace clusterfusion {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kInfinity = cuda::std::numeric_limits<float>::infinity();

template <int kHeadDim_, int kTokens_, int kTileBytes>
struct AttentionTiles {
  static constexpr int kHeadDim = kHeadDim_, kTokens = kTokens_;           // of a tile
  static_assert(kHeadDim % kVector == 0 && kHeadDim <= 256, "a token's key is at most one 16-byte vector a lane");
  static constexpr int kLanes = kHeadDim / kVector;                        // lanes that share a token
  static constexpr int kTogether = kWarpSize / kLanes;                     // tokens a warp takes at once
  static constexpr int kPasses = kTokens / kTogether;
  static_assert(kTokens % kTogether == 0 && kTokens <= 256, "whole passes; a tensor copy's box is at most 256 long");
  static constexpr int kHalfBytes = kTokens * kHeadDim * 2;                // the keys, or the values
  static constexpr int kValuesAt = (kHalfBytes + 127) / 128 * 128;         // tensor copies need the alignment
  static_assert(kValuesAt + kHalfBytes <= kTileBytes, "a tile fits a stage");
};

// Raises the running maximum of scores to at least `highest`. Scores count relative to `base`; of sums so far, `keep` remains.
struct Raised {
  float base, keep;
};
__device__ __forceinline__ Raised raise_maximum(float& maximum, float highest) {
  const float raised = fmaxf(maximum, highest);
  const float base = raised == -kInfinity ? 0.0f : raised;  // all so far are empty, or a key overflowed and put them at -infinity
  const float keep = exp2f(maximum - base);
  maximum = raised;
  return {base, keep};
}

// How a head is laid out over a warp: lane = token in the group * kLanes + chunk of eight dimensions.
template <typename Tiles>
struct AttentionLane {
  int token, chunk;
  bool active;
  __device__ explicit AttentionLane(int lane)
      : token(lane / Tiles::kLanes), chunk(lane % Tiles::kLanes), active(lane < Tiles::kTogether * Tiles::kLanes) {}
};

template <int kCount>
constexpr bool kPowerOfTwo = (kCount & (kCount - 1)) == 0;

// Sum over the kLanes lanes of a group, left on all of them. A fixed order: halving strides from the next power of two; of as many
// lanes, all get it at once, since a butterfly's pairs are the same.
template <int kLanes>
__device__ __forceinline__ float group_sum(float value, int chunk, int leader) {
#pragma unroll
  for (int stride = 16; stride > 0; stride /= 2) {
    if (stride < kLanes && kPowerOfTwo<kLanes>) {
      value += __shfl_xor_sync(kAllLanes, value, stride);
    } else if (stride < kLanes) {
      const float other = __shfl_down_sync(kAllLanes, value, stride);
      if (chunk < stride && chunk + stride < kLanes) value += other;
    }
  }
  return kPowerOfTwo<kLanes> ? value : __shfl_sync(kAllLanes, value, leader);
}

// The highest of the groups' values, each of which all lanes of its group have; on all lanes of all groups.
template <typename Tiles>
__device__ __forceinline__ float highest_of_groups(float value, int lane) {
  if constexpr (kPowerOfTwo<Tiles::kLanes>) {
#pragma unroll
    for (int mask = kWarpSize / 2; mask >= Tiles::kLanes; mask /= 2) value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, mask));
    return value;
  } else {
    constexpr int kActive = Tiles::kTogether * Tiles::kLanes;
    float highest = value;
#pragma unroll
    for (int group = 1; group < Tiles::kTogether; group++) {
      const int from = lane + group * Tiles::kLanes;
      highest = fmaxf(highest, __shfl_sync(kAllLanes, value, from < kActive ? from : from - kActive));
    }
    return highest;
  }
}

// One warp's running state over its tiles, of one query head: all of it in registers.
template <typename W, typename Tiles>
class AttentionWarp {
 public:
  __device__ AttentionWarp(int lane, const float* query) : at_(lane), lane_(lane), leader_(at_.active ? at_.token * Tiles::kLanes : lane) {
#pragma unroll
    for (int k = 0; k < kVector; k++) q_[k] = at_.active ? query[at_.chunk * kVector + k] : 0.0f, values_[k] = 0.0f;
  }

  __device__ __forceinline__ void add_tile(const char* data, int tokens) {
    // This lane's eight dimensions of its token of each pass: every kTogether-th of the tile's, of which `left` are from its first one on.
    const int first = at_.token * Tiles::kLanes + at_.chunk, left = at_.active ? tokens - at_.token : 0;
    const uint4* keys = reinterpret_cast<const uint4*>(data) + first;
    const uint4* values = reinterpret_cast<const uint4*>(data + Tiles::kValuesAt) + first;
    StageReads reads;
    float score[Tiles::kPasses];
    float highest = -kInfinity;
#pragma unroll
    for (int pass = 0; pass < Tiles::kPasses; pass++) {
      const bool valid = pass * Tiles::kTogether < left;
      uint4 packed = {};
      if (valid) packed = keys[pass * Tiles::kTogether * Tiles::kLanes];
      reads.saw(packed.x);
      float k[kVector], dot = 0;
      unpack8<W>(packed, k);
#pragma unroll
      for (int i = 0; i < kVector; i++) dot = fmaf(q_[i], k[i], dot);
      dot = group_sum<Tiles::kLanes>(dot, at_.chunk, leader_);
      score[pass] = valid ? dot : -kInfinity;
      highest = fmaxf(highest, score[pass]);
    }
    const auto [base, keep] = raise_maximum(maximum_, highest_of_groups<Tiles>(highest, lane_));
    sum_ = __fmul_rn(sum_, keep);  // not to become part of the addition behind it, in one kernel and not in another
#pragma unroll
    for (int k = 0; k < kVector; k++) values_[k] *= keep;
#pragma unroll
    for (int pass = 0; pass < Tiles::kPasses; pass++) {
      uint4 packed = {};
      if (pass * Tiles::kTogether < left) packed = values[pass * Tiles::kTogether * Tiles::kLanes];
      reads.saw(packed.x);
      const float p = exp2f(score[pass] - base);  // 0 for a token that is not there
      float v[kVector];
      unpack8<W>(packed, v);
      sum_ += p;
#pragma unroll
      for (int k = 0; k < kVector; k++) values_[k] = fmaf(p, v[k], values_[k]);
    }
    reads.wait();
  }

  // Folds the warp's token groups in order and writes the slot's partial: values [kHeadDim], then maximum and sum.
  __device__ __forceinline__ void store(float* partial, int) {
    float sum = 0, values[kVector] = {};
#pragma unroll
    for (int group = 0; group < Tiles::kTogether; group++) {
      const int source = group * Tiles::kLanes + (at_.active ? at_.chunk : 0);
      sum += __shfl_sync(kAllLanes, sum_, source);
#pragma unroll
      for (int k = 0; k < kVector; k++) values[k] += __shfl_sync(kAllLanes, values_[k], source);
    }
    if (at_.active && at_.token == 0) {
#pragma unroll
      for (int k = 0; k < kVector; k++) partial[at_.chunk * kVector + k] = values[k];
      if (at_.chunk == 0) partial[Tiles::kHeadDim] = maximum_, partial[Tiles::kHeadDim + 1] = sum;
    }
  }

 private:
  AttentionLane<Tiles> at_;
  int lane_, leader_;
  float q_[kVector], values_[kVector];
  float maximum_ = -kInfinity, sum_ = 0;
};

// Partials in memory: kHeadDim values, maximum, sum; padded to whole 16-byte vectors.
template <int kHeadDim>
constexpr int kPartialFloats = kHeadDim + 4;

// Quad `quad` of the merge of `count` partials, at most kMost, `stride` floats apart, in order: four values, or, behind the last of them,
// maximum and sum. Partials are aligned to 16 bytes.
template <int kHeadDim, int kMost>
__device__ __forceinline__ float4 merge_partials(const float* partials, int count, int stride, int quad) {
  float maxima[kMost];
  float4 parts[kMost];
#pragma unroll
  for (int i = 0; i < kMost; i++) {
    maxima[i] = -kInfinity, parts[i] = {};
    if (i < count) maxima[i] = partials[i * stride + kHeadDim], parts[i] = reinterpret_cast<const float4*>(partials + i * stride)[quad];
  }
  float maximum = -kInfinity;
#pragma unroll
  for (int i = 0; i < kMost; i++) maximum = fmaxf(maximum, maxima[i]);
  float4 merged = {};
#pragma unroll
  for (int i = 0; i < kMost; i++) {
    const float weight = maxima[i] == -kInfinity ? 0.0f : exp2f(maxima[i] - maximum);
    merged.x = fmaf(weight, parts[i].x, merged.x), merged.y = fmaf(weight, parts[i].y, merged.y);
    merged.z = fmaf(weight, parts[i].z, merged.z), merged.w = fmaf(weight, parts[i].w, merged.w);
  }
  if (quad == kHeadDim / 4) merged = {maximum, merged.y, 0.0f, 0.0f};
  return merged;
}

}  // namespace clusterfusion
