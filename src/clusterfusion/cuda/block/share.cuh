// What a decoder-layer launch is given: the layer in memory, the shape and the plan; and how far each CTA's share goes.
#pragma once

#include <cuda/std/cstdint>

#include "ops/attention.cuh"
#include "ops/gemv.cuh"
#include "ops/ring.cuh"
#include "primitives/vector.cuh"

namespace clusterfusion {

// Segments: what one launch runs of a layer. `whole` is all of them with grid dependencies in between; each other one is a
// launch of its own, and the end of a launch is the dependency.
enum class Segment { whole, project, attend, output, expand, contract };
template <Segment kSegment>
__host__ __device__ constexpr bool runs(Segment segment) {
  return kSegment == Segment::whole || kSegment == segment;
}
enum class Gelu { erf, tanh };

// One layer's weights. Null biases are absent.
struct LayerTensors {
  const void *norm1_weight, *norm1_bias, *norm2_weight, *norm2_bias;
  const void *qkv_weight, *qkv_bias, *o_weight, *o_bias, *up_weight, *up_bias, *down_weight, *down_bias;
};

// The cache of one layer or of all. Strides in elements: layer l, head h, token t at l * layer_stride + h * head_stride +
// t * token_stride. The tensor maps count heads through all layers.
struct KvCache {
  void *k, *v;
  void *k_new, *v_new;                   // of one layer: the current token's, [heads, head_dim], or null
  cuda::std::int64_t layer_stride, head_stride, token_stride;
  cuda::std::int64_t max_len;            // tokens there is room for
};

// What launches over any layer of a model share: rotary tables, scratch memory, where to wait and to complain.
struct Workspace {
  const float *cos, *sin;                // a row a position, an angle a pair of dimensions
  cuda::std::int64_t table_stride;       // 0: one row, for the current position
  // Scratch, zero before first use.
  void* qkv;                             // [3 * hidden], Pair of a whole layer, float of a segment
  float* partials;                       // [heads, partials]
  void* h;                               // [intermediate]
  unsigned* counters;                    // kCounters, kCounterStride apart
  unsigned* error;                       // kErrorWords
  float eps;
  int second_angles;                     // where a row's angles for the pairs' second halves start
};

// A launch over one layer.
struct LayerArguments {
  TensorMap k_map, v_map;                // of the caches, as [heads, max_len, head_dim]
  LayerTensors layer;
  KvCache cache;
  Workspace workspace;
  const int* position;                   // cached tokens before this one
  const void* x;                         // [hidden]
  void* out;                             // [hidden]
  float* middle;                         // scratch: [hidden]
};
static_assert(sizeof(LayerArguments) == 640, "jit/decoder_block.py lays out the same struct");

constexpr int kCounterStride = 32;  // a cache line each
enum Counter { kAttentionDone, kHiddenDone, kMiddleDone, kLaunchDone, kCounters };
// The error record, in host memory: dependency + 1 (0: none), CTA, expected, seen, claim.
constexpr int kErrorClaim = 4, kErrorWords = 5;
// What a CTA gave up waiting for, or, last, that the position is not in the cache.
enum Dependency { kOnQkv, kOnAttention, kOnHidden, kOnMiddle, kOnCluster, kOnResidual, kBadPosition };

// The shape and the plan. CTA c of kCtas owns rows [c * R / kCtas, (c + 1) * R / kCtas) of a matrix of R rows, but for the up
// projection's, which even out what that leaves uneven (up_row); head h is attended by CTAs [h * kSplits, (h + 1) * kSplits),
// cached tiles dealt out in turn. With parallel residual, kUpFirst says which of the two projections of the normed x comes first.
template <typename W_, typename X_, int kHidden_, int kIntermediate_, int kHeads_, int kHeadDim_, int kRotary_, Gelu kGelu_,
          bool kParallel_, bool kUpFirst_, int kCtas_, int kCluster_, int kSplits_, int kVectorWarps_, int kWarps_,
          int kStages_, int kTileBytes_, int kStageTiles_, int kWindow_, int kTileTokens_, int kCacheStages_, int kCacheStageBytes_, int kSharedBytes_>
struct BlockShape {
  using W = W_;
  using X = X_;
  static constexpr int kHidden = kHidden_, kIntermediate = kIntermediate_, kHeads = kHeads_, kHeadDim = kHeadDim_;
  static constexpr int kRotary = kRotary_, kCtas = kCtas_, kCluster = kCluster_, kSplits = kSplits_;
  static constexpr int kVectorWarps = kVectorWarps_, kWarps = kWarps_;
  static constexpr int kStages = kStages_, kTileBytes = kTileBytes_, kStageTiles = kStageTiles_, kWindow = kWindow_;
  static constexpr int kStageBytes = kTileBytes * kStageTiles;
  static constexpr int kTileTokens = kTileTokens_, kCacheStages = kCacheStages_, kCacheStageBytes = kCacheStageBytes_;
  static constexpr int kSharedBytes = kSharedBytes_;
  static constexpr Gelu kGelu = kGelu_;
  static constexpr bool kParallel = kParallel_, kUpFirst = kUpFirst_;
  static_assert(kParallel || !kUpFirst, "sequential residual goes to the up projection by way of o");
  // Warps by their role, in this order: vectors, tiles, and one that fetches weights.
  static constexpr int kVectorThreads = kVectorWarps * kWarpSize, kTileThreads = kWarps * kWarpSize;
  static constexpr int kConsumers = kVectorThreads + kTileThreads, kThreads = kConsumers + kWarpSize;
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

// The first row of the up projection that CTA `cta` owns: all that the CTAs before it read of a layer is then their share of it,
// to within a row. Where a CTA has too few rows of it to make up for a row of every other matrix, it is dealt out as they are.
template <typename S>
__device__ __forceinline__ int up_row(int cta) {
  constexpr long long kOut = S::kHidden + S::kIntermediate;  // elements of a row of o and one of down
  constexpr long long kLayer = S::kHidden * (S::kQkvRows + S::kIntermediate + kOut);
  if constexpr (S::kIntermediate < (kOut / S::kHidden + 3) * S::kCtas) return first_row<S::kCtas>(S::kIntermediate, cta);
  const long long others = static_cast<long long>(first_row<S::kCtas>(S::kQkvRows, cta)) * S::kHidden +
                           first_row<S::kCtas>(S::kHidden, cta) * kOut;
  return static_cast<int>((kLayer * cta / S::kCtas - others) / S::kHidden);
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

// The same number, but to the compiler a new one: what is computed from it inside a loop stays there. Otherwise all addresses of
// a layer would be computed ahead of the loop over layers, and spilled.
__device__ __forceinline__ int opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// A layer's tensors, looked up anew at each use, for the same reason: twelve addresses are 24 registers.
struct LayerOf {
  const LayerTensors* layers;
  int layer;
  __device__ __forceinline__ const LayerTensors& now() const { return layers[opaque(layer)]; }
};

// Vector `which` of kHidden fp32 elements in shared memory.
template <typename S>
__device__ __forceinline__ SplitVector split_vector(char* vectors, int which) {
  float4* base = reinterpret_cast<float4*>(vectors + which * S::kHidden * 4);
  return {base, base + S::kHidden / kVector};
}

// A CTA's share of the work, as all its warps see it.
template <typename S>
class CtaShare {
 public:
  using W = typename S::W;
  using HiddenTiles = RowTiles<S::kHidden, S::kTileBytes>;
  using DownTiles = RowTiles<S::kIntermediate, S::kTileBytes>;
  using Cached = AttentionTiles<S::kHeadDim, S::kTileTokens, S::kCacheStageBytes>;
  using WeightRing = Ring<S::kStages, S::kStageBytes, S::kStageTiles, S::kWarps, S::kWindow>;
  using CacheStages = OwnStages<S::kCacheStages, S::kCacheStageBytes, S::kVectorWarps>;
  // The most rows that a CTA can have of a matrix; of the up projection, as many more as a row of each other one is worth.
  static __host__ __device__ constexpr int most_rows(int rows) { return (rows + S::kCtas - 1) / S::kCtas + 1; }
  static constexpr int kMostUpRows = most_rows(S::kIntermediate) + 3 + (S::kIntermediate + S::kHidden - 1) / S::kHidden;

  __device__ explicit CtaShare(int position) : cta_(blockIdx.x), position_(position) {}

 protected:
  __device__ int rows_from(int rows) const { return first_row<S::kCtas>(rows, cta_); }
  __device__ int rows_to(int rows) const { return first_row<S::kCtas>(rows, cta_ + 1); }
  __device__ int up_from() const { return up_row<S>(cta_); }
  __device__ int up_to() const { return up_row<S>(cta_ + 1); }
  __device__ bool attends() const { return cta_ < S::kHeads * S::kSplits; }
  __device__ int head() const { return cta_ / S::kSplits; }
  __device__ int split() const { return cta_ % S::kSplits; }
  __device__ int cached_tiles() const {  // of this CTA
    const int all = (position_ + Cached::kTokens - 1) / Cached::kTokens;
    return attends() ? (all - split() + S::kSplits - 1) / S::kSplits : 0;
  }
  __device__ int tile_tokens(int tile) const { return min(Cached::kTokens, position_ - (split() + tile * S::kSplits) * Cached::kTokens); }

  int cta_, position_;
};

}  // namespace clusterfusion
