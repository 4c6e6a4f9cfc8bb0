// Values that carry their epoch, for CTAs to pass to one another: the data are their own flag. No fence before them, no counter
// behind them, and no second trip for who finds it met; readers poll.
//
// A pair is a 32-bit float and a 32-bit epoch; a short pair a 16-bit value and the low half of an epoch. Each is one aligned
// word, written and read at once. An epoch names one layer of one launch over a buffer, so no word that is there can carry one
// that is still to come: every word is written again in every layer.
#pragma once

#include <cuda/std/cstdint>

namespace clusterfusion {

using Pair = unsigned long long;

__device__ __forceinline__ void store_pair(Pair* to, float value, unsigned epoch) {
  const Pair pair = static_cast<Pair>(epoch) << 32 | __float_as_uint(value);
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(pair) : "memory");
}
__device__ __forceinline__ Pair load_pair(const Pair* from) {
  Pair pair;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(pair) : "l"(from) : "memory");
  return pair;
}
__device__ __forceinline__ void load_pairs(const Pair* from, Pair& a, Pair& b) {  // two neighbours, 16-byte aligned
  asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];" : "=l"(a), "=l"(b) : "l"(from) : "memory");
}
__device__ __forceinline__ float value_of(Pair pair) { return __uint_as_float(static_cast<unsigned>(pair)); }
__device__ __forceinline__ unsigned epoch_of(Pair pair) { return static_cast<unsigned>(pair >> 32); }

// The value in the low half, so that two of them are packed by one byte permutation.
__device__ __forceinline__ void store_short_pair(unsigned* to, unsigned short bits, unsigned epoch) {
  const unsigned pair = epoch << 16 | bits;
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(pair) : "memory");
}
__device__ __forceinline__ uint4 load_short_pairs(const unsigned* from) {  // four neighbours, 16-byte aligned
  uint4 pairs;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(pairs.x), "=r"(pairs.y), "=r"(pairs.z), "=r"(pairs.w)
               : "l"(from)
               : "memory");
  return pairs;
}
__device__ __forceinline__ bool all_of_epoch(uint4 pairs, unsigned epoch) {
  const unsigned wanted = epoch << 16;
  return (((pairs.x ^ wanted) | (pairs.y ^ wanted) | (pairs.z ^ wanted) | (pairs.w ^ wanted)) & 0xffff0000u) == 0;
}
__device__ __forceinline__ uint2 values_of(uint4 pairs) {
  return make_uint2(__byte_perm(pairs.x, pairs.y, 0x5410), __byte_perm(pairs.z, pairs.w, 0x5410));
}

}  // namespace clusterfusion
