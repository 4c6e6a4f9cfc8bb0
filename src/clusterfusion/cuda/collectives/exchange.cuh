// What the collectives share: how partials travel, what they are accumulated in, and the usual operators.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace clusterfusion {

// direct: every CTA writes to every peer; one barrier, cluster size writes an element.
// tree: recursive doubling; log2(cluster size) barriers. A reduction sends one write an element and step.
// A barrier costs 365-420 clocks on an H200 whatever the size, so direct is the default for short vectors.
enum class Exchange { direct, tree };

__host__ __device__ constexpr int log2_of(int power_of_two) { return power_of_two <= 1 ? 0 : 1 + log2_of(power_of_two / 2); }
__host__ __device__ constexpr bool is_cluster_size(int size) { return size == 1 || size == 2 || size == 4 || size == 8; }

// The type in which values of type T are sent and folded: float for the 16-bit floats, else T itself.
template <typename T>
struct AccumulatorOf {
  using type = T;
};
template <>
struct AccumulatorOf<__half> {
  using type = float;
};
template <>
struct AccumulatorOf<__nv_bfloat16> {
  using type = float;
};
template <typename T>
using Accumulator = typename AccumulatorOf<T>::type;

// An operator is any associative `V operator()(V, V) const`; it need not commute, since operands come in rank order.
struct Sum {
  template <typename V>
  __device__ __forceinline__ V operator()(V a, V b) const {
    return a + b;
  }
};

struct Max {  // NaN if either is NaN, as torch.max; fmaxf would drop it
  template <typename V>
  __device__ __forceinline__ V operator()(V a, V b) const {
    return a > b || a != a ? a : b;
  }
};

}  // namespace clusterfusion
