// Decode attention over cached tokens, by online softmax (Milakov and Gimelshein 2018; Dao et al. 2022): of one query head, or of
// several that share the keys and values (grouped-query attention, Ainslie et al. 2023), which then are read once for all of them.
//
// A tile holds kTokens keys and, behind them, their values, token after token. Tile t of a CTA's share goes to slot
// t % (warps), one warp each; slots are merged in order, then the CTAs of the cluster in rank order, so the bits depend on
// the split and not on timing or on the launch form. Scores are in units of log2: q carries 1 / sqrt(head_dim) * log2(e).
#pragma once

#include <cuda/std/limits>
#include <cuda/std/type_traits>

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

// Softmax so far: maximum, sum, and the weighted values. A partial with maximum -infinity is empty.
struct SoftmaxScale {
  float maximum, sum;
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

// Sum over the kLanes lanes of a group, left on its first one. A fixed order: halving strides from the next power of two; of as many
// lanes, all get it, since a butterfly's pairs are the same.
template <int kLanes>
__device__ __forceinline__ float group_sum_of_first(float value, int chunk) {
#pragma unroll
  for (int stride = 16; stride > 0; stride /= 2) {
    if (stride < kLanes && kPowerOfTwo<kLanes>) {
      value += __shfl_xor_sync(kAllLanes, value, stride);
    } else if (stride < kLanes) {
      const float other = __shfl_down_sync(kAllLanes, value, stride);
      if (chunk < stride && chunk + stride < kLanes) value += other;
    }
  }
  return value;
}
// The same, left on all lanes of the group.
template <int kLanes>
__device__ __forceinline__ float group_sum(float value, int chunk, int leader) {
  value = group_sum_of_first<kLanes>(value, chunk);
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
  struct Scores {};  // needs no memory of its own
  __device__ AttentionWarp(int lane, const float* query, Scores&) : at_(lane), lane_(lane), leader_(at_.active ? at_.token * Tiles::kLanes : lane) {
#pragma unroll
    for (int k = 0; k < kVector; k++) q_[k] = at_.active ? query[at_.chunk * kVector + k] : 0.0f, values_[k] = 0.0f;
  }

  __device__ __forceinline__ void add_tile(const char* data, int tokens) {
    const uint4* keys = reinterpret_cast<const uint4*>(data);
    const uint4* values = reinterpret_cast<const uint4*>(data + Tiles::kValuesAt);
    StageReads reads;
    float score[Tiles::kPasses];
    float highest = -kInfinity;
#pragma unroll
    for (int pass = 0; pass < Tiles::kPasses; pass++) {
      const int token = pass * Tiles::kTogether + at_.token;
      const bool valid = at_.active && token < tokens;
      uint4 packed = {};
      if (valid) packed = keys[token * Tiles::kLanes + at_.chunk];
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
      const int token = pass * Tiles::kTogether + at_.token;
      uint4 packed = {};
      if (at_.active && token < tokens) packed = values[token * Tiles::kLanes + at_.chunk];
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

// The same for kQueries query heads over the same keys and values. Scores go through shared memory, where lanes change their part:
// for scores, lanes share a token, as above; for the softmax, kHeadLanes lanes share a query head; for the values, lanes share out
// the dimensions, two each, and take the tokens in order. So what a lane keeps from tile to tile is small for any number of heads.
template <typename W, typename Tiles, int kQueries>
class GroupedAttentionWarp {
  static constexpr int kStride = kQueries <= 2 ? kQueries : (kQueries + 3) / 4 * 4;  // of a token's scores: whole accesses
  static constexpr int kAccess = kStride < 4 ? kStride : 4;
  static constexpr int kAtOnce = (kQueries + (kQueries + 3) / 4 - 1) / ((kQueries + 3) / 4);  // scores in registers
  // Groups of tokens side by side: the sums of one wait for shuffles while the other's go on. Uneven ones take more registers.
  static constexpr int kGroups = kPowerOfTwo<Tiles::kLanes> ? 2 : 1;
  static constexpr int kHeadLanes = kQueries <= 2 ? 16 : kQueries <= 4 ? 8 : kQueries <= 8 ? 4 : kQueries <= 16 ? 2 : 1;
  static constexpr int kPairs = Tiles::kHeadDim / 2, kSteps = (kPairs + kWarpSize - 1) / kWarpSize;
  static_assert(kQueries > 1 && kQueries <= kWarpSize, "a lane for every head");

 public:
  struct Scores {
    alignas(16) float of[Tiles::kTokens * kStride];  // token after token
  };

  // `queries` [kQueries, kHeadDim] in shared memory.
  __device__ GroupedAttentionWarp(int lane, const float* queries, Scores& scores)
      : at_(lane), lane_(lane), head_(lane / kHeadLanes), queries_(queries), scores_(scores.of) {}

  __device__ __forceinline__ void add_tile(const char* data, int tokens) {
    StageReads reads;
    score(reads, reinterpret_cast<const uint4*>(data), tokens);
    __syncwarp();
    const float keep = soften(tokens);
    __syncwarp();
#pragma unroll
    for (int q = 0; q < kQueries; q++) {
      const float mine = __shfl_sync(kAllLanes, keep, q * kHeadLanes);
#pragma unroll
      for (int step = 0; step < kSteps; step++) values_[q][step].x *= mine, values_[q][step].y *= mine;
    }
    weigh(reads, reinterpret_cast<const unsigned*>(data + Tiles::kValuesAt), tokens);
    reads.wait();
    __syncwarp();  // all have read the scores
  }

  // Writes the slot's partials, `stride` floats apart.
  __device__ __forceinline__ void store(float* partials, int stride) {
    float sum = sum_;
#pragma unroll
    for (int mask = kHeadLanes / 2; mask > 0; mask /= 2) sum += __shfl_xor_sync(kAllLanes, sum, mask);
    if (head_ < kQueries && lane_ % kHeadLanes == 0) {
      partials[head_ * stride + Tiles::kHeadDim] = maximum_;
      partials[head_ * stride + Tiles::kHeadDim + 1] = sum;
    }
#pragma unroll
    for (int q = 0; q < kQueries; q++) {
#pragma unroll
      for (int step = 0; step < kSteps; step++) {
        const int pair = step * kWarpSize + lane_;
        if (pair < kPairs) *reinterpret_cast<float2*>(partials + q * stride + 2 * pair) = values_[q][step];
      }
    }
  }

 private:
  __device__ __forceinline__ void score(StageReads& reads, const uint4* keys, int tokens) {
#pragma unroll 1
    for (int first = 0; first < tokens; first += kGroups * Tiles::kTogether) {
      float k[kGroups][kVector];
      const auto token_of = [&](int group) { return first + group * Tiles::kTogether + at_.token; };
      const auto valid = [&](int group) { return at_.active && token_of(group) < tokens; };
#pragma unroll
      for (int group = 0; group < kGroups; group++) {
        uint4 packed = {};
        if (valid(group)) packed = keys[token_of(group) * Tiles::kLanes + at_.chunk];
        reads.saw(packed.x);
        unpack8<W>(packed, k[group]);
      }
#pragma unroll 1
      for (int first_query = 0; first_query < kQueries; first_query += kAtOnce) {
        float dots[kAtOnce][kGroups];
#pragma unroll
        for (int q = 0; q < kAtOnce; q++) {
          const int of = min(first_query + q, kQueries - 1);
          const float4* query = reinterpret_cast<const float4*>(queries_ + of * Tiles::kHeadDim) + (at_.active ? 2 * at_.chunk : 0);
          const SplitVector::Eight eight{query[0], query[1]};
          float of_query[kVector];
          eight.unpack(of_query);
#pragma unroll
          for (int group = 0; group < kGroups; group++) {
            dots[q][group] = 0;
#pragma unroll
            for (int i = 0; i < kVector; i++) dots[q][group] = fmaf(of_query[i], k[group][i], dots[q][group]);
          }
        }
#pragma unroll
        for (int q = 0; q < kAtOnce; q++) {
#pragma unroll
          for (int group = 0; group < kGroups; group++) {
            dots[q][group] = group_sum_of_first<Tiles::kLanes>(dots[q][group], at_.chunk);
          }
        }
#pragma unroll
        for (int group = 0; group < kGroups; group++) {
          if (!valid(group) || at_.chunk != 0) continue;
#pragma unroll
          for (int q = 0; q < kAtOnce; q++) scores_[token_of(group) * kStride + min(first_query + q, kQueries - 1)] = dots[q][group];
        }
      }
    }
  }

  // Scores to weights, in place. Returns, on a head's lanes, what remains of its sums so far.
  __device__ __forceinline__ float soften(int tokens) {
    float highest = -kInfinity;
    const bool mine = head_ < kQueries;
    for (int token = lane_ % kHeadLanes; token < tokens; token += kHeadLanes) {
      if (mine) highest = fmaxf(highest, scores_[token * kStride + head_]);
    }
#pragma unroll
    for (int mask = kHeadLanes / 2; mask > 0; mask /= 2) highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, mask));
    const auto [base, keep] = raise_maximum(maximum_, highest);
    sum_ = __fmul_rn(sum_, keep);  // not to become part of the addition behind it, in one kernel and not in another
    for (int token = lane_ % kHeadLanes; token < tokens; token += kHeadLanes) {
      if (!mine) continue;
      const float p = exp2f(scores_[token * kStride + head_] - base);
      scores_[token * kStride + head_] = p;
      sum_ += p;
    }
    return keep;
  }

  __device__ __forceinline__ void weigh(StageReads& reads, const unsigned* values, int tokens) {
#pragma unroll 4
    for (int token = 0; token < tokens; token++) {
      float2 v[kSteps];
#pragma unroll
      for (int step = 0; step < kSteps; step++) {
        const int pair = step * kWarpSize + lane_;
        const unsigned word = pair < kPairs ? values[token * kPairs + pair] : 0;
        reads.saw(word);
        v[step] = unpack(word, W());
      }
#pragma unroll
      for (int first = 0; first < kQueries; first += kAccess) {
        const auto p = *reinterpret_cast<const Vector<float, kAccess>*>(scores_ + token * kStride + first);
#pragma unroll
        for (int q = first; q < first + kAccess && q < kQueries; q++) {
#pragma unroll
          for (int step = 0; step < kSteps; step++) {
            values_[q][step].x = fmaf(p.element[q - first], v[step].x, values_[q][step].x);
            values_[q][step].y = fmaf(p.element[q - first], v[step].y, values_[q][step].y);
          }
        }
      }
    }
  }

  AttentionLane<Tiles> at_;
  int lane_, head_;  // whose softmax this lane works on
  const float* queries_;
  float* scores_;
  float2 values_[kQueries][kSteps] = {};
  float maximum_ = -kInfinity, sum_ = 0;  // of head_; this lane's tokens
};

template <typename W, typename Tiles, int kQueries>
using AttentionWarpOf = cuda::std::conditional_t<kQueries == 1, AttentionWarp<W, Tiles>, GroupedAttentionWarp<W, Tiles, kQueries == 1 ? 2 : kQueries>>;

// Partials in memory: kHeadDim values, maximum, sum; padded to whole 16-byte vectors.
template <int kHeadDim>
constexpr int kPartialFloats = kHeadDim + 4;

// Element `dim` of the merge of `count` partials, at most kMost, `stride` floats apart, in order; and the merged scale.
template <int kHeadDim, int kMost>
__device__ __forceinline__ float merge_partials(const float* partials, int count, int stride, int dim, SoftmaxScale& scale) {
  float maxima[kMost], sums[kMost], values[kMost];
#pragma unroll
  for (int i = 0; i < kMost; i++) {
    maxima[i] = -kInfinity, sums[i] = 0, values[i] = 0;
    if (i < count) {
      const float* from = partials + i * stride;
      maxima[i] = from[kHeadDim], sums[i] = from[kHeadDim + 1], values[i] = from[dim];
    }
  }
  float maximum = -kInfinity;
#pragma unroll
  for (int i = 0; i < kMost; i++) maximum = fmaxf(maximum, maxima[i]);
  float value = 0, sum = 0;
#pragma unroll
  for (int i = 0; i < kMost; i++) {
    const float weight = maxima[i] == -kInfinity ? 0.0f : exp2f(maxima[i] - maximum);
    value = fmaf(weight, values[i], value);
    sum = fmaf(weight, sums[i], sum);
  }
  scale = {maximum, sum};
  return value;
}

}  // namespace clusterfusion
