// A CTA of the decoder programs: its shared memory, its teams, and how it waits for other CTAs and complains.
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

// What the consumers of a CTA keep in shared memory, and the collectives' types that follow from the shape.
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
  // Vectors in shared memory: the two normed x of the projections; later the attention's output and h.
  static constexpr int kVectorsBytes = larger(2 * kVectorBytes, kVectorBytes + align16(S::kIntermediate * 2));

  using LocalTeam = PartialTeam<1, S::kThreads, 0, 1>;
  using PairTeam = PartialTeam<S::kMerged, S::kThreads, 0, 1, kPartial < S::kThreads ? kPartial : S::kThreads>;
  using Block = BlockSum<kNormSums, S::kThreads>;
  using Reduce = ClusterReduce<float, kNormSums, 1, Exchange::direct>;
  using Gather = ClusterGather<float, kPartial, S::kMerged, Exchange::direct>;

  struct Shared {
    alignas(128) char stages[S::kStages * S::kStageBytes];
    alignas(16) char vectors[kVectorsBytes];
    float query[S::kHeadDim], key[S::kHeadDim], value[S::kHeadDim];
    float slots[(S::kWarps + 1) * kPartial];  // one a warp, and the new token
    float o_sums[kOutRows * Share::HiddenTiles::kParts];
    float down_sums[kOutRows * Share::DownTiles::kParts];
    float biases[kBiases];
    float residual[kOutRows];                 // the whole step's: this CTA's rows
    alignas(16) char best[S::kWarps * 16];    // and its warps' likeliest tokens
    typename Share::RingType::Barriers ring;
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

  __device__ CtaState(const Workspace& workspace, int position, Shared& shared)
      : CtaShare<S>(position), u_(workspace), s_(shared), warp_(threadIdx.x / kWarpSize), lane_(threadIdx.x % kWarpSize),
        local_(shared.local) {}

  // One thread, before the first barrier of the CTA.
  static __device__ void init(Shared& shared) {
    CtaShare<S>::RingType::init(shared.ring);
    shared.warps_done[0] = shared.warps_done[1] = 0;
    shared.expired = 0;
    LocalTeam::init(shared.local);
    CtaTypes<S>::PairTeam::init(shared.pair);
    mbarrier_init_fence();
  }

  __device__ Shared& shared() { return s_; }
  __device__ void block_sync() { local_.block_sync(); }
  __device__ unsigned* counter(Counter which) const { return u_.counters + which * kCounterStride; }

  // All consumers wait for a counter. Never hangs: when the wait expires, the error is recorded once and everything goes on
  // with what is there.
  __device__ void wait(Counter which, unsigned target) {
    if (threadIdx.x == 0 && !s_.expired && !grid_wait(counter(which), target)) {
      record_error(which, target, load_acquire(counter(which)));
    }
    block_sync();
  }

  // The last consumer warp of the CTA to come here arrives for the CTA.
  __device__ void warp_done(int which, Counter arrival) {
    __syncwarp();
    if (lane_ == 0) {
      unsigned before;
      asm volatile("atom.acq_rel.cta.shared.add.u32 %0, [%1], 1;"
                   : "=r"(before)
                   : "r"(static_cast<unsigned>(__cvta_generic_to_shared(&s_.warps_done[which])))
                   : "memory");
      if ((before + 1) % S::kWarps == 0) grid_arrive(counter(arrival));  // a CTA's warps meet in between
    }
  }

  // The first error of a launch, for the host: the details, then the word that says they are there.
  __device__ void record_error(unsigned dependency, unsigned expected, unsigned seen) {
    *const_cast<volatile int*>(&s_.expired) = 1;
    if (atomicCAS(&u_.error[kErrorClaim], 0u, 1u) != 0) return;
    u_.error[1] = this->cta_, u_.error[2] = expected, u_.error[3] = seen;
    __threadfence_system();
    *const_cast<volatile unsigned*>(u_.error) = dependency + 1;
  }

 protected:
  const Workspace& u_;
  Shared& s_;
  const int warp_, lane_;
  LocalTeam local_;
};

}  // namespace clusterfusion
