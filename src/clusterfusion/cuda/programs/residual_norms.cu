// residual_norms: the residual stream takes in what a layer added, and is normed for what reads it next, once or twice,
// all from one read. The rows of a prompt, one CTA a row. Host twin: jit/residual_norms.py.
#include <cuda/std/cstdint>

#include "collectives/cluster_reduce.cuh"
#include "collectives/team.cuh"
#include "ops/norm.cuh"
#include "primitives/vector.cuh"

namespace clusterfusion {

constexpr int kMostDeltas = 2;  // with parallel residual: attention's and the MLP's
constexpr int kMostNorms = 2;   // with parallel residual: attention's and the MLP's

// Said to the compiler so that it does not spill to make room for a second block of 1,024 threads on an SM: 8 scalars a thread
// did (NVRTC 13.0, sm_90a).
constexpr int kMinBlocks = 1;

struct NormOfRows {
  const void *weight, *bias;  // [hidden]; bias may be null
  void* out;                  // [rows, hidden]; null: there is no such norm
};

// x [rows, hidden] is float and becomes x + deltas; with `fresh` it counts as zero and is not read. Everything else is of the
// weights' type. All are contiguous.
struct ResidualNormsArguments {
  float* x;
  const void* delta[kMostDeltas];  // [rows, hidden]; each may be null
  NormOfRows norm[kMostNorms];
  int rows;
  int fresh;
  float eps;
};
static_assert(sizeof(ResidualNormsArguments) == 88, "jit/residual_norms.py lays out the same struct");

// Grid: any number of CTAs, which take rows in turn. A thread takes kItems elements in vectors of kWidth; kHidden is a
// multiple of kWidth. Parameters are fetched after the sums, not before as in cluster_norm: the other CTAs of the SM hide
// their latency, and 16 scalars of four vectors do not fit in the 64 registers of a thread of 1,024.
template <typename T, Norm kNorm, int kHidden, int kThreads, int kItems, int kWidth>
__global__ void __launch_bounds__(kThreads, kMinBlocks) residual_norms(const __grid_constant__ ResidualNormsArguments arguments) {
  static_assert(kItems % kWidth == 0 && kHidden % kWidth == 0, "a thread takes whole vectors");
  static_assert(kThreads * kItems >= kHidden, "a CTA holds a row");
  constexpr int kVectors = kItems / kWidth;
  constexpr int kStride = kThreads * kWidth;  // between a thread's vectors
  using Team = WholeTeam<1, kThreads>;
  using Block = BlockSum<kNormSums, kThreads>;
  using Reduce = ClusterReduce<float, kNormSums, 1, Exchange::direct>;
  using Elements = Vector<T, kWidth>;
  using Floats = Vector<float, kWidth>;
  __shared__ typename Block::Scratch block_scratch;
  __shared__ typename Reduce::Scratch reduce_scratch;
  Team team;
  Block block(block_scratch);
  Reduce reduce(reduce_scratch);

  const int first = team.thread() * kWidth;
  const int remaining = kHidden - first;  // vector v is this thread's if v * kStride < remaining
  // Nothing has to be awaited between rows: the last barrier of a norm comes after every read that the next row's sums
  // would disturb (BlockSum, ClusterReduce).
  for (int row = blockIdx.x; row < arguments.rows; row += gridDim.x) {
    const cuda::std::int64_t start = static_cast<cuda::std::int64_t>(row) * kHidden + first;
    float values[kItems];
    int valid = 0;
#pragma unroll
    for (int v = 0; v < kVectors; v++) {
      if (v * kStride >= remaining) continue;
      Floats x{};
      if (!arguments.fresh) x = *reinterpret_cast<const Floats*>(arguments.x + start + v * kStride);
#pragma unroll
      for (int d = 0; d < kMostDeltas; d++) {
        if (arguments.delta[d] == nullptr) continue;
        const T* delta = static_cast<const T*>(arguments.delta[d]) + start;
        const auto added = *reinterpret_cast<const Elements*>(delta + v * kStride);
#pragma unroll
        for (int k = 0; k < kWidth; k++) x.element[k] += to_float(added.element[k]);
      }
      *reinterpret_cast<Floats*>(arguments.x + start + v * kStride) = x;
#pragma unroll
      for (int k = 0; k < kWidth; k++) values[v * kWidth + k] = x.element[k];
      valid = (v + 1) * kWidth;
    }

    NormTransform transform;
    if constexpr (kNorm == Norm::layer_norm) {
      transform = layer_norm_transform<Centring::always>(values, valid, 1.0f / kHidden, arguments.eps, team, block, reduce);
    } else {
      transform = rms_norm_transform(values, valid, 1.0f / kHidden, arguments.eps, team, block, reduce);
    }

#pragma unroll
    for (int n = 0; n < kMostNorms; n++) {
      const NormOfRows& norm = arguments.norm[n];
      if (norm.out == nullptr) continue;
#pragma unroll
      for (int v = 0; v < kVectors; v++) {
        if (v * kStride >= remaining) continue;
        const auto weight = *reinterpret_cast<const Elements*>(static_cast<const T*>(norm.weight) + first + v * kStride);
        Elements bias{}, normed;
        if (norm.bias != nullptr) {
          bias = *reinterpret_cast<const Elements*>(static_cast<const T*>(norm.bias) + first + v * kStride);
        }
#pragma unroll
        for (int k = 0; k < kWidth; k++) {
          const float unit = fmaf(values[v * kWidth + k], transform.scale, transform.shift);
          normed.element[k] = from_float<T>(fmaf(unit, to_float(weight.element[k]), to_float(bias.element[k])));
        }
        *reinterpret_cast<Elements*>(static_cast<T*>(norm.out) + start + v * kStride) = normed;
      }
    }
  }
}

}  // namespace clusterfusion
