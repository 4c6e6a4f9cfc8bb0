// A CTA of the decoder programs: its shared memory, its teams, and how it waits for other CTAs and complains.
//
// Warps have roles. Vector warps make what tiles are multiplied by, norms, queries, activations from other CTAs, and finish what
// comes of it; tile warps multiply tiles of weights with it, take queries over tiles of cached tokens, and do nothing else; one lane
// fetches both. So the stream goes on while a dependency is under way, and what is exposed of one is what the ring does not cover.
#pragma once

#include "block/share.cuh"
#include "block/tagged.cuh"
#include "collectives/async_gather.cuh"
#include "collectives/team.cuh"
#include "ops/norm.cuh"
#include "primitives/grid_counter.cuh"

namespace clusterfusion {

__host__ __device__ constexpr int align16(int bytes) { return (bytes + 15) / 16 * 16; }
__host__ __device__ constexpr int larger(int a, int b) { return a > b ? a : b; }
__host__ __device__ constexpr int smaller(int a, int b) { return a < b ? a : b; }

// Once a layer, as far as a layer has them. Vector warps signal that something is there for the tile warps: the normed input, the
// bundle's queries, the attention's output, the normed middle, h. Tile warps signal that they have done: that q, k, v of a head group are
// projected, the last one's so that the attention's output may take x1's place; the partials of the cached tokens; that up is, so that with parallel
// residual h may take x2's place and, with a gate, that its sums are there; the sums of the output projection, with parallel
// residual those of the down projection too, otherwise these for themselves. kExpanded and kHidden are one a hidden group:
// kExpanded + group; kProjected and kAttended one a head group. Once a step: that the CTA's logits are in the choice of the token, kChosen, and kNormed again, for the final norm.
// An RMSNorm's factor for the whole vector comes behind the vector, for what has been made of it: kScaled, as often as kNormed, and where
// tile warps finish rows of up kMiddleScaled.
enum Signal {
  kNormed, kScaled, kOutputSums, kMiddleNormed, kMiddleScaled, kDownSums, kQueriesReady, kPartialsReady, kChosen,
  kProjected, kAttended = kProjected + kMostGroups, kExpanded = kAttended + kMostGroups, kHidden = kExpanded + kMostGroups,
  kSignals = kHidden + kMostGroups
};
__host__ __device__ constexpr bool from_tiles(int signal) {
  return (signal >= kProjected && signal < kProjected + kMostGroups) || (signal >= kExpanded && signal < kExpanded + kMostGroups) ||
         signal == kOutputSums || signal == kDownSums || signal == kPartialsReady || signal == kChosen;
}

// What a CTA keeps in shared memory, and the collectives' types that follow from the shape.
template <typename S>
struct CtaTypes {
  using Share = CtaShare<S>;
  static constexpr int kPartial = kPartialFloats<S::kHeadDim>;
  static constexpr int kVectorBytes = S::kLongest * 4;
  static constexpr int kQkvRows = Share::most_rows(S::kQkvRows), kUpRows = Share::kMostUpRows;
  static constexpr int kOutRows = Share::most_rows(S::kHidden);
  // Where each matrix's biases start.
  static constexpr int kUpBias = kQkvRows, kGateBias = kUpBias + kUpRows;
  static constexpr int kOutBias = S::kGated ? kGateBias + kUpRows : kGateBias, kDownBias = kOutBias + kOutRows;
  static constexpr int kBiases = kDownBias + kOutRows;
  // Vectors in shared memory: the two normed x of the projections; later, in their place, the attention's output and h. With
  // sequential residual one after another in the first place, x, the attention's output, the middle, all normed; h has its own.
  static constexpr int kHiddenBytes = align16(S::kIntermediate * 2);
  static constexpr int kVectorsBytes = kVectorBytes + (S::kParallel ? larger(kVectorBytes, kHiddenBytes) : kHiddenBytes);

  using LocalTeam = PartialTeam<1, S::kVectorThreads, 0, 1>;
  static constexpr int kPartialsFloats = S::kQueries * kPartial;  // of all heads of a bundle
  using Warp = AttentionWarpOf<typename S::W, typename Share::Cached, S::kQueries>;
  using Block = BlockSum<kNormSums, S::kVectorThreads>;
  using Gather = AsyncGather<float4, kPartialsFloats / 4, S::kMerged, 1>;  // once a layer: a peer has seen all of this CTA's x before the next
  // With sequential residual the slots of the cached tokens' partials lie where h will be: it comes when they are merged, and is gone
  // when the next layer's queries are there, which all of x has gone into.
  static constexpr int kSlotFloats = (S::kWarps + 1) * kPartialsFloats;  // one a tile warp, and the new token
  static constexpr bool kSlotsInHidden = !S::kParallel && kSlotFloats * 4 <= kHiddenBytes;

