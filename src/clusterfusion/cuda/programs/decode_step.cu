// decode_step: a whole decode step in one cooperative launch: embedding, all layers, final norm, LM head, choice of the token.
// The producers stream the weights and the cached tokens of the whole step without a pause, across phases and layers.
// Host twin: jit/decode_step.py. Plan: plan/step.py.
#include <cuda/std/type_traits>

#include "block/consumer.cuh"
#include "block/producer.cuh"
#include "primitives/launch_order.cuh"
#include "step/arguments.cuh"
#include "step/choose.cuh"

namespace clusterfusion {

constexpr int kTraceClocks = 4;  // a CTA: clock and nanoseconds when it began, and when it ended

template <bool kTrace>
__device__ void trace_clocks(long long* trace, int layers, int which) {
  if constexpr (kTrace) {
    long long nanoseconds;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(nanoseconds)::"memory");
    long long* to = trace + static_cast<long long>(gridDim.x) * (layers + 1) * kTraceEvents + blockIdx.x * kTraceClocks;
    to[2 * which] = clock64();
    to[2 * which + 1] = nanoseconds;
  }
}

template <bool kOn>
__device__ auto make_trace(long long* record, int layers) {
  if constexpr (kOn) {
    return Trace(record, layers);
  } else {
    return NoTrace();
  }
}

// This CTA's likeliest token joins the others'; the last CTA to come here chooses among them.
template <typename S, int kLayers>
__device__ void choose_token(CtaState<S>& cta, const StepArguments<kLayers>& a, Candidate mine) {
  Candidate* of_warp = reinterpret_cast<Candidate*>(cta.shared().best);
  mine = warp_best(mine);
  if (threadIdx.x % kWarpSize == 0) of_warp[threadIdx.x / kWarpSize] = mine;
  cta.block_sync();
  if (threadIdx.x >= kWarpSize) return;
  mine = warp_best(threadIdx.x < S::kWarps ? of_warp[threadIdx.x] : no_candidate());
  unsigned before = 0;
  if (threadIdx.x == 0) {
    a.candidates[blockIdx.x] = mine;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(&a.state->arrivals) : "memory");
  }
  __syncwarp();  // what lane 0 has acquired is the others' too
  before = __shfl_sync(kAllLanes, before, 0);
  if (before + 1 != (a.launch + 1) * S::kCtas) return;
  for (int i = threadIdx.x; i < S::kCtas; i += kWarpSize) {
    const Candidate other{__ldcg(&a.candidates[i].score), __ldcg(&a.candidates[i].token)};
    if (beats(other, mine)) mine = other;
  }
  mine = warp_best(mine);
  if (threadIdx.x != 0) return;
  const int token = isfinite(mine.score) ? mine.token : kNoToken;
  a.state->token = token;
  *const_cast<volatile int*>(a.chosen) = token;
  __threadfence_system();
}

// kFaultCta: for tests, a CTA that never arrives for its part of h; -1 for none.
// Grid: S::kCtas CTAs in clusters of S::kCluster, all resident together; S::kWarps consumer warps and one producer warp.
// Dynamic shared memory: S::kSharedBytes.
template <typename S, int kLayers, bool kTrace, int kFaultCta>
__global__ void __launch_bounds__(S::kThreads + kWarpSize, 1) decode_step(const __grid_constant__ StepArguments<kLayers> a) {
  extern __shared__ __align__(128) char memory[];
  using Tracer = cuda::std::conditional_t<kTrace, Trace, NoTrace>;
  using Consumer = LayerConsumer<S, Tracer>;
  using W = typename S::W;
  static_assert(sizeof(typename Consumer::Shared) <= S::kSharedBytes, "plan/block.py allots less than the kernel needs");
  constexpr unsigned kVersions = kLayers * (S::kParallel ? 1 : 2) + 1;  // of the residual vector in a step
  auto& shared = *reinterpret_cast<typename Consumer::Shared*>(memory);
  if (threadIdx.x == 0) {
    Consumer::init(shared);
    trace_clocks<kTrace>(a.trace, kLayers, 0);
  }
  __syncthreads();
  if constexpr (S::kCluster > 1) {  // init has fenced the mbarriers for the peers; nothing else is theirs to see
    cluster_arrive_relaxed();
    cluster_wait();
  }
  if (threadIdx.x >= S::kThreads) {
    if (threadIdx.x == S::kThreads) {
      LayerProducer<S> producer(a.position, shared.stages, shared.ring);
#pragma unroll 1
      for (int layer = 0; layer < kLayers; layer++) {
        // Weights never change; the last step wrote a row of every layer's cache.
        producer.template run<Segment::whole>(a.layers[layer], a.k_map, a.v_map, layer * S::kHeads, [&] {
          if (layer == 0) wait_for_previous_launch();
        });
      }
      producer.vocabulary(a.lm_head, a.vocabulary);
    }
    return;
  }
  wait_for_previous_launch();
  let_next_launch_start();
  int token = a.token == kNoToken ? __ldcg(&a.state->token) : a.token;
  if (token < 0 || token >= a.vocabulary) token = 0;  // the last step chose none: its reader knows, and this one is void
  Tracer trace = make_trace<kTrace>(a.trace, kLayers);
  Consumer consumer(a.workspace, a.position, shared, trace);
  const int first = first_row<S::kCtas>(S::kHidden, blockIdx.x);
  ResidualStream<S> residual(static_cast<const W*>(a.embedding) + static_cast<cuda::std::int64_t>(token) * S::kHidden, a.pairs,
                             a.launch * kVersions, shared.residual);
  residual.begin(first, first_row<S::kCtas>(S::kHidden, blockIdx.x + 1) - first);
  LayerCache cache = a.cache;
#pragma unroll 1
  for (int layer = 0; layer < kLayers; layer++) {
    const unsigned rounds = a.launch * kLayers + layer + 1;
    trace.layer(layer);
    consumer.template run<Segment::whole, kFaultCta>(
        a.layers[layer], cache, residual, LayerTargets{rounds * S::kCtas, rounds * (S::kHeads * S::kPartials)});
    residual.advance();
    cache.k = static_cast<W*>(cache.k) + a.layer_stride;
    cache.v = static_cast<W*>(cache.v) + a.layer_stride;
  }
  trace.layer(kLayers);
  Candidate best = no_candidate();
  consumer.vocabulary(a.norm_weight, a.norm_bias, a.vocabulary, residual, [&](int index, float logit) {
    a.logits[index] = logit;
    const Candidate candidate{a.temperature > 0 ? logit / a.temperature + gumbel(a.seed, a.position + 1, index) : logit, index};
    if (beats(candidate, best)) best = candidate;
  });
  choose_token<S, kLayers>(consumer, a, best);
  if (threadIdx.x == 0) trace_clocks<kTrace>(a.trace, kLayers, 1);
  if constexpr (S::kCluster > 1) {  // as in decoder_block
    cluster_arrive_relaxed();
    cluster_wait();
  }
}

}  // namespace clusterfusion
