// cluster_norm: LayerNorm or RMSNorm of rows, each row split over the CTAs of one cluster. Host twin: jit/cluster_norm.py.
#include <cuda/std/cstdint>

#include "collectives/cluster_reduce.cuh"
#include "collectives/team.cuh"
#include "ops/norm.cuh"
#include "primitives/vector.cuh"

namespace clusterfusion {

// Up to so many elements a thread, weight and bias are fetched before the exchanges, which hide their latency. Beyond,
// they do not fit in the 128 registers of a thread of 512 beside x: 8 to 64 bytes spilled.
constexpr int kPrefetchItems = 16;

// Said to the compiler so that it does not spill to make room for a second block on an SM, which a few rows never fill.
constexpr int kMinBlocks = 1;

// Grid: one cluster a row. x [rows, hidden] with rows row_stride elements apart; out [rows, hidden] contiguous;
// weight and bias [hidden], bias may be null. Arithmetic is fp32 whatever the types; x is read once, into registers.
// A thread takes kItems elements in vectors of kWidth; with kWidth > 1, hidden, row_stride and all addresses are
// multiples of it (addresses: of kWidth elements or 16 bytes, whichever is less). inverse_hidden is 1 / hidden.
template <typename X, typename W, typename Out, Norm kNorm, int kClusterSize, Exchange kExchange, int kThreads, int kItems,
          int kWidth>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
cluster_norm(const X* __restrict__ x, const W* __restrict__ weight, const W* __restrict__ bias, Out* __restrict__ out,
             cuda::std::int64_t row_stride, int hidden, float inverse_hidden, float eps) {
  static_assert(kItems % kWidth == 0, "a thread takes whole vectors");
  constexpr int kVectors = kItems / kWidth;
  using Team = WholeTeam<kClusterSize, kThreads>;
  using Block = BlockSum<kNormSums, kThreads>;
  using Reduce = ClusterReduce<float, kNormSums, kClusterSize, kExchange>;
  __shared__ typename Block::Scratch block_scratch;
  __shared__ typename Reduce::Scratch reduce_scratch;

  if constexpr (kClusterSize > 1) cluster_arrive();  // peers must have started; waited for once x is on its way
  Team team;
  Block block(block_scratch);
  Reduce reduce(reduce_scratch);

  // This thread's vectors lie kStride elements apart; pointers to its first one leave constant offsets to the others.
  constexpr int kStride = kThreads * kWidth;
  const int share = ((hidden + kClusterSize - 1) / kClusterSize + kWidth - 1) / kWidth * kWidth;
  const int begin = static_cast<int>(team.rank()) * share;
  const int first = begin + team.thread() * kWidth;
  const int remaining = min(begin + share, hidden) - first;  // vector v is this thread's if v * kStride < remaining
  const cuda::std::int64_t row = blockIdx.x / kClusterSize;
  const X* x_first = x + row * row_stride + first;
  const W* weight_first = weight + first;
  const W* bias_first = bias == nullptr ? nullptr : bias + first;
  Out* out_first = out + row * hidden + first;

  float values[kItems];
  constexpr bool kPrefetch = kItems <= kPrefetchItems;
  Vector<W, kWidth> weights[kVectors], biases[kVectors];
  const auto fetch_parameters = [&](int v) {
    weights[v] = *reinterpret_cast<const Vector<W, kWidth>*>(weight_first + v * kStride);
    if (bias_first != nullptr) biases[v] = *reinterpret_cast<const Vector<W, kWidth>*>(bias_first + v * kStride);
  };
  int valid = 0;
#pragma unroll
  for (int v = 0; v < kVectors; v++) {
    if (v * kStride < remaining) {
      const auto loaded = *reinterpret_cast<const Vector<X, kWidth>*>(x_first + v * kStride);
#pragma unroll
      for (int k = 0; k < kWidth; k++) values[v * kWidth + k] = to_float(loaded.element[k]);
      if constexpr (kPrefetch) fetch_parameters(v);
      valid = (v + 1) * kWidth;
    }
  }
  if constexpr (kClusterSize > 1) cluster_wait();

  NormTransform transform;
  if constexpr (kNorm == Norm::layer_norm) {
    transform = layer_norm_transform<Centring::always>(values, valid, inverse_hidden, eps, team, block, reduce);
  } else {
    transform = rms_norm_transform(values, valid, inverse_hidden, eps, team, block, reduce);
  }

#pragma unroll
  for (int v = 0; v < kVectors; v++) {
    if (v * kStride >= remaining) continue;
    if constexpr (!kPrefetch) {
      // Hides from the compiler where the parameters lie, so that it does not keep all their addresses in registers from
      // before the exchanges on: 32 scalar vectors a thread took 128 registers and spilled 16 bytes (NVRTC 13.5, sm_90a).
      // No memory clobber: it touches two registers and no memory.
      asm volatile("" : "+l"(weight_first), "+l"(bias_first));
      fetch_parameters(v);
    }
    Vector<Out, kWidth> normed;
#pragma unroll
    for (int k = 0; k < kWidth; k++) {
      const float unit = fmaf(values[v * kWidth + k], transform.scale, transform.shift);
      const float offset = bias_first != nullptr ? to_float(biases[v].element[k]) : 0.0f;
      normed.element[k] = from_float<Out>(fmaf(unit, to_float(weights[v].element[k]), offset));
    }
    *reinterpret_cast<Vector<Out, kWidth>*>(out_first + v * kStride) = normed;
  }
}

}  // namespace clusterfusion
