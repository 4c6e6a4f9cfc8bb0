// Matrix times vector over tiles of rows from the ring: fp32 sums, in an order that depends on the row's length alone.
//
// A row's sum: lane l takes the 8-element vectors l, l + 32, ... of the row (of each part of a row longer than a stage),
// in order; then a butterfly over the lanes; then the parts in order. Which CTA or warp computes a row changes nothing.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "collectives/block_sum.cuh"

namespace clusterfusion {

constexpr int kVector = 8;  // elements of 16 bits in a 16-byte access

__device__ __forceinline__ float2 unpack(unsigned pair, __half) {
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}
__device__ __forceinline__ float2 unpack(unsigned pair, __nv_bfloat16) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

template <typename W>
__device__ __forceinline__ void unpack8(uint4 packed, float (&out)[kVector]) {
  const unsigned words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float2 pair = unpack(words[i], W());
    out[2 * i] = pair.x;
    out[2 * i + 1] = pair.y;
  }
}

// How a matrix of rows of kColumns elements is cut into tiles of at most kTileBytes.
template <int kColumns_, int kTileBytes>
struct RowTiles {
  static constexpr int kColumns = kColumns_;
  static constexpr int kRowBytes = kColumns * 2;
  static_assert(kColumns % kVector == 0, "rows are whole 16-byte vectors");
  static constexpr int kRows = kRowBytes <= kTileBytes ? kTileBytes / kRowBytes : 1;                // rows a tile
  static constexpr int kParts = (kRowBytes + kTileBytes - 1) / kTileBytes;                          // tiles a row
  static constexpr int kPartColumns = (kColumns / kVector + kParts - 1) / kParts * kVector;         // of all but the last
  static constexpr int kBytes = kParts > 1 ? kPartColumns * 2 : kRows * kRowBytes;                  // of a whole tile
  static __host__ __device__ constexpr int tiles(int rows) { return kParts > 1 ? rows * kParts : (rows + kRows - 1) / kRows; }
};

// An fp32 vector in shared memory as two arrays of float4: elements 0-3 and 4-7 of each group of eight, so that a warp's
// 16-byte reads are free of bank conflicts.
struct SplitVector {
  float4 *low, *high;
  __device__ __forceinline__ void get(int vector, float (&out)[kVector]) const {
    const float4 a = low[vector], b = high[vector];
    out[0] = a.x, out[1] = a.y, out[2] = a.z, out[3] = a.w, out[4] = b.x, out[5] = b.y, out[6] = b.z, out[7] = b.w;
  }
  // Elements 4 * quad to 4 * quad + 3.
  __device__ __forceinline__ float4& quad(int quad) const { return (quad & 1 ? high : low)[quad >> 1]; }
};

// A vector of 16-bit elements in shared memory.
template <typename W>
struct PackedVector {
  const uint4* data;
  __device__ __forceinline__ void get(int vector, float (&out)[kVector]) const { unpack8<W>(data[vector], out); }
};

// This CTA's `rows` rows, in tiles; calls out(row, part, value) on one lane for each row and part, rows from 0.
template <typename W, typename Tiles, typename Consumer, typename X, typename Out>
__device__ __forceinline__ void gemv(Consumer& consumer, int rows, const X& x, int lane, Out out) {
  constexpr int kRowVectors = (Tiles::kParts > 1 ? Tiles::kPartColumns : Tiles::kColumns) / kVector;
  constexpr int kSteps = (kRowVectors + kWarpSize - 1) / kWarpSize;
  constexpr int kTogether = Tiles::kRows < 4 ? Tiles::kRows : 4;  // rows that share each read of x
  consumer.template tiles<Tiles::kBytes>(Tiles::tiles(rows), [&](int tile, const char* data) {
    const uint4* weights = reinterpret_cast<const uint4*>(data);
    if constexpr (Tiles::kParts > 1) {
      const int row = tile / Tiles::kParts, part = tile % Tiles::kParts;
      const int vectors = min(kRowVectors, Tiles::kColumns / kVector - part * kRowVectors);
      float sum = 0;
#pragma unroll 5
      for (int step = 0; step < kSteps; step++) {
        const int v = step * kWarpSize + lane;
        if (v < vectors) {
          float a[kVector], b[kVector];
          unpack8<W>(weights[v], a);
          x.get(part * kRowVectors + v, b);
#pragma unroll
          for (int k = 0; k < kVector; k++) sum = fmaf(a[k], b[k], sum);
        }
      }
      sum = warp_sum(sum);
      if (lane == 0) out(row, part, sum);
    } else {
      const int first = tile * Tiles::kRows;
#pragma unroll 1
      for (int base = 0; base < Tiles::kRows; base += kTogether) {
        if (first + base >= rows) break;
        float sum[kTogether] = {};
#pragma unroll
        for (int step = 0; step < kSteps; step++) {
          const int v = step * kWarpSize + lane;
          if (kRowVectors % kWarpSize == 0 || v < kRowVectors) {
            float b[kVector];
            x.get(v, b);
#pragma unroll
            for (int r = 0; r < kTogether; r++) {
              if (Tiles::kRows % kTogether != 0 && base + r >= Tiles::kRows) continue;
              float a[kVector];
              unpack8<W>(weights[(base + r) * kRowVectors + v], a);
#pragma unroll
              for (int k = 0; k < kVector; k++) sum[r] = fmaf(a[k], b[k], sum[r]);
            }
          }
        }
#pragma unroll
        for (int r = 0; r < kTogether; r++) {
          const float total = warp_sum(sum[r]);
          if (lane == r && base + r < Tiles::kRows && first + base + r < rows) out(first + base + r, 0, total);
        }
      }
    }
  });
}

}  // namespace clusterfusion
