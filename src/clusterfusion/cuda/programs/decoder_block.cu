// decoder_block: one GPT-NeoX decoder layer at one token, as one cooperative launch with clusters, or cut into segments.
// Host twin: jit/decoder_block.py. Plan: plan/block.py.
#include "block/consumer.cuh"
#include "block/producer.cuh"
#include "primitives/launch_order.cuh"

namespace clusterfusion {

// Grid: S::kCtas CTAs in clusters of S::kCluster; S::kWarps consumer warps and one producer warp. Segment::whole needs all
// CTAs resident together. Dynamic shared memory: S::kSharedBytes.
template <typename S, Segment kSegment>
__global__ void __launch_bounds__(S::kThreads + kWarpSize, 1) decoder_block(const __grid_constant__ LayerArguments arguments) {
  extern __shared__ __align__(128) char memory[];
  using Consumer = BlockConsumer<S, kSegment>;
  static_assert(sizeof(typename Consumer::Shared) <= S::kSharedBytes, "plan/block.py allots less than the kernel needs");
  auto& shared = *reinterpret_cast<typename Consumer::Shared*>(memory);
  if (threadIdx.x == 0) Consumer::init(shared);
  __syncthreads();
  if constexpr (S::kCluster > 1) {  // init has fenced the mbarriers for the peers; nothing else is theirs to see
    cluster_arrive_relaxed();
    cluster_wait();
  }
  const bool in_cache = BlockShare<S, kSegment>(arguments).position_is_cached();
  if (threadIdx.x >= S::kThreads) {
    // Reads weights and older tokens only: it need not wait for the launch before this one.
    if (in_cache && threadIdx.x == S::kThreads) BlockProducer<S, kSegment>(arguments).run(shared.stages, shared.ring);
  } else {
    wait_for_previous_launch();
    let_next_launch_start();
    Consumer consumer(arguments, shared);
    if (in_cache) {
      consumer.run();
    } else {
      consumer.refuse();
    }
    // No CTA of a cluster leaves before its peers. The collectives do not need it; compute-sanitizer's racecheck, which
    // does not follow mbarriers from CTA to CTA, does. Threads that have left, as the producer warp has, are not waited for.
    if constexpr (S::kCluster > 1) {
      cluster_arrive_relaxed();
      cluster_wait();
    }
  }
}

}  // namespace clusterfusion
