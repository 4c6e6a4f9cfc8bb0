// What a decoder-layer launch is given: the layer in memory, the shape and the plan; and how far each CTA's share goes.
#pragma once

#include <cuda/std/cstdint>

#include "ops/attention.cuh"
#include "ops/gemv.cuh"
#include "ops/ring.cuh"
#include "primitives/vector.cuh"

namespace clusterfusion {

// Segments: what one launch runs. `whole` is all of them with grid dependencies in between; each other one is a launch of
// its own, and the end of a launch is the dependency.
enum class Segment { whole, project, attend, output, expand, contract };
enum class Gelu { erf, tanh };

// Everything about a layer that lies in memory. Strides in elements. Null biases are absent.
struct LayerArguments {
  TensorMap k_map, v_map;                                       // of the caches, as [heads, max_len, head_dim]
  const void *norm1_weight, *norm1_bias, *norm2_weight, *norm2_bias;
  const void *qkv_weight, *qkv_bias, *o_weight, *o_bias, *up_weight, *up_bias, *down_weight, *down_bias;
  void *k_cache, *v_cache;                                      // head h, token t at h * head_stride + t * token_stride
  cuda::std::int64_t head_stride, token_stride;
  const float *cos, *sin;                                       // a row a position, an angle a pair of dimensions
  cuda::std::int64_t table_stride;                              // 0: one row, for the current position
  const int* position;                                          // cached tokens before this one
  const void* x;                                                // [hidden]
  void* out;                                                    // [hidden]
  void *k_new, *v_new;                                          // [heads, head_dim] or null
  float *qkv, *partials, *middle;                               // scratch: [3 * hidden], [heads, partials], [hidden]
  void* h;                                                      // scratch: [intermediate]
  unsigned* counters;                                           // kCounters, kCounterStride apart; zero before first use
  unsigned* error;                                              // kErrorWords
  float eps;
  int max_len;                                                  // tokens the caches have room for
  int second_angles;                                            // where a row's angles for the pairs' second halves start
};
static_assert(sizeof(LayerArguments) == 512, "jit/decoder_block.py lays out the same struct");

constexpr int kCounterStride = 32;  // a cache line each
enum Counter { kQkvDone, kAttentionDone, kHiddenDone, kMiddleDone, kLaunchDone, kCounters };
// The error record, in host memory: dependency + 1 (0: none), CTA, expected, seen, claim.
constexpr int kErrorClaim = 4, kErrorWords = 5;
constexpr unsigned kClusterDependency = kMiddleDone + 1;  // a peer in the cluster, beside the counters
constexpr unsigned kBadPosition = kClusterDependency + 1;  // no dependency: the position is not in the cache

// The shape and the plan. CTA c of kCtas owns rows [c * R / kCtas, (c + 1) * R / kCtas) of a matrix of R rows; head h is
// attended by CTAs [h * kSplits, (h + 1) * kSplits), cached tiles dealt out in turn.
template <typename W_, typename X_, int kHidden_, int kIntermediate_, int kHeads_, int kHeadDim_, int kRotary_, Gelu kGelu_,
          bool kParallel_, int kCtas_, int kCluster_, int kSplits_, int kWarps_, int kStages_, int kStageBytes_, int kWindow_,
          int kTileTokens_, int kSharedBytes_>
struct BlockShape {
  using W = W_;
  using X = X_;
  static constexpr int kHidden = kHidden_, kIntermediate = kIntermediate_, kHeads = kHeads_, kHeadDim = kHeadDim_;
  static constexpr int kRotary = kRotary_, kCtas = kCtas_, kCluster = kCluster_, kSplits = kSplits_, kWarps = kWarps_;
  static constexpr int kStages = kStages_, kStageBytes = kStageBytes_, kWindow = kWindow_;
  static constexpr int kTileTokens = kTileTokens_, kSharedBytes = kSharedBytes_;
  static constexpr Gelu kGelu = kGelu_;
  static constexpr bool kParallel = kParallel_;
  static constexpr int kThreads = kWarps * kWarpSize;  // consumers; the producer warp comes after them
  static constexpr int kQkvRows = 3 * kHidden;
  static_assert(kHeads * kSplits <= kCtas, "one CTA for each part of a head");
  static_assert(kSplits == 1 || kSplits % kCluster == 0, "a cluster works on one head");
  static constexpr int kMerged = kSplits == 1 ? 1 : kCluster;          // CTAs that merge over DSMEM
  static constexpr int kPartials = kSplits / kMerged;                  // partials of a head in global memory
};

template <int kCtas>
__device__ __forceinline__ int first_row(int rows, int cta) {
  return static_cast<int>(static_cast<long long>(rows) * cta / kCtas);
}

template <Gelu kGelu>
__device__ __forceinline__ float gelu(float x) {
  if constexpr (kGelu == Gelu::erf) return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
  const float inner = 0.79788456080286536f * (x + 0.044715f * x * x * x);
  return 0.5f * x * (1.0f + tanhf(inner));
}

template <typename W>
__device__ __forceinline__ float load_or_zero(const void* vector, int index) {
  return vector == nullptr ? 0.0f : to_float(static_cast<const W*>(vector)[index]);
}

// A CTA's share of the work, as the producer and the consumers both see it.
template <typename S, Segment kSegment_>
class BlockShare {
 public:
  using W = typename S::W;
  static constexpr Segment kSegment = kSegment_;
  static constexpr bool kWhole = kSegment == Segment::whole;
  static __host__ __device__ constexpr bool runs(Segment segment) { return kWhole || kSegment == segment; }
  using HiddenTiles = RowTiles<S::kHidden, S::kStageBytes>;
  using DownTiles = RowTiles<S::kIntermediate, S::kStageBytes>;
  using Cached = AttentionTiles<S::kHeadDim, S::kTileTokens, S::kStageBytes>;
  using RingType = Ring<S::kStages, S::kStageBytes, S::kWarps, S::kWindow>;

  __device__ BlockShare(const LayerArguments& arguments)
      : a_(arguments), cta_(blockIdx.x), position_(*arguments.position) {}

  __device__ bool position_is_cached() const { return position_ >= 0 && position_ < a_.max_len; }

 protected:
  __device__ int rows_from(int rows) const { return first_row<S::kCtas>(rows, cta_); }
  __device__ int rows_to(int rows) const { return first_row<S::kCtas>(rows, cta_ + 1); }
  // Half of the up projection waits behind attention, to cover the dependency on q, k and v.
  __device__ int up_before(int rows) const {
    if (!kWhole || !S::kParallel) return rows;
    const int half = rows / 2;
    return HiddenTiles::kParts > 1 ? half : half / HiddenTiles::kRows * HiddenTiles::kRows;
  }
  __device__ bool attends() const { return cta_ < S::kHeads * S::kSplits; }
  __device__ int head() const { return cta_ / S::kSplits; }
  __device__ int split() const { return cta_ % S::kSplits; }
  __device__ int cached_tiles() const {  // of this CTA
    const int all = (position_ + Cached::kTokens - 1) / Cached::kTokens;
    return attends() ? (all - split() + S::kSplits - 1) / S::kSplits : 0;
  }
  __device__ int tile_tokens(int tile) const { return min(Cached::kTokens, position_ - (split() + tile * S::kSplits) * Cached::kTokens); }

  const LayerArguments& a_;
  const int cta_, position_;
};

}  // namespace clusterfusion
