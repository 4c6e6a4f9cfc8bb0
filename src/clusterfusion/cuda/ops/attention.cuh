// Decode attention of one query head over cached tokens, by online softmax (Milakov and Gimelshein 2018; Dao et al. 2022).
//
// A tile holds kTokens keys and, behind them, their values, token after token. Tile t of a CTA's share goes to slot
// t % kSlots, one warp each; slots are merged in order, then the CTAs of the cluster in rank order, so the bits depend on
// the split and not on timing or on the launch form. Scores are in units of log2: q carries 1 / sqrt(head_dim) * log2(e).
#pragma once

#include <cuda/std/limits>

#include "ops/gemv.cuh"

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

// Softmax so far: maximum, sum, and the weighted values. A partial with maximum -infinity is empty.
struct SoftmaxScale {
  float maximum, sum;
};

// How a head is laid out over a warp: lane = token in the group * kLanes + chunk of eight dimensions.
template <typename Tiles>
struct AttentionLane {
  int token, chunk;
  bool active;
  __device__ explicit AttentionLane(int lane)
      : token(lane / Tiles::kLanes), chunk(lane % Tiles::kLanes), active(lane < Tiles::kTogether * Tiles::kLanes) {}
};

// Sum over the kLanes lanes of a group, left on all of them. A fixed order: halving strides from the next power of two.
template <int kLanes>
__device__ __forceinline__ float group_sum(float value, int chunk, int leader) {
#pragma unroll
  for (int stride = 16; stride > 0; stride /= 2) {
    if (stride < kLanes) {
      const float other = __shfl_down_sync(kAllLanes, value, stride);
      if (chunk < stride && chunk + stride < kLanes) value += other;
    }
  }
  return kLanes > 1 ? __shfl_sync(kAllLanes, value, leader) : value;
}

// One warp's running state over its tiles.
template <typename W, typename Tiles>
class AttentionWarp {
 public:
  __device__ AttentionWarp(int lane, const float* query) : at_(lane), leader_(at_.active ? at_.token * Tiles::kLanes : lane) {
#pragma unroll
    for (int k = 0; k < kVector; k++) q_[k] = at_.active ? query[at_.chunk * kVector + k] : 0.0f, values_[k] = 0.0f;
  }

  __device__ __forceinline__ void add_tile(const char* data, int tokens) {
    const uint4* keys = reinterpret_cast<const uint4*>(data);
    const uint4* values = reinterpret_cast<const uint4*>(data + Tiles::kValuesAt);
    float score[Tiles::kPasses];
    float highest = -kInfinity;
#pragma unroll
    for (int pass = 0; pass < Tiles::kPasses; pass++) {
      const int token = pass * Tiles::kTogether + at_.token;
      const bool valid = at_.active && token < tokens;
      float dot = 0;
      if (valid) {
        float k[kVector];
        unpack8<W>(keys[token * Tiles::kLanes + at_.chunk], k);
#pragma unroll
        for (int i = 0; i < kVector; i++) dot = fmaf(q_[i], k[i], dot);
      }
      dot = group_sum<Tiles::kLanes>(dot, at_.chunk, leader_);
      score[pass] = valid ? dot : -kInfinity;
      highest = fmaxf(highest, score[pass]);
    }
#pragma unroll
    for (int mask = kWarpSize / 2; mask > 0; mask /= 2) highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, mask));
    const float maximum = fmaxf(maximum_, highest);
    const float base = maximum == -kInfinity ? 0.0f : maximum;  // a key that overflowed can put all scores at -infinity
    const float keep = exp2f(maximum_ - base);
    maximum_ = maximum;
    sum_ *= keep;
#pragma unroll
    for (int k = 0; k < kVector; k++) values_[k] *= keep;
#pragma unroll
    for (int pass = 0; pass < Tiles::kPasses; pass++) {
      const int token = pass * Tiles::kTogether + at_.token;
      if (at_.active && token < tokens) {
        const float p = exp2f(score[pass] - base);
        float v[kVector];
        unpack8<W>(values[token * Tiles::kLanes + at_.chunk], v);
        sum_ += p;
#pragma unroll
        for (int k = 0; k < kVector; k++) values_[k] = fmaf(p, v[k], values_[k]);
      }
    }
  }

  // Folds the warp's token groups in order and writes the slot's partial: values [kHeadDim], then maximum and sum.
  __device__ __forceinline__ void store(float* partial) {
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
  int leader_;
  float q_[kVector], values_[kVector];
  float maximum_ = -kInfinity, sum_ = 0;
};

// Partials in memory: kHeadDim values, maximum, sum; padded to whole 16-byte vectors.
template <int kHeadDim>
constexpr int kPartialFloats = kHeadDim + 4;

// Element `dim` of the merge of `count` partials, `stride` floats apart, in order; and the merged scale.
template <int kHeadDim>
__device__ __forceinline__ float merge_partials(const float* partials, int count, int stride, int dim, SoftmaxScale& scale) {
  float maximum = -kInfinity;
  for (int i = 0; i < count; i++) maximum = fmaxf(maximum, partials[i * stride + kHeadDim]);
  float value = 0, sum = 0;
  for (int i = 0; i < count; i++) {
    const float weight = partials[i * stride + kHeadDim] == -kInfinity ? 0.0f : exp2f(partials[i * stride + kHeadDim] - maximum);
    value += weight * partials[i * stride + dim];
    sum += weight * partials[i * stride + kHeadDim + 1];
  }
  scale = {maximum, sum};
  return value;
}

}  // namespace clusterfusion
