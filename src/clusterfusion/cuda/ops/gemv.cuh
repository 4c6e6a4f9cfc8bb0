// Matrix times vector over tiles of rows from the ring: fp32 sums, in an order that depends on the row's length alone.
//
// A row's sum: lane l takes the 8-element vectors l, l + 32, ... of the row (of each part of a row longer than a stage),
// in order, into four sums, two elements of a vector each: one sum would wait for itself at every addition. These by two, then a
// butterfly over the lanes; then the parts in order. Which CTA or warp computes a row changes nothing.
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
  struct Eight {
    float4 low, high;
    __device__ __forceinline__ void unpack(float (&out)[kVector]) const {
      out[0] = low.x, out[1] = low.y, out[2] = low.z, out[3] = low.w;
      out[4] = high.x, out[5] = high.y, out[6] = high.z, out[7] = high.w;
    }
  };
  float4 *low, *high;
  __device__ __forceinline__ Eight get(int vector) const { return {low[vector], high[vector]}; }
  // Elements 4 * quad to 4 * quad + 3.
  __device__ __forceinline__ float4& quad(int quad) const { return (quad & 1 ? high : low)[quad >> 1]; }
};

// A vector of 16-bit elements in shared memory.
template <typename W>
struct PackedVector {
  struct Eight {
    uint4 packed;
    __device__ __forceinline__ void unpack(float (&out)[kVector]) const { unpack8<W>(packed, out); }
  };
  const uint4* data;
  __device__ __forceinline__ Eight get(int vector) const { return {data[vector]}; }
};

// What one lane adds up of a row.
struct LaneSum {
  float of[4] = {};
  __device__ __forceinline__ void add(const float (&a)[kVector], const float (&b)[kVector]) {
#pragma unroll
    for (int k = 0; k < kVector; k++) of[k / 2] = fmaf(a[k], b[k], of[k / 2]);
  }
  __device__ __forceinline__ float total() const { return (of[0] + of[1]) + (of[2] + of[3]); }
};

// The warp_sum of each of kRows values a lane, 1, 2 or 4, on the kWarpSize / kRows lanes from lane row * kWarpSize / kRows on: while
// there are several rows, half of the lanes go on with half of them.
template <int kRows>
__device__ __forceinline__ float warp_sums(float (&values)[kRows], int lane) {
  static_assert(kRows == 1 || kRows == 2 || kRows == 4, "halved until there is one");
  int mask = kWarpSize / 2;
#pragma unroll
  for (int rows = kRows / 2; rows > 0; rows /= 2, mask /= 2) {
    const bool upper = lane & mask;
#pragma unroll
    for (int r = 0; r < rows; r++) {
      const float other = __shfl_xor_sync(kAllLanes, upper ? values[r] : values[r + rows], mask);
      values[r] = (upper ? values[r + rows] : values[r]) + other;
    }
  }
#pragma unroll
  for (; mask > 0; mask /= 2) values[0] += __shfl_xor_sync(kAllLanes, values[0], mask);
  return values[0];
}

struct Nothing {
  __device__ __forceinline__ void operator()() const {}
};

// This CTA's `rows` rows, in tiles; calls out(row, part, value) on one lane for each row and part, rows from 0. flush() comes before
// a lane is called a second time, and at the end: until then out may keep what it got in a register.
template <typename W, typename Tiles, typename Consumer, typename X, typename Out, typename Flush = Nothing>
__device__ __forceinline__ void gemv(Consumer& consumer, int rows, const X& x, int lane, Out out, Flush flush = Flush()) {
  using Eight = typename X::Eight;
  constexpr int kRowVectors = (Tiles::kParts > 1 ? Tiles::kPartColumns : Tiles::kColumns) / kVector;
  constexpr int kSteps = (kRowVectors + kWarpSize - 1) / kWarpSize, kUnrolled = kSteps <= 16 ? kSteps : 8;
  constexpr bool kWhole = kRowVectors % kWarpSize == 0 && Tiles::kBytes * Tiles::kParts % Tiles::kRowBytes == 0;
  constexpr int kTogether = Tiles::kRows >= 4 ? 4 : Tiles::kRows >= 2 ? 2 : 1;  // rows that share each read of x
  constexpr int kGroup = kWarpSize / kTogether;                                 // lanes that have a row's sum
  int turn = 0;  // which of them is called
  const auto next_turn = [&] {
    if (++turn < kGroup) return;
    turn = 0;
    flush();
  };
  consumer.template tiles<Tiles::kBytes>(Tiles::tiles(rows), [&](int tile, const char* data) {
    const uint4* weights = reinterpret_cast<const uint4*>(data);
    if constexpr (Tiles::kParts > 1) {
      const int row = tile / Tiles::kParts, part = tile % Tiles::kParts;
      const int vectors = min(kRowVectors, Tiles::kColumns / kVector - part * kRowVectors);
      LaneSum sum;
#pragma unroll kUnrolled
      for (int step = 0; step < kSteps; step++) {
        const int v = step * kWarpSize + lane;
        uint4 packed = {};
        Eight other = {};
        if (kWhole || v < vectors) packed = weights[v], other = x.get(part * kRowVectors + v);
        float a[kVector], b[kVector];
        unpack8<W>(packed, a);
        other.unpack(b);
        sum.add(a, b);
      }
      const float total = warp_sum(sum.total());
      if (lane == turn) out(row, part, total);
      next_turn();
    } else {
      const int first = tile * Tiles::kRows;
#pragma unroll 1
      for (int base = 0; base < Tiles::kRows; base += kTogether) {
        if (first + base >= rows) break;
        LaneSum sums[kTogether];
#pragma unroll kUnrolled
        for (int step = 0; step < kSteps; step++) {
          const int v = step * kWarpSize + lane;
          const bool there = kRowVectors % kWarpSize == 0 || v < kRowVectors;
          Eight other = {};
          if (there) other = x.get(v);
          float b[kVector];
          other.unpack(b);
#pragma unroll
          for (int r = 0; r < kTogether; r++) {
            if (Tiles::kRows % kTogether != 0 && base + r >= Tiles::kRows) continue;
            uint4 packed = {};
            if (there) packed = weights[(base + r) * kRowVectors + v];
            float a[kVector];
            unpack8<W>(packed, a);
            sums[r].add(a, b);
          }
        }
        float totals[kTogether];
#pragma unroll
        for (int r = 0; r < kTogether; r++) totals[r] = sums[r].total();
        const float total = warp_sums(totals, lane);
        const int row = base + lane / kGroup;
        if (lane % kGroup == turn && row < Tiles::kRows && first + row < rows) out(first + row, 0, total);
        next_turn();
      }
    }
  });
  flush();
}

}  // namespace clusterfusion
