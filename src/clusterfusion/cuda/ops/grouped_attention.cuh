// Decode attention of several query heads over the same keys and values (grouped-query attention, Ainslie et al. 2023), a warp's part
// of it, on the tensor cores: a tile of cached tokens is multiplied for all heads at once.
//
// Keys and values are tf32 values as they are. A query, and a softmax's weight, is the sum of two, the nearest one and what is left of
// it, and each has a column of its own: four heads are the eight columns of a product, and nothing but the last bits of fp32 is lost.
// Which dimensions and tokens a product's rows and columns stand for is free, so each lane reads 16 bytes at a time.
#pragma once

#include <cuda/std/type_traits>

#include "ops/attention.cuh"
#include "primitives/mma.cuh"

namespace clusterfusion {

// One warp's running state over its tiles, of kQueries query heads. Lane 4g + t has the softmax of heads t, t + 4, ..., of every eighth token
// from g on.
template <typename W, typename Tiles, int kQueries>
class GroupedAttentionWarp {
  static constexpr int kBlock = 16;                                   // tokens that are multiplied together
  static constexpr int kVectors = Tiles::kHeadDim / kVector;          // of a key
  static constexpr int kChunks = (kVectors + 3) / 4, kSpans = (kVectors + 7) / 8;  // of 32 dimensions, of 64
  static constexpr int kColumns = (kQueries + 3) / 4;                 // of eight, for four heads each
  static constexpr bool kRoomy = kColumns == 1 && kSpans <= 2;      // registers beside the sums of values: for more at once
  static_assert(kQueries > 1, "of one head, AttentionWarp makes less work");

 public:
  // `queries` [kQueries, kHeadDim] in shared memory.
  __device__ GroupedAttentionWarp(int lane, const float* queries) : group_(lane / 4), member_(lane % 4), queries_(queries) {
#pragma unroll
    for (float& maximum : maximum_) maximum = -kInfinity;
  }

  __device__ __forceinline__ void add_tile(const char* data, int tokens) {
    const uint4* keys = reinterpret_cast<const uint4*>(data);
    const uint4* values = reinterpret_cast<const uint4*>(data + Tiles::kValuesAt);
    StageReads reads;
    __syncwarp();  // a product takes the whole warp, whose lanes leave their waits one by one
#pragma unroll 1
    for (int first = 0; first < tokens; first += kBlock) {
      float weights[kColumns][2];  // scores first: of tokens group_ and group_ + 8 of the block
      score(reads, keys, first, tokens, weights);
#pragma unroll
      for (int column = 0; column < kColumns; column++) soften(column, weights[column]);
      weigh(reads, values, first, tokens, weights);
    }
    reads.wait();
  }

  // Writes the slot's partials, `stride` floats apart: values [kHeadDim], then maximum and sum.
  __device__ __forceinline__ void store(float* partials, int stride) {
#pragma unroll
    for (int column = 0; column < kColumns; column++) {
      const int query = 4 * column + member_;
      float* to = partials + query * stride;
      const float sum = sum_of_groups(sum_[column]);
      if (query >= kQueries) continue;
#pragma unroll
      for (int span = 0; span < kSpans; span++) {
        const int vector = 8 * span + group_;
        if (vector >= kVectors) continue;
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const float(&c)[4] = values_[column][4 * span + i];
          *reinterpret_cast<float2*>(to + vector * kVector + 2 * i) = make_float2(joined(c[0], c[1]), joined(c[2], c[3]));
        }
      }
      if (group_ == 0) to[Tiles::kHeadDim] = maximum_[column], to[Tiles::kHeadDim + 1] = sum;
    }
  }

 private:
  // A lane's parts of a chunk of the queries: of head group_ / 2, the nearest tf32 values on even groups, what is left of them on odd ones.
  struct Queries {
    float of[kColumns][kVector];
  };

