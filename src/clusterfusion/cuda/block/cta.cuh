// A CTA of the decoder programs: its shared memory, its teams, and how it waits for other CTAs and complains.
//
// Warps have roles. Vector warps make what tiles are multiplied by, norms, attention, activations from other CTAs, and finish
// what comes of it; tile warps multiply tiles of weights with it and do nothing else; one lane fetches them. So the stream of weights
// goes on while a dependency is under way, and what is exposed of one is what the ring does not cover.
#pragma once

#include "block/share.cuh"
#include "collectives/cluster_gather.cuh"
#include "collectives/cluster_reduce.cuh"
#include "collectives/team.cuh"
#include "ops/norm.cuh"
#include "primitives/grid_counter.cuh"

namespace clusterfusion {

__host__ __device__ constexpr int align16(int bytes) { return (bytes + 15) / 16 * 16; }
__host__ __device__ constexpr int larger(int a, int b) { return a > b ? a : b; }

// Once a layer, in this order as far as a layer has them. Vector warps signal that the normed input, the attention's output,
// the normed middle, h are there; tile warps that the sums of the output and of the down projection are.
enum Signal { kNormed, kAttended, kOutputSums, kMiddleNormed, kHidden, kDownSums, kSignals };
__host__ __device__ constexpr bool from_tiles(int signal) { return signal == kOutputSums || signal == kDownSums; }

// What a CTA keeps in shared memory, and the collectives' types that follow from the shape.
template <typename S>
struct CtaTypes {
  using Share = CtaShare<S>;
  static constexpr int kPartial = kPartialFloats<S::kHeadDim>;
  static constexpr int kVectorBytes = S::kHidden * 4;
  static constexpr int kQkvRows = Share::most_rows(S::kQkvRows), kUpRows = Share::most_rows(S::kIntermediate);
  static constexpr int kOutRows = Share::most_rows(S::kHidden);
  // Where each matrix's biases start.
  static constexpr int kUpBias = kQkvRows, kOutBias = kUpBias + kUpRows, kDownBias = kOutBias + kOutRows;
  static constexpr int kBiases = kDownBias + kOutRows;
  // Vectors in shared memory: the two normed x of the projections; later, in their place, the attention's output and h. Who
  // writes one has seen a dependency that this CTA's tile warps meet only after the last use of what lay there.
  static constexpr int kVectorsBytes = larger(2 * kVectorBytes, kVectorBytes + align16(S::kIntermediate * 2));

  using LocalTeam = PartialTeam<1, S::kVectorThreads, 0, 1>;
  using PairTeam = PartialTeam<S::kMerged, S::kVectorThreads, 0, 1, kPartial < S::kVectorThreads ? kPartial : S::kVectorThreads>;
  using Block = BlockSum<kNormSums, S::kVectorThreads>;
  using Reduce = ClusterReduce<float, kNormSums, 1, Exchange::direct>;
  using Gather = ClusterGather<float, kPartial, S::kMerged, Exchange::direct>;

  struct Shared {
    alignas(128) char stages[S::kStages * S::kStageBytes];
    alignas(128) char cache_stages[S::kCacheStages * S::kCacheStageBytes];
    alignas(16) char vectors[kVectorsBytes];
    float query[S::kHeadDim], key[S::kHeadDim], value[S::kHeadDim];
    float slots[(S::kVectorWarps + 1) * kPartial];  // one a warp, and the new token
    float o_sums[kOutRows * Share::HiddenTiles::kParts];
    float down_sums[kOutRows * Share::DownTiles::kParts];
    float biases[kBiases];
    float residual[kOutRows];                 // the whole step's: this CTA's rows
    alignas(16) char best[S::kWarps * 16];    // and its warps' likeliest tokens
    typename Share::WeightRing::Barriers ring;
    typename Share::CacheStages::Barriers cache_barriers;
    cuda::std::uint64_t signals[kSignals];
    typename Block::Scratch block;
    typename Reduce::Scratch reduce;
    typename Gather::Scratch gather;
    typename LocalTeam::Scratch local;
    typename PairTeam::Scratch pair;
    unsigned warps_done[2];
    int expired;
    int position;  // read from memory once, so that all of the CTA goes by the same
  };
};

template <typename S>
class CtaState : public CtaShare<S>, public CtaTypes<S> {
 public:
  using typename CtaTypes<S>::Shared;
  using typename CtaTypes<S>::LocalTeam;

  // `first_thread`: of the role.
  __device__ CtaState(const Workspace& workspace, int position, Shared& shared, int first_thread)
      : CtaShare<S>(position), u_(workspace), s_(shared), thread_(threadIdx.x - first_thread), warp_(thread_ / kWarpSize),
        lane_(threadIdx.x % kWarpSize), local_(shared.local) {}

  // One thread, before the first barrier of the CTA.
  static __device__ void init(Shared& shared) {
    CtaShare<S>::WeightRing::init(shared.ring);
    CtaShare<S>::CacheStages::init(shared.cache_barriers);
    for (int i = 0; i < kSignals; i++) mbarrier_init(&shared.signals[i], from_tiles(i) ? S::kTileThreads : S::kVectorThreads);
    shared.warps_done[0] = shared.warps_done[1] = 0;
    shared.expired = 0;
    LocalTeam::init(shared.local);
    CtaTypes<S>::PairTeam::init(shared.pair);
    mbarrier_init_fence();
  }

  __device__ Shared& shared() { return s_; }
  __device__ unsigned* counter(Counter which) const { return u_.counters + which * kCounterStride; }

  // Between the roles of this CTA. Every thread of the one signals, every thread of the other that wants to know waits;
  // `round` counts the layers of a launch. Parity is safe: a round's signals all depend on all signals of the round before
  // having been waited for. Not bounded: it waits for warps whose own waits are.
  __device__ void signal(Signal which) { mbarrier_arrive_local(&s_.signals[which]); }
  __device__ void await(Signal which, unsigned round) { mbarrier_wait_local(&s_.signals[which], round & 1); }

  // The first error of a launch, for the host: the details, then the word that says they are there.
  __device__ void record_error(unsigned dependency, unsigned expected, unsigned seen) {
    *const_cast<volatile int*>(&s_.expired) = 1;
    if (atomicCAS(&u_.error[kErrorClaim], 0u, 1u) != 0) return;
    u_.error[1] = this->cta_, u_.error[2] = expected, u_.error[3] = seen;
    __threadfence_system();
    *const_cast<volatile unsigned*>(u_.error) = dependency + 1;
  }

  // Of the vector warps.
  __device__ void block_sync() { local_.block_sync(); }

  // All vector warps wait for a counter. Never hangs: when the wait expires, the error is recorded once and everything goes
  // on with what is there.
  __device__ void wait(Counter which, unsigned target) {
    if (thread_ == 0 && !*const_cast<volatile int*>(&s_.expired) && !grid_wait(counter(which), target)) {
      record_error(which, target, load_acquire(counter(which)));
    }
    block_sync();
  }

 protected:
  const Workspace& u_;
  Shared& s_;
  const int thread_, warp_, lane_;  // thread and warp in the role
  LocalTeam local_;
};

}  // namespace clusterfusion
