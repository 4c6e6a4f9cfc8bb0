// LayerNorm (Ba, Kiros and Hinton 2016) and RMSNorm (Zhang and Sennrich 2019) of a row that a team holds in registers.
//
// Member t of CTA r holds some elements of the row in values[0 .. valid - 1]; which ones is the caller's choice. Both
// functions take inverse_hidden, 1 / the row's length, and return the transform that normalises what is then in values: y = scale * value + shift.
#pragma once

#include "collectives/block_sum.cuh"

namespace clusterfusion {

enum class Norm { layer_norm, rms_norm };

struct NormTransform {
  float scale;
  float shift;
};

constexpr int kNormSums = 2;  // the longest exchange of a norm, and its ClusterReduce's least kLength

// 1 / sqrt(value), within about half an ulp. rsqrtf alone is off by up to 2, one error for a whole row; 1.0f / sqrtf calls
// two subroutines, around which the compiler spilled registers.
__device__ __forceinline__ float reciprocal_sqrt(float value) {
  const float estimate = rsqrtf(value);
  const float residual = fmaf(-value * estimate, estimate, 1.0f);         // one Newton step ...
  const float refined = fmaf(0.5f * estimate, residual, estimate);
  return residual == residual ? refined : estimate;                       // ... but not at 0 and infinity
}

// When a LayerNorm takes its second step. While mean^2 is at most the variance, E[x^2] - E[x]^2 loses one bit to the difference, and a few
// more for adversarial rows: below 1e-6 of the variance, nothing beside what else a decoder rounds, but to be seen in a float32 result.
enum class Centring { always, where_needed };

// Two steps over registers: sums, and, when the mean has been subtracted from values, centred sums. What is left of the mean, by its own
// rounding, is in the transform's shift (the corrected two-pass algorithm: Chan, Golub and LeVeque 1983); at mean 1000 and deviation 1 that
// rounding would be the largest error in fp32. With Centring::where_needed a row is done after the first step, and values stay as they are,
// unless its mean is large or its squares are not finite.
// Collectives: a BlockSum::add and a ClusterReduce exchange a step. All members of a cluster see the same sums, so they all take as many.
// Between steps a team block_sync, for a Reduce that has no barrier of its own: the next add is not before all have read their totals.
template <Centring kCentring, int kItems, typename Team, typename Block, typename Reduce>
__device__ __forceinline__ NormTransform
layer_norm_transform(float (&values)[kItems], int valid, float inverse_hidden, float eps, Team& team, Block& block, Reduce& reduce) {
#pragma unroll 1
  for (bool centred = false;; centred = true) {
    float sums[kNormSums] = {0.0f, 0.0f};  // sum, sum of squares
#pragma unroll
    for (int k = 0; k < kItems; k++) {
      const float value = k < valid ? values[k] : 0.0f;
      sums[0] += value;
      sums[1] = fmaf(value, value, sums[1]);
    }
    block.add(team, sums);
    reduce.exchange(team, kNormSums, [&](int i) { return block.total(i); });
    const float mean = reduce.result(0) * inverse_hidden, squares = reduce.result(1) * inverse_hidden;
    float variance = fmaf(-mean, mean, squares);
    const bool enough = kCentring == Centring::where_needed && mean * mean <= variance && isfinite(squares);
    if (centred || enough) {
      if (variance < 0.0f) variance = 0.0f;  // a constant row's rounding; a NaN stays one, which fmaxf would hide
      const float scale = reciprocal_sqrt(variance + eps);
      return {scale, -mean * scale};
    }
#pragma unroll
    for (int k = 0; k < kItems; k++) {
      if (k < valid) values[k] = __fsub_rn(values[k], mean);  // never contracted with what made the value
    }
    team.block_sync();
  }
}

// Leaves values as they are. Collectives: one BlockSum::add, then one ClusterReduce exchange.
template <int kItems, typename Team, typename Block, typename Reduce>
__device__ __forceinline__ NormTransform
rms_norm_transform(float (&values)[kItems], int valid, float inverse_hidden, float eps, Team& team, Block& block, Reduce& reduce) {
  float squares[1] = {0.0f};
#pragma unroll
  for (int k = 0; k < kItems; k++) squares[0] += k < valid ? values[k] * values[k] : 0.0f;
  block.add(team, squares);
  reduce.exchange(team, 1, [&](int i) { return block.total(i); });
  return {reciprocal_sqrt(reduce.result(0) * inverse_hidden + eps), 0.0f};
}

}  // namespace clusterfusion
