// decode_step: whole decode steps in one cooperative launch: embedding, all layers, final norm, LM head, choice of the token, and on
// to the next step. The producers stream the weights and the cached tokens of all of them, across phases, layers and steps.
// Host twin: jit/decode_step.py. Plan: plan/step.py.
#include <cuda/std/type_traits>

#include "block/producer.cuh"
#include "block/tiles.cuh"
#include "block/vectors.cuh"
#include "primitives/launch_order.cuh"
#include "step/arguments.cuh"
#include "step/choose.cuh"

namespace clusterfusion {

constexpr int kTraceClocks = 4;  // a CTA: clock and nanoseconds when it began, and when it ended

template <bool kTrace, int kCtas>
__device__ void trace_clocks(long long* trace, int layers, int which) {
  if constexpr (kTrace) {
    long long nanoseconds;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(nanoseconds)::"memory");
    long long* to = trace + static_cast<long long>(kCtas) * (layers + 1) * kTraceEvents + opaque(blockIdx.x) * kTraceClocks;
    to[2 * which] = clock64();
    to[2 * which + 1] = nanoseconds;
  }
}

template <bool kOn>
__device__ auto make_trace(long long* record, int layers, unsigned first_thread) {
  if constexpr (kOn) {
    return Trace(record, layers, first_thread);
  } else {
    return NoTrace();
  }
}

// A step's candidate for its next token.
template <int kLayers>
__device__ Candidate candidate_of(const StepArguments<kLayers>& a, int position, int index, float logit) {
  return {a.temperature > 0 ? logit / a.temperature + gumbel(a.seed, position, index) : logit, index};
}

// `mine`, the likeliest of the tokens whose logits fell to this lane, joins the others'; the last CTA to come here chooses among them.
// Tile warps; `step` is that of the launch.
template <typename S, typename Tracer, int kLayers>
__device__ void choose_token(TileWarps<S, Tracer>& tiles, const StepArguments<kLayers>& a, unsigned step, Candidate mine) {
  Candidate* of_warp = reinterpret_cast<Candidate*>(tiles.shared().best);
  const int thread = opaque(threadIdx.x) - S::kVectorThreads;
  mine = warp_best(mine);
  if (thread % kWarpSize == 0) of_warp[thread / kWarpSize] = mine;
  tiles.tiles_sync();
  if (thread >= kWarpSize) return;
  mine = warp_best(thread < S::kWarps ? of_warp[thread] : no_candidate());
  unsigned before = 0;
  if (thread == 0) {
    a.candidates[blockIdx.x] = mine;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(&a.state->arrivals) : "memory");
  }
  __syncwarp();  // what lane 0 has acquired is the others' too
  before = __shfl_sync(kAllLanes, before, 0);
  const unsigned steps = a.first_step + step + 1;
  if (before + 1 != steps * S::kCtas) return;
  for (int i = thread; i < S::kCtas; i += kWarpSize) {
    const Candidate other{__ldcg(&a.candidates[i].score), __ldcg(&a.candidates[i].token)};
    if (beats(other, mine)) mine = other;
  }
  mine = warp_best(mine);
  if (thread != 0) return;
  const int token = isfinite(mine.score) ? mine.token : kNoToken;
  release_pair(&a.state->choice, __int_as_float(token), steps);
  const_cast<volatile int*>(a.chosen)[step] = token;
  __threadfence_system();
}

// The token that the last of `steps` steps chose. Vector warps.
template <typename S, typename Tracer>
__device__ int chosen_token(VectorWarps<S, Tracer>& vectors, const StepState* state, unsigned steps) {
  if (threadIdx.x == 0) {
    Pair choice = 0;
    vectors.template poll<1>(
        kOnToken, steps, [&](int) { choice = acquire_pair(&state->choice); }, [&](int) { return epoch_of(choice) == steps; });
    vectors.shared().token = __float_as_int(value_of(choice));
  }
  vectors.block_sync();
  return vectors.shared().token;
}

