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

// Subtracts the mean from values, roughly: what is left of it is in the transform's shift.
//
// Two steps over registers: the mean, then centred sums. E[x^2] - E[x]^2 would lose digits to a large mean. The second
// step sums the centred values too, so that the rounding of the mean itself is corrected (the corrected two-pass
// algorithm: Chan, Golub and LeVeque 1983); at mean 1000 and deviation 1 that rounding is the largest error of a
// two-step LayerNorm in fp32, and its correction rides along in the second exchange.
// Collectives: two BlockSum::add and two ClusterReduce exchanges, in this order: add, exchange, add, exchange.
template <int kItems, typename Team, typename Block, typename Reduce>
__device__ __forceinline__ NormTransform
layer_norm_transform(float (&values)[kItems], int valid, float inverse_hidden, float eps, Team& team, Block& block, Reduce& reduce) {
  float sum[1] = {0.0f};
#pragma unroll
  for (int k = 0; k < kItems; k++) sum[0] += k < valid ? values[k] : 0.0f;
  block.add(team, sum);
  reduce.exchange(team, 1, [&](int i) { return block.total(i); });
  const float mean = reduce.result(0) * inverse_hidden;

  float centred[kNormSums] = {0.0f, 0.0f};  // sum, sum of squares
#pragma unroll
  for (int k = 0; k < kItems; k++) {
    values[k] = k < valid ? values[k] - mean : 0.0f;
    centred[0] += values[k];
    centred[1] += values[k] * values[k];
  }
  block.add(team, centred);
  reduce.exchange(team, kNormSums, [&](int i) { return block.total(i); });
  const float rest = reduce.result(0) * inverse_hidden;
  float variance = reduce.result(1) * inverse_hidden - rest * rest;
  if (variance < 0.0f) variance = 0.0f;  // a constant row's rounding; a NaN stays one, which fmaxf would hide
  const float scale = reciprocal_sqrt(variance + eps);
  return {scale, -rest * scale};
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
