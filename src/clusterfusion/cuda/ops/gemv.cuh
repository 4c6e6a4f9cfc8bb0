// Matrix times vector over tiles of rows from the ring: fp32 sums, in an order that depends on the row's length and on how a plan cuts it.
//
// A row's sum: lane l takes the 8-element vectors l, l + 32, ... of the row (of each part of a row longer than a stage),
// in order, into two sums, of a vector's first four elements and of its last: one would wait for itself at every addition. Then
// their sum, a butterfly over the lanes, and the parts in order. Which CTA or warp computes a row changes nothing.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda/std/type_traits>

#include "collectives/block_sum.cuh"
#include "ops/ring.cuh"

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
  static __host__ __device__ constexpr int tiles(int rows, int parts = kParts) {  // with so many of a row's parts
    return kParts > 1 ? rows * parts : (rows + kRows - 1) / kRows;
  }
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
  float low = 0, high = 0;
  __device__ __forceinline__ void add(const float (&a)[kVector], const float (&b)[kVector]) {
#pragma unroll
    for (int k = 0; k < kVector / 2; k++) {
      low = fmaf(a[k], b[k], low);
      high = fmaf(a[k + kVector / 2], b[k + kVector / 2], high);
    }
  }
  __device__ __forceinline__ float total() const { return low + high; }
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

// Whether a warp has a tile's weights in registers before it multiplies them: it hands the stage back at once, and while x is not
// there yet, the warps' registers are that much more ring. With more 16-byte vectors a lane than this, it reads them where they are;
// on Blackwell always, for which the compiler spills them. And of longer rows than kMostUnrolled of these, a loop's turn takes kTurn.
#if __CUDA_ARCH__ >= 1000
constexpr int kMostHeld = 0, kMostUnrolled = 10, kTurn = 10;
#else
constexpr int kMostHeld = 20, kMostUnrolled = 20, kTurn = 8;
#endif

// This CTA's `rows` rows, in tiles, or kPartsHere parts of each of them and of x as well; calls out(row, part, value) on one lane
// for each row and part, both from 0. Every warp calls ready() once, and behind it reads x. flush() comes before a lane is called
// a second time, and at the end: until then out may keep what it got in a register.
template <typename W, typename Tiles, int kPartsHere = Tiles::kParts, typename Consumer, typename X, typename Ready, typename Out,
          typename Flush = Nothing>
__device__ __forceinline__ void gemv(
    Consumer& consumer, int rows, const X& x, int lane, Ready ready, Out out, Flush flush = Flush()) {
  using Eight = typename X::Eight;
  constexpr int kRowVectors = (Tiles::kParts > 1 ? Tiles::kPartColumns : Tiles::kColumns) / kVector;
  constexpr int kSteps = (kRowVectors + kWarpSize - 1) / kWarpSize, kUnrolled = kSteps <= kMostUnrolled ? kSteps : kTurn;
  constexpr bool kEven = Tiles::kBytes * Tiles::kParts % Tiles::kRowBytes == 0;  // parts are alike
  static_assert(kPartsHere == Tiles::kParts || kEven, "parts are alike, whichever they are");
  constexpr bool kWhole = kEven && kRowVectors % kWarpSize == 0;
  constexpr int kTogether = Tiles::kRows >= 4 ? 4 : Tiles::kRows >= 2 ? 2 : 1;  // rows that share each read of x
  constexpr int kGroup = kWarpSize / kTogether;                                 // lanes that have a row's sum
  constexpr bool kHolds = Tiles::kRows <= kTogether && kSteps * kTogether <= kMostHeld;
  struct Held {
    uint4 of[kHolds ? kTogether : 1][kHolds ? kSteps : 1];
  };
  bool is_ready = false;
  const auto make_ready = [&] {
    if (!is_ready) ready();
    is_ready = true;
  };
  constexpr bool kFlushes = !cuda::std::is_same_v<Flush, Nothing>;
  int turn = 0;  // which lane of a group is called; without a flush, always the first
  const auto next_turn = [&] {
    if (!kFlushes || ++turn < kGroup) return;
    turn = 0;
    flush();
  };
  const auto part_of = [](int tile) { return kPartsHere > 1 ? tile % kPartsHere : 0; };
  // Vectors of a row, or of a part of one.
  const auto vectors_of = [&](int tile) {
    return kEven ? kRowVectors : min(kRowVectors, Tiles::kColumns / kVector - part_of(tile) * kRowVectors);
  };
  const auto load = [&](StageReads& reads, const char* data, int r, int v, int vectors) {
    uint4 packed = {};
    if (kWhole || v < vectors) packed = reinterpret_cast<const uint4*>(data)[r * kRowVectors + v];
    reads.saw(packed.x);
    return packed;
  };
  // Rows base to base + kTogether - 1 of a tile: those that are held, or where they are, at `data`.
  const auto multiply = [&](int tile, int base, const char* data, const Held& held, StageReads& reads) {
    const int part = part_of(tile), vectors = vectors_of(tile);
    LaneSum sums[kTogether];
#pragma unroll kUnrolled
    for (int step = 0; step < kSteps; step++) {
      const int v = step * kWarpSize + lane;
      Eight other = {};
      if (kWhole || v < vectors) other = x.get(part * kRowVectors + v);
      float b[kVector];
      other.unpack(b);
#pragma unroll
      for (int r = 0; r < kTogether; r++) {
        if (Tiles::kRows % kTogether != 0 && base + r >= Tiles::kRows) continue;
        float a[kVector];
        if constexpr (kHolds) {
          unpack8<W>(held.of[r][step], a);
        } else {
          unpack8<W>(load(reads, data, base + r, v, vectors), a);
        }
        sums[r].add(a, b);
      }
    }
    float totals[kTogether];
#pragma unroll
    for (int r = 0; r < kTogether; r++) totals[r] = sums[r].total();
    const float total = warp_sums(totals, lane);
    const int of_tile = base + lane / kGroup, row = tile / kPartsHere * Tiles::kRows + of_tile;
    if (lane % kGroup == turn && of_tile < Tiles::kRows && row < rows) out(row, part, total);
    next_turn();
  };
  consumer.template tiles<Tiles::kBytes, Held>(
      Tiles::tiles(rows, kPartsHere),
      [&](int tile, const char* data) {
        Held held = {};
        StageReads reads;
        if constexpr (kHolds) {
#pragma unroll
          for (int r = 0; r < Tiles::kRows; r++) {
#pragma unroll
            for (int step = 0; step < kSteps; step++) held.of[r][step] = load(reads, data, r, step * kWarpSize + lane, vectors_of(tile));
          }
        } else {
          make_ready();
#pragma unroll 1
          for (int base = 0; base < Tiles::kRows; base += kTogether) {
            if (tile / kPartsHere * Tiles::kRows + base >= rows) break;
            multiply(tile, base, data, held, reads);
          }
        }
        reads.wait();
        return held;
      },
      [&](int tile, const Held& held) {
        if constexpr (kHolds) {
          make_ready();
          StageReads none;
          multiply(tile, 0, nullptr, held, none);
        }
      });
  make_ready();
  flush();
}

}  // namespace clusterfusion
