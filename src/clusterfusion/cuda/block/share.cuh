// What a decoder-layer launch is given: the layer in memory, the shape and the plan; and how far each CTA's share goes.
#pragma once

#include <cuda/std/cstdint>

#include "ops/gemv.cuh"
#include "ops/grouped_attention.cuh"
#include "ops/norm.cuh"
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
enum class Activation { gelu_erf, gelu_tanh, silu };
// Which dimensions of a head rotate together: i and i + rotary / 2, or 2 i and 2 i + 1.
enum class Pairing { halves, neighbours };

// One layer's weights. Null biases are absent. Where q, k and v are one matrix, q_weight and q_bias are all of it.
struct LayerTensors {
  const void *norm1_weight, *norm1_bias, *norm2_weight, *norm2_bias;
  const void *q_weight, *q_bias, *k_weight, *k_bias, *v_weight, *v_bias, *o_weight, *o_bias;
  const void *gate_weight, *gate_bias, *up_weight, *up_bias, *down_weight, *down_bias;
};

// The cache of one layer or of all. Strides in elements: layer l, K/V head h, token t at l * layer_stride + h * head_stride +
// t * token_stride. The tensor maps count heads through all layers.
struct KvCache {
  void *k, *v;
  void *k_new, *v_new;                   // of one layer: the current token's, [kv_heads, head_dim], or null
  cuda::std::int64_t layer_stride, head_stride, token_stride;
  cuda::std::int64_t max_len;            // tokens there is room for
};

// What launches over any layer of a model share: rotary tables, scratch memory, where to wait and to complain.
struct Workspace {
  const float *cos, *sin;                // a row a position, an angle a pair of dimensions
  cuda::std::int64_t table_stride;       // 0: one row, for the current position
  // Scratch, zero before first use.
  void* qkv;                             // [rows of q, k, v], Pair of a whole layer, float of a segment
  float* partials;                       // [heads, partials]
  void* h;                               // [intermediate]
  unsigned* counters;                    // kCounters, kCounterStride apart
  unsigned* error;                       // the error record
  float eps;
  int second_angles;                     // where a row's angles for the pairs' second halves start
};