// kFaultCta: for tests, a CTA that never arrives for its part of h; -1 for none.
// Grid: S::kCtas CTAs of S::kThreads threads in clusters of S::kCluster, all resident together. Dynamic shared memory:
// S::kSharedBytes.
template <typename S, int kLayers, bool kTrace, int kFaultCta>
__global__ void __launch_bounds__(S::kThreads, 1) decode_step(const __grid_constant__ StepArguments<kLayers> a) {
  extern __shared__ __align__(128) char memory[];
  using Tracer = cuda::std::conditional_t<kTrace, Trace, NoTrace>;
  using Shared = typename CtaState<S>::Shared;
  using W = typename S::W;
  static_assert(sizeof(Shared) <= S::kSharedBytes, "plan/block.py allots less than the kernel needs");
  auto& shared = *reinterpret_cast<Shared*>(memory);
  if (threadIdx.x == 0) {
    CtaState<S>::init(shared);
    trace_clocks<kTrace, S::kCtas>(a.trace, kLayers, 0);
  }
  __syncthreads();
  if constexpr (S::kCluster > 1) {  // init has fenced the mbarriers for the peers; nothing else is theirs to see
    cluster_arrive_relaxed();
    cluster_wait();
  }
  constexpr unsigned kAttendedAStep = kLayers * (S::kBundles / S::kHeadGroups) * S::kPartials;  // arrivals at a kAttentionDone
  const unsigned steps = a.steps;
  if (threadIdx.x >= S::kConsumers) {
    if (threadIdx.x == S::kConsumers) {  // it waits for no launch before the first cached tokens
      Tracer trace = make_trace<kTrace>(a.trace, kLayers, S::kConsumers);
      TileProducer<S, Tracer> producer(a.k_map, a.v_map, a.position, shared, trace);
      const unsigned* attended = a.workspace.counters + kAttentionDone * kCounterStride;
#pragma unroll 1
      for (unsigned step = 0; step < steps; step++) {
        producer.begin_step(a.position + step, step > 0 ? attended : nullptr, (a.first_step + step) * kAttendedAStep);
#pragma unroll 1
        for (int layer = 0; layer < kLayers; layer++) {
          trace.layer(layer);
          producer.template run<Segment::whole>(a.layers[layer], layer);
        }
        trace.layer(kLayers);
        producer.vocabulary(a.lm_head, a.vocabulary);
      }
    }
    return;
  }
  wait_for_previous_launch();
  let_next_launch_start();
  if (threadIdx.x < S::kVectorThreads) {
    constexpr unsigned kWritten = kLayers * (S::kParallel ? 1 : 2);  // versions of the residual vector, in a step
    Tracer trace = make_trace<kTrace>(a.trace, kLayers, 0);
    VectorWarps<S, Tracer> vectors(a.workspace, a.position, shared, trace);
    const int first = first_row<S::kCtas>(S::kHidden, blockIdx.x);
#pragma unroll 1
    for (unsigned step = 0; step < steps; step++) {
      const unsigned before = a.first_step + step;
      // The choice is every CTA's dependency on all of the step before, as the end of a launch is: whoever knows it may write where
      // others have read. Nobody asks for it before its own CTA has given its logits.
      if (step > 0) vectors.await_round(kChosen, step - 1);
      int token = step == 0 && a.token != kNoToken ? a.token : chosen_token(vectors, a.state, before);
      if (token < 0 || token >= a.vocabulary) token = 0;  // the last step chose none: its reader knows, and this one is void
      vectors.begin_step(a.position + step, step, kLayers);
      ResidualStream<S> residual(static_cast<const W*>(a.embedding) + static_cast<cuda::std::int64_t>(token) * S::kHidden,
                                 a.marked, before * kWritten, shared.residual);
      residual.begin(first, first_row<S::kCtas>(S::kHidden, blockIdx.x + 1) - first);
#pragma unroll 1
      for (int layer = 0; layer < kLayers; layer++) {
        trace.layer(layer);
        const unsigned epoch = before * kLayers + layer + 1;
        const LayerTargets targets{epoch * S::kCtas, epoch * (S::kBundles / S::kHeadGroups * S::kPartials)};
        vectors.template run<Segment::whole, kFaultCta>(LayerOf{a.layers, layer}, a.cache, residual, targets, epoch, layer);
        residual.advance();
      }
      trace.layer(kLayers);
      vectors.final_norm(a.norm_weight, a.norm_bias, residual);
    }
  } else {
    Tracer trace = make_trace<kTrace>(a.trace, kLayers, S::kVectorThreads);
    TileWarps<S, Tracer> tiles(a.workspace, a.position, shared, trace);
    const auto step = [&] { return static_cast<unsigned>(tiles.position() - a.position); };  // which takes no register
#pragma unroll 1
    for (unsigned begun = 0; begun < steps; begun = step() + 1) {
      tiles.begin_step(a.position + begun, begun, kLayers);
#pragma unroll 1
      for (int layer = 0; layer < kLayers; layer++) {
        trace.layer(layer);
        tiles.template run<Segment::whole, kFaultCta>((a.first_step + step()) * kLayers + layer + 1, layer);
      }
      trace.layer(kLayers);
      Candidate best = no_candidate();
      tiles.vocabulary(a.vocabulary, kLayers, [&](int index, float logit) {
        a.logits[index] = logit;
        const Candidate other = candidate_of(a, tiles.position() + 1, index, logit);
        if (beats(other, best)) best = other;
      });
      // The next step begins with the choice of its token, while its weights come.
      if (threadIdx.x == S::kVectorThreads && step() + 1 < steps) trace_clocks<kTrace, S::kCtas>(a.trace, kLayers, 0);
      choose_token(tiles, a, step(), best);
      tiles.signal(kChosen);
    }
    if (threadIdx.x == S::kVectorThreads) trace_clocks<kTrace, S::kCtas>(a.trace, kLayers, 1);
  }
  if constexpr (S::kCluster > 1) {  // as in decoder_block
    cluster_arrive_relaxed();
    cluster_wait();
  }
}

}  // namespace clusterfusion