  struct Shared {
    alignas(128) char stages[S::kStages * S::kStageBytes];
    alignas(16) char vectors[kVectorsBytes];
    alignas(16) float query[S::kQueries * S::kHeadDim];
    float key[S::kHeadDim], value[S::kHeadDim];
    alignas(16) float own_slots[kSlotsInHidden ? 1 : kSlotFloats];
    float o_sums[kOutRows * Share::kOutParts];
    float up_sums[S::kGated ? 2 * kUpRows : 1];  // of gates and what they are multiplied with, in turn
    float down_sums[kOutRows * Share::DownTiles::kParts];
    float biases[kBiases];
    float residual[kOutRows];                 // the whole step's: this CTA's rows
    alignas(16) char best[S::kWarps * 16];    // and its warps' likeliest tokens
    typename Share::TileRing::Barriers ring;
    cuda::std::uint64_t signals[kSignals];
    typename Block::Scratch block;
    float scales[2];  // of an RMSNorm: of the input's, of the middle's
    typename Gather::Scratch gather;
    typename LocalTeam::Scratch local;
    unsigned warps_done[kMostGroups];  // a warp may be done with a group before another is with the one before
    int expired;
    // Read from memory once, so that all of the CTA goes by the same: the position, and the number of launches before.
    int position;
    unsigned launches;
    int token;  // that the step before chose
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
    CtaShare<S>::TileRing::init(shared.ring);
    for (int i = 0; i < kSignals; i++) mbarrier_init(&shared.signals[i], from_tiles(i) ? S::kTileThreads : S::kVectorThreads);
    for (unsigned& done : shared.warps_done) done = 0;
    shared.expired = 0;
    LocalTeam::init(shared.local);
    CtaTypes<S>::Gather::template init<S::kVectorThreads>(shared.gather);
    mbarrier_init_fence();
  }

  __device__ Shared& shared() { return s_; }
  __device__ int position() const { return this->position_; }
  __device__ float* slots() const {
    return CtaTypes<S>::kSlotsInHidden ? reinterpret_cast<float*>(s_.vectors + CtaTypes<S>::kVectorBytes) : s_.own_slots;
  }
  // At the start of a step of a launch of several, `step` of them and their `layers` layers each before it.
  __device__ void begin_step(int position, unsigned step, unsigned layers) {
    this->position_ = position;
    parities_ = (parities_ & kAttendedParity) | (step * layers & 1) | (step & 1) << 1;
  }
  // At the start of every layer.
  __device__ void begin_layer() {
    this->cta_ = opaque(this->cta_), this->position_ = opaque(this->position_);
    thread_ = opaque(thread_), lane_ = opaque(lane_);
  }
  __device__ unsigned* counter(int which) const { return u_.counters + which * kCounterStride; }

  // Between the roles of this CTA. Every thread of the one signals, every thread of the other that wants to know waits, for the
  // round of `layer` of the step. Parity is safe: a round's signals all depend on all signals of the round before
  // having been waited for. Not bounded: it waits for warps whose own waits are.
  __device__ void signal(int which) { mbarrier_arrive_local(&s_.signals[which]); }
  __device__ void await(int which, unsigned layer) {
    await_round(which, layer + parities_ + (which == kNormed || which == kScaled ? parities_ >> 1 : 0));
  }
  __device__ void await_round(int which, unsigned round) { mbarrier_wait_local(&s_.signals[which], round & 1); }
  // Of the layers in which this CTA has a part in attention.
  __device__ void await_of_attended(int which) {
    await_round(which, parities_ / kAttendedParity);
    parities_ ^= kAttendedParity;
  }

  // A row's sum over the normed input or, with kMiddle, the normed middle, and a bias: what an RMSNorm has left out is made up for. For tile warps
  // behind await_scale, on any lane, and for vector warps.
  template <bool kMiddle>
  __device__ float scaled(float sum) const {
    return S::kNorm == Norm::rms_norm ? sum * s_.scales[kMiddle] : sum;
  }
  template <bool kMiddle>
  __device__ float scaled(float sum, float bias) const {
    return S::kNorm == Norm::rms_norm ? fmaf(sum, s_.scales[kMiddle], bias) : sum + bias;
  }
  template <bool kMiddle>
  __device__ void await_scale(unsigned layer) {
    if constexpr (S::kNorm == Norm::rms_norm) await(kMiddle ? kMiddleScaled : kScaled, layer);
  }

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
  __device__ void wait(int which, unsigned target, Dependency dependency) {
    if (thread_ == 0 && !expired() && !grid_wait(counter(which), target)) {
      record_error(dependency, target, load_acquire(counter(which)));
    }
    block_sync();
  }

  // This thread polls for kCount items: ask(i) has the load of item i issued, take(i) says whether it brought what is wanted.
  // Never hangs, as wait.
  template <int kCount, typename Ask, typename Take>
  __device__ __forceinline__ void poll(Dependency dependency, unsigned epoch, Ask ask, Take take) {
    static_assert(kCount < 32, "a bit an item");
    constexpr unsigned kAll = (1u << kCount) - 1;
    unsigned missing = kAll;
    const auto look = [&] {
#pragma unroll
      for (int i = 0; i < kCount; i++) {
        if (missing >> i & 1) ask(i);
      }
      unsigned came = 0;
#pragma unroll
      for (int i = 0; i < kCount; i++) came |= take(i) ? 1u << i : 0u;
      missing &= ~came;
      return missing == 0;
    };
    if (look()) return;
    const long long start = clock64();
    bool done = false, given_up = false;
    while (!(done = look()) && !(given_up = expired()) && clock64() - start < kWaitLimitClocks) __nanosleep(kSpinNanoseconds);
    if (!done && !given_up) record_error(dependency, epoch, missing);
  }

  __device__ bool expired() const { return *const_cast<const volatile int*>(&s_.expired) != 0; }

 protected:
  const Workspace& u_;
  Shared& s_;
  int thread_, warp_, lane_;  // thread and warp in the role
  // In one register: the parity of the launch's layers before this step, of its steps before it, of the layers so far in which this
  // CTA had a part in attention.
  static constexpr unsigned kAttendedParity = 4;
  unsigned parities_ = 0;
  LocalTeam local_;
};

}  // namespace clusterfusion