  // What two columns of a head have given. The second one means nothing where the first has overflowed.
  static __device__ __forceinline__ float joined(float nearest, float rest) {
    return fabsf(nearest) == kInfinity ? nearest : nearest + rest;
  }
  // The operand of this lane's column for a value of its head.
  __device__ __forceinline__ float operand(float value) const {
    const float nearest = to_tf32(value);
    return group_ % 2 == 0 ? nearest : to_tf32(value - nearest);
  }
  // Over the lanes that share a head, on all of them.
  static __device__ __forceinline__ float sum_of_groups(float value) {
#pragma unroll
    for (int mask = kWarpSize / 2; mask >= 4; mask /= 2) value += __shfl_xor_sync(kAllLanes, value, mask);
    return value;
  }
  static __device__ __forceinline__ float highest_of_groups(float value) {
#pragma unroll
    for (int mask = kWarpSize / 2; mask >= 4; mask /= 2) value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, mask));
    return value;
  }
  // Eight elements of row `token` of a tile's keys or values, 0 where there are none. They stay packed until they are multiplied: unpacked
  // ones would take registers that the sums of wide heads need.
  struct Packed {
    unsigned word[kVector / 2];
    __device__ __forceinline__ float2 pair(int i) const { return unpack(word[i], W()); }
  };
  static __device__ __forceinline__ Packed read(StageReads& reads, const uint4* rows, int token, int tokens, int vector) {
    uint4 packed = {};
    if (token < tokens && vector < kVectors) packed = rows[token * kVectors + vector];
    reads.saw(packed.x);
    return {packed.x, packed.y, packed.z, packed.w};
  }

  __device__ __forceinline__ void load_queries(int chunk, Queries& queries) const {
    const int vector = 4 * chunk + member_;
#pragma unroll
    for (int column = 0; column < kColumns; column++) {
      const float* from = queries_ + min(4 * column + group_ / 2, kQueries - 1) * Tiles::kHeadDim + vector * kVector;
      SplitVector::Eight eight = {};
      if (vector < kVectors) eight = {reinterpret_cast<const float4*>(from)[0], reinterpret_cast<const float4*>(from)[1]};
      eight.unpack(queries.of[column]);
#pragma unroll
      for (float& value : queries.of[column]) value = operand(value);
    }
  }

  // Rows are tokens; a lane's eight dimensions are two columns in each of four products.
  __device__ __forceinline__ void score(
      StageReads& reads, const uint4* keys, int first, int tokens, float (&scores)[kColumns][2]) {
    constexpr int kSums = kRoomy ? 2 : 1;  // side by side: one waits for itself at every product
    constexpr int kChunksAtOnce = kRoomy ? 2 : 1;
    float sums[kColumns][kSums][4] = {};
#pragma unroll kChunksAtOnce
    for (int chunk = 0; chunk < kChunks; chunk++) {
      Queries queries;
      load_queries(chunk, queries);  // anew for every block: kept, they would take as many registers as the values
      const Packed upper = read(reads, keys, first + group_, tokens, 4 * chunk + member_);
      const Packed lower = read(reads, keys, first + group_ + 8, tokens, 4 * chunk + member_);
#pragma unroll
      for (int i = 0; i < kVector / 2; i++) {
        const float2 a = upper.pair(i), b = lower.pair(i);
#pragma unroll
        for (int column = 0; column < kColumns; column++) {
          const float(&q)[kVector] = queries.of[column];
          mma_16x8x8(sums[column][i % kSums], a.x, b.x, a.y, b.y, q[2 * i], q[2 * i + 1]);
        }
      }
    }
#pragma unroll
    for (int column = 0; column < kColumns; column++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float nearest = sums[column][0][2 * half], rest = sums[column][0][2 * half + 1];
        if constexpr (kSums == 2) nearest += sums[column][1][2 * half], rest += sums[column][1][2 * half + 1];
        const float score = joined(nearest, rest);
        scores[column][half] = first + group_ + 8 * half < tokens ? score : -kInfinity;
      }
    }
  }

  // Scores of a block to weights, in place; what has been summed up so far follows the maximum.
  __device__ __forceinline__ void soften(int column, float (&weights)[2]) {
    const float highest = highest_of_groups(fmaxf(weights[0], weights[1]));
    const auto [base, keep] = raise_maximum(maximum_[column], highest);
    sum_[column] = __fmul_rn(sum_[column], keep);  // not to become part of the addition behind it, in one kernel and not in another
#pragma unroll
    for (float& weight : weights) {
      weight = exp2f(weight - base);
      sum_[column] += weight;
    }
#pragma unroll
    for (int i = 0; i < 4 * kSpans; i++) {
#pragma unroll
      for (float& value : values_[column][i]) value *= keep;
    }
  }

  // Rows are dimensions, two of a lane's eight in each of four products; columns of the first operand are tokens.
  __device__ __forceinline__ void weigh(
      StageReads& reads, const uint4* values, int first, int tokens, const float (&weights)[kColumns][2]) {
    constexpr int kHalvesAtOnce = kRoomy ? 2 : 1;
#pragma unroll kHalvesAtOnce
    for (int half = 0; half < 2; half++) {
      float b[kColumns][2];
#pragma unroll
      for (int column = 0; column < kColumns; column++) {
#pragma unroll
        for (int k = 0; k < 2; k++) {
          const int from = 4 * (member_ + 4 * k) + group_ / 2;  // who has the weight of that token for this lane's head
          b[column][k] = operand(__shfl_sync(kAllLanes, half == 0 ? weights[column][0] : weights[column][1], from));
        }
      }
#pragma unroll
      for (int span = 0; span < kSpans; span++) {
        const int token = first + 8 * half + member_;
        const Packed left = read(reads, values, token, tokens, 8 * span + group_);
        const Packed right = read(reads, values, token + 4, tokens, 8 * span + group_);
#pragma unroll
        for (int i = 0; i < kVector / 2; i++) {
          const float2 a = left.pair(i), c = right.pair(i);
#pragma unroll
          for (int column = 0; column < kColumns; column++) {
            mma_16x8x8(values_[column][4 * span + i], a.x, a.y, c.x, c.y, b[column][0], b[column][1]);
          }
        }
      }
    }
  }

  int group_, member_;
  const float* queries_;
  // Of column c of a product's sums, an even one and the next are of head c / 2; rows g and g + 8 are dimensions 2i and 2i + 1 of vector g.
  float values_[kColumns][4 * kSpans][4] = {};
  float maximum_[kColumns], sum_[kColumns] = {};
};

template <typename W, typename Tiles, int kQueries>
using AttentionWarpOf =
    cuda::std::conditional_t<kQueries == 1, AttentionWarp<W, Tiles>, GroupedAttentionWarp<W, Tiles, kQueries == 1 ? 2 : kQueries>>;

}  // namespace clusterfusion
