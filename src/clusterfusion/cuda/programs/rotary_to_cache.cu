// rotary_to_cache: between the projections of a prompt and its attention: queries are rotated where they lie, keys go rotated
// and values as they are into the K/V cache (rotary embedding: Su et al. 2021). Host twin: jit/rotary_to_cache.py.
#include <cuda/std/cstdint>

#include "primitives/vector.cuh"

namespace clusterfusion {

using cuda::std::int64_t;

constexpr int kRotaryThreads = 256;

// q [tokens, heads, head_dim], k and v [tokens, kv_heads, head_dim], k_cache and v_cache [kv_heads, tokens, head_dim] from the
// first token's row on; strides in elements, heads contiguous. cos and sin [tokens, rotary / 2].
struct RotaryToCacheArguments {
  void* q;
  const void *k, *v;
  void *k_cache, *v_cache;
  const float *cos, *sin;
  int64_t q_token_stride, q_head_stride;
  int64_t kv_token_stride, kv_head_stride;
  int64_t cache_head_stride, cache_token_stride;
  int tokens;
};
static_assert(sizeof(RotaryToCacheArguments) == 112, "jit/rotary_to_cache.py lays out the same struct");

// The widest vector, of at most 16 bytes, that divides both of two counts of 16-bit elements; with one of them 0 the other.
__host__ __device__ constexpr int common_width(int one, int other) {
  int width = 8;
  while (one % width != 0 || other % width != 0) width /= 2;
  return width;
}

// work(token, head, place) for every token, head and place of this thread, in strides of the whole grid.
template <int kHeads, int kPlaces, typename Work>
__device__ __forceinline__ void for_my_places(int tokens, Work work) {
  if constexpr (kPlaces > 0) {
    const int count = tokens * (kHeads * kPlaces);  // at most 2^31: the host cuts prompts into chunks
    for (int i = blockIdx.x * kRotaryThreads + threadIdx.x; i < count; i += gridDim.x * kRotaryThreads) {
      const int row = i / kPlaces;
      work(row / kHeads, row % kHeads, i % kPlaces);
    }
  }
}

template <typename V, typename T>
__device__ __forceinline__ V load(const T* from) {
  return *reinterpret_cast<const V*>(from);
}

template <typename V, typename T>
__device__ __forceinline__ void store(T* to, const V& vector) {
  *reinterpret_cast<V*>(to) = vector;
}

// Grid: any number of CTAs. Dimension i < kRotary / 2 of a head pairs with i + kRotary / 2; a thread takes both sides of a
// pair, so that rotating in place needs no order among threads.
template <typename T, int kHeads, int kKvHeads, int kHeadDim, int kRotary>
__global__ void __launch_bounds__(kRotaryThreads) rotary_to_cache(const __grid_constant__ RotaryToCacheArguments a) {
  constexpr int kHalf = kRotary / 2;
  static_assert(kRotary % 2 == 0 && kRotary <= kHeadDim, "pairs of dimensions of a head");

  constexpr int kPair = common_width(kHalf, kHeadDim);
  for_my_places<kHeads + kKvHeads, kHalf / kPair>(a.tokens, [&](int token, int head, int place) {
    using Elements = Vector<T, kPair>;
    using Floats = Vector<float, kPair>;
    const bool is_key = head >= kHeads;
    const int kv_head = head - kHeads;
    T* const query = static_cast<T*>(a.q) + token * a.q_token_stride + head * a.q_head_stride;
    const T* const key = static_cast<const T*>(a.k) + token * a.kv_token_stride + kv_head * a.kv_head_stride;
    T* const cached = static_cast<T*>(a.k_cache) + kv_head * a.cache_head_stride + token * a.cache_token_stride;
    const int dimension = place * kPair;
    const T* const from = (is_key ? key : query) + dimension;
    T* const to = (is_key ? cached : query) + dimension;
    auto first = load<Elements>(from), second = load<Elements>(from + kHalf);
    const auto cos = load<Floats>(a.cos + token * kHalf + dimension), sin = load<Floats>(a.sin + token * kHalf + dimension);
#pragma unroll
    for (int k = 0; k < kPair; k++) {
      const float x = to_float(first.element[k]), y = to_float(second.element[k]);
      first.element[k] = from_float<T>(x * cos.element[k] - y * sin.element[k]);
      second.element[k] = from_float<T>(y * cos.element[k] + x * sin.element[k]);
    }
    store(to, first);
    store(to + kHalf, second);
  });

  constexpr int kRest = common_width(kRotary, kHeadDim);
  for_my_places<kKvHeads, (kHeadDim - kRotary) / kRest>(a.tokens, [&](int token, int head, int place) {
    const int dimension = kRotary + place * kRest;
    const T* const key = static_cast<const T*>(a.k) + token * a.kv_token_stride + head * a.kv_head_stride;
    T* const cached = static_cast<T*>(a.k_cache) + head * a.cache_head_stride + token * a.cache_token_stride;
    store(cached + dimension, load<Vector<T, kRest>>(key + dimension));
  });

  constexpr int kWhole = common_width(kHeadDim, kHeadDim);
  for_my_places<kKvHeads, kHeadDim / kWhole>(a.tokens, [&](int token, int head, int place) {
    const int dimension = place * kWhole;
    const T* const value = static_cast<const T*>(a.v) + token * a.kv_token_stride + head * a.kv_head_stride;
    T* const cached = static_cast<T*>(a.v_cache) + head * a.cache_head_stride + token * a.cache_token_stride;
    store(cached + dimension, load<Vector<T, kWhole>>(value + dimension));
  });
}

}  // namespace clusterfusion
