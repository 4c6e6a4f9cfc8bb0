// lm_head: the final norm and the rows of the LM head on a residual vector: the end of a step in split, fused and graph mode,
// from the device functions of decode_step, so that all modes give the same bits. Host twin: jit/lm_head.py.
#include "block/producer.cuh"
#include "block/tiles.cuh"
#include "block/vectors.cuh"
#include "primitives/launch_order.cuh"

namespace clusterfusion {

struct HeadArguments {
  Workspace workspace;
  const void *norm_weight, *norm_bias, *lm_head;
  const float* x;  // [hidden]
  float* logits;   // [vocabulary]
  int vocabulary;
};

// The residual stream as one vector that is complete when the launch before this one has ended.
template <typename S>
struct FinalResidual {
  const float* x;
  template <int kItems>
  __device__ void read_input(CtaState<S>&, float (&values)[kItems]) {
    for_my_quads<S>(values, [&](int quad, float* to) { load_quad<float>(x, quad, to); });
  }
};

// Grid: S::kCtas CTAs of S::kThreads threads. Dynamic shared memory: S::kSharedBytes.
template <typename S>
__global__ void __launch_bounds__(S::kThreads, 1) lm_head(const __grid_constant__ HeadArguments arguments) {
  extern __shared__ __align__(128) char memory[];
  using Shared = typename CtaState<S>::Shared;
  static_assert(sizeof(Shared) <= S::kSharedBytes, "plan/block.py allots less than the kernel needs");
  auto& shared = *reinterpret_cast<Shared*>(memory);
  if (threadIdx.x == 0) CtaState<S>::init(shared);
  __syncthreads();
  if (threadIdx.x >= S::kConsumers) {
    if (threadIdx.x == S::kConsumers) {
      NoTrace trace;
      const TensorMap none{};  // nothing attends
      TileProducer<S>(none, none, 0, shared, trace).vocabulary(arguments.lm_head, arguments.vocabulary);
    }
    return;
  }
  wait_for_previous_launch();
  let_next_launch_start();
  NoTrace trace;
  if (threadIdx.x < S::kVectorThreads) {
    FinalResidual<S> residual{arguments.x};
    VectorWarps<S>(arguments.workspace, 0, shared, trace).final_norm(arguments.norm_weight, arguments.norm_bias, residual);
  } else {
    TileWarps<S>(arguments.workspace, 0, shared, trace).vocabulary(arguments.vocabulary, 0, [&](int index, float logit) {
      arguments.logits[index] = logit;
    });
  }
}

}  // namespace clusterfusion