// A launch over one layer.
struct LayerArguments {
  TensorMap k_map, v_map;                // of the caches, as [kv_heads, max_len, head_dim]
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
constexpr int kMostGroups = 4;      // head groups, and hidden groups, of CtaShare
enum Counter {  // of attention and of h one a group
  kAttentionDone, kMiddleDone = kAttentionDone + kMostGroups, kLaunchDone, kHiddenDone, kCounters = kHiddenDone + kMostGroups
};
// The error record, five words in host memory: dependency + 1 (0: none), CTA, expected, seen, claim.
constexpr int kErrorClaim = 4;
// What a CTA gave up waiting for, or, last, that the position is not in the cache.
enum Dependency { kOnQkv, kOnAttention, kOnHidden, kOnMiddle, kOnCluster, kOnResidual, kOnToken, kBadPosition };

// The shape and the plan. CTA c of kCtas owns rows [c * R / kCtas, (c + 1) * R / kCtas) of a matrix of R rows, but for the up
// projection's, which even out what that leaves uneven (up_row), and, with kHeadGroups groups of K/V heads, those of the projection of q, k and v,
// which are dealt group by group (GroupedRows). kQueries query heads that share a K/V head make a bundle, all of
// the group that shares it or a part of it: bundle b is attended by CTAs [b * kSplits, (b + 1) * kSplits), or by the first of them,
// cached tiles dealt out in turn. With parallel residual, kUpFirst says which of the two projections of the normed x comes first.
//
// The projection's rows come K/V head by K/V head: the queries of the group, its key, its value. With kFusedQkv they lie so in one
// matrix; otherwise in three. With kGated, row i of the up projection is a pair: row 2 i of what is streamed is its gate's.
template <typename W_, typename X_, int kHidden_, int kIntermediate_, int kHeads_, int kKvHeads_, int kHeadDim_, int kRotary_,
          Pairing kPairing_, Norm kNorm_, Activation kActivation_, bool kGated_, bool kFusedQkv_, bool kParallel_, bool kUpFirst_,
          int kCtas_, int kCluster_, int kQueries_, int kSplits_, int kVectorWarps_, int kWarps_, int kStages_, int kTileBytes_,
          int kStageTiles_, int kWindow_, int kEarlyWindow_, int kFifthsBeforeCached_, int kHeadGroups_, int kTileTokens_, int kSharedBytes_>
struct BlockShape {
  using W = W_;
  using X = X_;
  static constexpr int kHidden = kHidden_, kIntermediate = kIntermediate_, kHeads = kHeads_, kKvHeads = kKvHeads_;
  static constexpr int kHeadDim = kHeadDim_, kRotary = kRotary_, kCtas = kCtas_, kCluster = kCluster_;
  static constexpr int kQueries = kQueries_, kSplits = kSplits_;
  static constexpr int kVectorWarps = kVectorWarps_, kWarps = kWarps_;
  static constexpr int kStages = kStages_, kTileBytes = kTileBytes_, kStageTiles = kStageTiles_, kWindow = kWindow_;
  static constexpr int kEarlyWindow = kEarlyWindow_;  // in flight while what the stages are multiplied by is not there
  static_assert(kEarlyWindow >= 1 && kEarlyWindow <= kWindow, "nothing waits for a copy that is not under way");
  static constexpr int kStageBytes = kTileBytes * kStageTiles;
  static constexpr int kFifthsBeforeCached = kFifthsBeforeCached_, kHeadGroups = kHeadGroups_;
  static constexpr int kTileTokens = kTileTokens_, kSharedBytes = kSharedBytes_;
  static constexpr Pairing kPairing = kPairing_;
  static constexpr Norm kNorm = kNorm_;
  static constexpr Activation kActivation = kActivation_;
  static constexpr bool kGated = kGated_, kFusedQkv = kFusedQkv_, kParallel = kParallel_, kUpFirst = kUpFirst_;
  static_assert(kParallel || !kUpFirst, "sequential residual goes to the up projection by way of o");
  // Warps by their role, in this order: vectors, tiles, and one that fetches.
  static constexpr int kVectorThreads = kVectorWarps * kWarpSize, kTileThreads = kWarps * kWarpSize;
  static constexpr int kConsumers = kVectorThreads + kTileThreads, kThreads = kConsumers + kWarpSize;
  static constexpr int kQSize = kHeads * kHeadDim, kKvSize = kKvHeads * kHeadDim;  // elements of the queries, of the keys
  static constexpr int kGroup = kHeads / kKvHeads;                     // query heads that share a K/V head
  static constexpr int kGroupRows = (kGroup + 2) * kHeadDim, kQkvRows = kKvHeads * kGroupRows;
  static constexpr int kGroupQSize = kQSize / kHeadGroups;             // elements of the queries of a head group
  static_assert(kKvHeads % kHeadGroups == 0 && (kHeadGroups == 1 || !kParallel), "head groups are whole, with sequential residual");
  static_assert(kHeadGroups >= 1 && kHeadGroups <= kMostGroups, "a counter and two signals for each");
  static constexpr int kUpTimes = kGated ? 2 : 1;                      // rows streamed for a row of the up projection
  static constexpr int kBundles = kHeads / kQueries;
  static_assert(kHeads % kKvHeads == 0 && kGroup % kQueries == 0, "a bundle's heads share a K/V head");
  static_assert(kBundles * kSplits <= kCtas, "one CTA for each part of a bundle");
  static_assert(kSplits == 1 || kSplits % kCluster == 0, "a cluster works on one bundle");
  static constexpr int kMerged = kSplits == 1 ? 1 : kCluster;          // CTAs that merge over DSMEM
  static constexpr int kPartials = kSplits / kMerged;                  // partials of a head in global memory
  static constexpr int kLongest = kHidden > kQSize ? kHidden : kQSize; // fp32 vector that rows are multiplied by
};

template <int kCtas>
__device__ __forceinline__ int first_row(int rows, int cta) {
  return static_cast<unsigned>(rows) * static_cast<unsigned>(cta) / kCtas;  // in 32 bits: a vocabulary of 10 million rows fits
}

// The first row of the up projection that CTA `cta` owns: all that the CTAs before it read of a layer is then their share of it,
// to within a row. Where a CTA has too few rows of it to make up for a row of every other matrix, it is dealt out as they are.
template <typename S>
__device__ __forceinline__ int up_row(int cta) {
  constexpr long long kOut = S::kQSize + S::kIntermediate;  // elements of a row of o and one of down
  constexpr long long kUp = S::kUpTimes * S::kHidden;       // and of a row of up
  constexpr long long kLayer = S::kHidden * (S::kQkvRows + kOut) + kUp * S::kIntermediate;
  if constexpr (S::kIntermediate < (kOut / S::kHidden + 3) * S::kCtas) return first_row<S::kCtas>(S::kIntermediate, cta);
  const long long others = static_cast<long long>(first_row<S::kCtas>(S::kQkvRows, cta)) * S::kHidden +
                           first_row<S::kCtas>(S::kHidden, cta) * kOut;
  return static_cast<int>((kLayer * cta / S::kCtas - others) / kUp);
}

// GELU (Hendrycks and Gimpel 2016), exact or by tanh, and SiLU, x / (1 + e^-x).
template <Activation kActivation>
__device__ __forceinline__ float activate(float x) {
  if constexpr (kActivation == Activation::silu) return x / (1.0f + expf(-x));
  if constexpr (kActivation == Activation::gelu_erf) return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
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

// A layer's tensors, looked up anew at each use, for the same reason: eighteen addresses are 36 registers.
struct LayerOf {
  const LayerTensors* layers;
  int layer;
  __device__ __forceinline__ const LayerTensors& now() const { return layers[opaque(layer)]; }
};

// Vector `which` of at most kLongest fp32 elements in shared memory.
template <typename S>
__device__ __forceinline__ SplitVector split_vector(char* vectors, int which) {
  float4* base = reinterpret_cast<float4*>(vectors + which * S::kLongest * 4);
  return {base, base + S::kLongest / kVector};
}

// Where a row of the projection of q, k, v lies when they are three matrices: which one, which row of it, and how many rows of the
// projection follow one another there from this one on.
struct QkvRow {
  const void *weight, *bias;
  int row, run;
};
template <typename S>
__device__ __forceinline__ QkvRow qkv_row(const LayerTensors& w, int row) {
  constexpr int kQueryRows = S::kGroup * S::kHeadDim;
  const int group = row / S::kGroupRows, at = row % S::kGroupRows;
  if (at < kQueryRows) return {w.q_weight, w.q_bias, group * kQueryRows + at, kQueryRows - at};
  const bool key = at < kQueryRows + S::kHeadDim;
  const int of_head = at - kQueryRows - (key ? 0 : S::kHeadDim);
  return {key ? w.k_weight : w.v_weight, key ? w.k_bias : w.v_bias, group * S::kHeadDim + of_head, S::kHeadDim - of_head};
}

// A CTA's share of the work, as all its warps see it.
template <typename S>
class CtaShare {
 public:
  using W = typename S::W;
  using HiddenTiles = RowTiles<S::kHidden, S::kTileBytes>;  // of the projections and the LM head
  using OutTiles = RowTiles<S::kGroupQSize, S::kTileBytes>;  // of what a head group is for of each row
  static_assert(S::kHeadGroups == 1 || OutTiles::kParts == 1, "a tile for a head group's part of a row");
  static constexpr int kOutParts = S::kHeadGroups * OutTiles::kParts;  // sums of a row
  using DownTiles = RowTiles<S::kIntermediate, S::kTileBytes>;
  using Cached = AttentionTiles<S::kHeadDim, S::kTileTokens, S::kTileBytes>;
  using TileRing = Ring<S::kStages, S::kStageBytes, S::kStageTiles, S::kWarps, S::kWindow>;
  // With sequential residual nothing comes between up and down that would hide the wait for h. So h comes in hidden groups, of
  // kGroupColumns each, as many tiles of a row of down as a stage holds: up makes one after another, and down takes the first of
  // them, of all of its rows, while the others are under way.
  static constexpr int kStagesARow = DownTiles::kParts % S::kStageTiles == 0 ? DownTiles::kParts / S::kStageTiles : 1;
  static constexpr bool kAlike = DownTiles::kPartColumns * DownTiles::kParts == S::kIntermediate;
  static constexpr int kHiddenGroups = !S::kParallel && kAlike && kStagesARow <= kMostGroups ? kStagesARow : 1;
  static constexpr int kGroupColumns = S::kIntermediate / kHiddenGroups;
  static constexpr int kGroupParts = DownTiles::kParts / kHiddenGroups;
  // With kUpFirst, rows of the down projection that come before the cached tokens: while they stream, q, k and v arrive.
  static __host__ __device__ constexpr int rows_before_cached(int rows) { return rows * S::kFifthsBeforeCached / 5; }
  // The most rows that a CTA can have of a matrix; of the up projection, as many more as a row of each other one is worth.
  static __host__ __device__ constexpr int most_rows(int rows) { return (rows + S::kCtas - 1) / S::kCtas + 1; }
  static constexpr int kMostUpRows =
      most_rows(S::kIntermediate) + 2 + (S::kQSize + S::kIntermediate + S::kHidden - 1) / S::kHidden;

  __device__ explicit CtaShare(int position) : cta_(blockIdx.x), position_(position) {}

 protected:
  __device__ int rows_from(int rows) const { return first_row<S::kCtas>(rows, cta_); }
  __device__ int rows_to(int rows) const { return first_row<S::kCtas>(rows, cta_ + 1); }
  // This CTA's rows of a matrix whose rows come in kGroups groups of kOfGroup rows. They are streamed, and numbered within the CTA, group by
  // group. Over all groups they are as many as without groups: the sum of (n + g) / kGroups over g is n (Hermite's identity).
  template <int kGroups, int kOfGroup>
  struct GroupedRows {
    int from, to;  // without groups, of this CTA and of the next one
    __device__ int first(int group) const { return group * kOfGroup + (from + group) / kGroups; }
    __device__ int count(int group) const { return (to + group) / kGroups - (from + group) / kGroups; }
    // Which row the CTA's row `at` is, or -1 behind the last.
    __device__ int row(int at) const {
#pragma unroll
      for (int group = 0; group < kGroups; group++) {
        if (at < count(group)) return first(group) + at;
        at -= count(group);
      }
      return -1;
    }
  };
  using QkvRows = GroupedRows<S::kHeadGroups, S::kQkvRows / S::kHeadGroups>;
  using UpRows = GroupedRows<kHiddenGroups, kGroupColumns>;
  __device__ QkvRows qkv_rows() const {
    const int cta = opaque(cta_);
    return {first_row<S::kCtas>(S::kQkvRows, cta), first_row<S::kCtas>(S::kQkvRows, cta + 1)};
  }
  __device__ UpRows up_rows() const {  // computed anew at each use: they would be kept for as long as a layer takes
    const int cta = opaque(cta_);
    return {up_row<S>(cta), up_row<S>(cta + 1)};
  }
  __device__ bool attends() const { return cta_ < S::kBundles * S::kSplits; }
  __device__ int bundle() const { return cta_ / S::kSplits; }
  __device__ int kv_head() const { return bundle() / (S::kGroup / S::kQueries); }
  __device__ int head_group() const { return kv_head() / (S::kKvHeads / S::kHeadGroups); }
  __device__ int bundle_of_group() const { return bundle() % (S::kGroup / S::kQueries); }
  __device__ int split() const { return cta_ % S::kSplits; }
  __device__ int all_tiles() const { return (position_ + Cached::kTokens - 1) / Cached::kTokens; }  // of a bundle's cached tokens
  // CTAs that share a bundle's cached tokens, whole clusters: as many as have a tile for each CTA, so that all stream as much, where
  // weights stream while attention is under way. Otherwise everyone waits for it, and reads what every cluster has made of it: only
  // as many as have a tile for each of their warps.
  __device__ int active_splits() const {
    constexpr int kTiles = (S::kUpFirst ? 1 : S::kWarps) * S::kMerged;  // of a cluster
    return max(1, min(S::kPartials, (all_tiles() + kTiles - 1) / kTiles)) * S::kMerged;
  }
  __device__ int cached_tiles() const {  // of this CTA
    const int active = active_splits();
    return attends() && split() < active ? (all_tiles() - split() + active - 1) / active : 0;
  }
  // Partials of a head that hold anything: a cluster without a cached token has left none, but for the first, which has the new one.
  __device__ int used_partials() const { return active_splits() / S::kMerged; }
  // Whether this CTA's cluster has a partial to make: of cached tokens, or of the new one.
  __device__ bool works() const { return attends() && split() / S::kMerged < used_partials(); }
  __device__ int tile_tokens(int tile) const {
    return min(Cached::kTokens, position_ - (split() + tile * active_splits()) * Cached::kTokens);
  }

  int cta_, position_;
};

}  // namespace clusterfusion
