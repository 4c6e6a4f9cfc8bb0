// Values that say whose they are, for CTAs to pass to one another: the data are their own flag. No fence before them, no counter
// behind them, and no second trip for who finds it met; readers poll. Worth it for few values and short waits: what many CTAs
// poll for long, attention's output and h, held up the stream by more than a counter's trips (lab/decode_step.md).
//
// A pair is a 32-bit float and a 32-bit epoch, one aligned word, written and read at once. An epoch names one layer of one step
// over a buffer, so no word that is there can carry one that is still to come: every word is written again in every layer.
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
// The same, for what the reader does behind it: it comes after all that the writer has seen.
__device__ __forceinline__ void release_pair(Pair* to, float value, unsigned epoch) {
  const Pair pair = static_cast<Pair>(epoch) << 32 | __float_as_uint(value);
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(pair) : "memory");
}
__device__ __forceinline__ Pair acquire_pair(const Pair* from) {
  Pair pair;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(pair) : "l"(from) : "memory");
  return pair;
}
__device__ __forceinline__ float value_of(Pair pair) { return __uint_as_float(static_cast<unsigned>(pair)); }
__device__ __forceinline__ unsigned epoch_of(Pair pair) { return static_cast<unsigned>(pair >> 32); }

// Half as many bytes where everybody polls for a whole vector: the last bit of a float is its mark, and what is there carries either the mark that
// is waited for or the other one. For a place that is written again and again, the mark changing each time, where nobody writes before all
// have read what was there.
__device__ __forceinline__ void store_marked(unsigned* to, float value, unsigned mark) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"((__float_as_uint(value) & ~1u) | mark) : "memory");
}
// Four neighbours, 16-byte aligned.
__device__ __forceinline__ uint4 load_marked(const unsigned* from) {
  uint4 words;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "l"(from)
               : "memory");
  return words;
}
__device__ __forceinline__ bool all_marked(const uint4& words, unsigned mark) {
  return mark != 0 ? (words.x & words.y & words.z & words.w & 1) != 0 : ((words.x | words.y | words.z | words.w) & 1) == 0;
}
// The value without a mark, to within its last bit.
__device__ __forceinline__ float unmarked(float value) { return __uint_as_float(__float_as_uint(value) & ~1u); }

}  // namespace clusterfusion
