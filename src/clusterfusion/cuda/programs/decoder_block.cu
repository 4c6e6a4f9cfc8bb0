// decoder_block: one decoder layer at one token, as one cooperative launch with clusters, or cut into segments.
// Host twin: jit/decoder_block.py. Plan: plan/block.py.
#include "block/producer.cuh"
#include "block/tiles.cuh"
#include "block/vectors.cuh"
#include "primitives/launch_order.cuh"

namespace clusterfusion {

// Instead of a layer, in all CTAs alike, when the position is not in the cache: nothing is touched but the results.
template <typename S, Segment kSegment>
__device__ void refuse(CtaState<S>& cta, const LayerArguments& arguments, int position) {
  using W = typename S::W;
  using X = typename S::X;
  if (blockIdx.x == 0 && threadIdx.x == 0) cta.record_error(kBadPosition, arguments.cache.max_len, position);
  constexpr float kNaN = cuda::std::numeric_limits<float>::quiet_NaN();
  constexpr bool kWritesOut = S::kParallel ? runs<kSegment>(Segment::output) : runs<kSegment>(Segment::contract);
  const int last = first_row<S::kCtas>(S::kHidden, blockIdx.x + 1);
  for (int i = first_row<S::kCtas>(S::kHidden, blockIdx.x) + threadIdx.x; i < last; i += S::kVectorThreads) {
    if constexpr (kWritesOut) static_cast<X*>(arguments.out)[i] = from_float<X>(kNaN);
  }
  if (runs<kSegment>(Segment::attend) && arguments.cache.k_new != nullptr) {
    const int end = first_row<S::kCtas>(S::kKvSize, blockIdx.x + 1);
    for (int i = first_row<S::kCtas>(S::kKvSize, blockIdx.x) + threadIdx.x; i < end; i += S::kVectorThreads) {
      static_cast<W*>(arguments.cache.k_new)[i] = from_float<W>(kNaN);
      static_cast<W*>(arguments.cache.v_new)[i] = from_float<W>(kNaN);
    }
  }
}

// Grid: S::kCtas CTAs of S::kThreads threads in clusters of S::kCluster. Segment::whole needs all CTAs resident together.
// Dynamic shared memory: S::kSharedBytes.
template <typename S, Segment kSegment>
__global__ void __launch_bounds__(S::kThreads, 1) decoder_block(const __grid_constant__ LayerArguments arguments) {
  extern __shared__ __align__(128) char memory[];
  constexpr bool kWhole = kSegment == Segment::whole;
  using Shared = typename CtaState<S>::Shared;
  static_assert(sizeof(Shared) <= S::kSharedBytes, "plan/block.py allots less than the kernel needs");
  auto& shared = *reinterpret_cast<Shared*>(memory);
  if (threadIdx.x == 0) {
    CtaState<S>::init(shared);
    shared.position = *arguments.position;
  }
  __syncthreads();
  if constexpr (S::kCluster > 1) {  // init has fenced the mbarriers for the peers; nothing else is theirs to see
    cluster_arrive_relaxed();
    cluster_wait();
  }
  const int position = shared.position;
  const bool in_cache = position >= 0 && position < arguments.cache.max_len;
  if (threadIdx.x >= S::kConsumers) {
    // It need not wait for the launch before this one, until it comes to cached tokens.
    if (in_cache && threadIdx.x == S::kConsumers) {
      NoTrace trace;
      TileProducer<S> producer(arguments.k_map, arguments.v_map, position, shared, trace);
      producer.template run<kSegment>(arguments.layer, 0);
    }
    return;
  }
  wait_for_previous_launch();
  let_next_launch_start();
  if constexpr (kWhole) {
    if (threadIdx.x == 0) shared.launches = __ldcg(arguments.workspace.counters + kLaunchDone * kCounterStride);
    named_barrier_sync<3, S::kConsumers>();
  }
  const unsigned epoch = kWhole ? shared.launches + 1 : 0;
  NoTrace trace;
  if (threadIdx.x >= S::kVectorThreads) {
    if (in_cache) TileWarps<S>(arguments.workspace, position, shared, trace).template run<kSegment>(epoch, 0);
  } else {
    VectorWarps<S> vectors(arguments.workspace, position, shared, trace);
    if (in_cache) {
      const LayerTargets targets{epoch * S::kCtas, epoch * (S::kBundles / S::kHeadGroups * S::kPartials)};
      LayerResidual<S, kWhole> residual(arguments, targets.all_ctas);
      vectors.template run<kSegment>(LayerOf{&arguments.layer, 0}, arguments.cache, residual, targets, epoch, 0);
      if (kWhole && blockIdx.x == 0 && threadIdx.x == 0) grid_count(vectors.counter(kLaunchDone));
    } else {
      refuse<S, kSegment>(vectors, arguments, position);
    }
  }
  // No CTA of a cluster leaves before its peers. The collectives do not need it; compute-sanitizer's racecheck, which
  // does not follow mbarriers from CTA to CTA, does. Threads that have left, as the producer warp has, are not waited for.
  if constexpr (S::kCluster > 1) {
    cluster_arrive_relaxed();
    cluster_wait();
  }
}

}  // namespace clusterfusion
