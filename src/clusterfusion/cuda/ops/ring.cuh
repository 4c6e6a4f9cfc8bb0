// The ring: a producer lane copies a CTA's tiles into shared memory, in the order of its schedule and far ahead of use;
// consumer warps take them, tile t of a phase going to the warp that comes t after the phase's first one.
//
// A stage is one copy, or a few, and holds kTiles tiles, for as many warps, a team: few large copies keep memory busier than many small
// ones (5 KB: 4.46 TB/s on an H200, 10 KB: 4.66), and small tiles spread a phase more evenly over the warps. A phase starts
// with a stage of its own.
// Every lane says for itself that it has read its part: compute-sanitizer's racecheck does not see that one lane may speak for a warp
// behind __syncwarp (lab/racecheck.cu).
// A warp that waits for a stage must not see an older use of it, of the same parity. Either a stage is always used by the same team, as
// kStages is a multiple of the teams: then the warp itself has released the use before. Or the ring holds a stage of every team and the
// window beside them: the warp's last stage was copied only when all but a window of what came before it had landed, and the use before
// is among that.
// The window bounds the bytes in flight: messages between CTAs queue behind the stream, and a full ring of requests makes
// every grid-wide dependency slower than the ring is deep.
#pragma once

#include "collectives/block_sum.cuh"
#include "primitives/bulk_copy.cuh"
#include "primitives/mbarrier.cuh"

namespace clusterfusion {

template <int kStages_, int kStageBytes_, int kTiles_, int kWarps_, int kWindow_>
struct Ring {
  static constexpr int kStages = kStages_, kStageBytes = kStageBytes_, kTiles = kTiles_, kWindow = kWindow_;
  static constexpr int kTeams = kWarps_ / kTiles;
  static_assert(kWarps_ % kTiles == 0, "teams have a warp for each tile of a stage");
  static_assert(kStages % kTeams == 0 || kStages >= kTeams + kWindow, "no wait can see an older use of its stage");
  static_assert(kWindow > 0 && kWindow <= kStages, "the window is part of the ring");
  static_assert(kStageBytes % 128 == 0, "stages keep the alignment of the ring");

  struct Barriers {
    cuda::std::uint64_t full[kStages], empty[kStages];
  };

  static __device__ __forceinline__ void init(Barriers& barriers) {  // one thread; mbarrier_init_fence follows
    for (int stage = 0; stage < kStages; stage++) {
      mbarrier_init(&barriers.full[stage], 1);
      mbarrier_init(&barriers.empty[stage], kTiles * kWarpSize);
    }
  }
};

// One lane's side: begin a stage, issue its copies, go on. Its loop is what paces the stream, a stage a turn: all lanes of a warp at
// once, each with a stage, filled the ring faster and made the step 2% slower (lab/decode_step.md).
// kTimed: counts the clocks of its waits for a free stage.
template <typename Ring, bool kTimed = false>
class RingProducer {
 public:
  __device__ RingProducer(char* stages, typename Ring::Barriers& barriers)
      : stages_(shared_address(stages)), full_(shared_address(barriers.full)), empty_(shared_address(barriers.empty)) {}

  // Waits for a free stage, and until fewer than `most` stages, 1 to kWindow, are in flight; announces `bytes`. Returns where the
  // tiles go.
  __device__ __forceinline__ SharedAddress begin(unsigned bytes, int most = Ring::kWindow) {
    const long long start = kTimed ? clock64() : 0;
    mbarrier_wait_local(empty_ + stage_ * kBarrier, parity_ ^ 1);  // a fresh barrier passes a wait for parity 1
    if constexpr (kTimed) waited_for_room_ += clock64() - start;
    for (; in_flight_ >= most; in_flight_--) {
      mbarrier_wait_local(full_ + landing_ * kBarrier, landing_parity_);
      if (++landing_ == Ring::kStages) landing_ = 0, landing_parity_ ^= 1;
    }
    in_flight_++;
    mbarrier_arrive_expect(full_ + stage_ * kBarrier, bytes);
    return stages_ + stage_ * Ring::kStageBytes;
  }
  __device__ __forceinline__ void copy(SharedAddress to, const void* from, unsigned bytes) {
    bulk_copy(to, from, bytes, full_ + stage_ * kBarrier);
  }
  __device__ __forceinline__ void copy_box(SharedAddress to, const TensorMap& map, int c0, int c1, int c2) {
    tensor_copy(to, &map, c0, c1, c2, full_ + stage_ * kBarrier);
  }
  __device__ __forceinline__ void end() {
    if (++stage_ == Ring::kStages) stage_ = 0, parity_ ^= 1;
  }

  // Clocks of waits for a free stage since the last call, with kTimed.
  __device__ long long take_waited_for_room() {
    const long long waited = waited_for_room_;
    waited_for_room_ = 0;
    return waited;
  }

 private:
  static constexpr unsigned kBarrier = sizeof(cuda::std::uint64_t);
  SharedAddress stages_, full_, empty_;
  int stage_ = 0, landing_ = 0, in_flight_ = 0;  // at most: what has landed counts until somebody looks
  unsigned parity_ = 0, landing_parity_ = 0;
  long long waited_for_room_ = 0;
};

// What a warp reads of a stage, which it may hand back behind wait() only: then the values are there. That reads have been issued does
// not keep the next copy from overtaking them, since the hardware takes bulk copies for another kind of access (now and then one did);
// and the compiler moves what is made of the values behind the hand-back.
class StageReads {
 public:
  // A word of every access.
  __device__ __forceinline__ void saw(unsigned word) { words_ ^= word; }
  // Something that has to know the words and does nothing: a pause, for one word in four billion.
  __device__ __forceinline__ void wait() const {
    asm volatile("{\n.reg .pred p;\nsetp.eq.u32 p, %0, 0x9e3779b9;\n@p nanosleep.u32 20;\n}" ::"r"(words_) : "memory");
  }

 private:
  unsigned words_ = 0;
};

// A warp's side. Every warp walks the same phases; in each it visits its own tiles, and its team's stages. kTimed: counts the clocks of its waits.
template <typename Ring, bool kTimed = false>
class RingConsumer {
 public:
  __device__ RingConsumer(const char* stages, typename Ring::Barriers& barriers, int warp)
      : stages_(stages), barriers_(barriers), tile_(warp % Ring::kTiles), stage_(warp / Ring::kTiles),
        ahead_(warp / Ring::kTiles) {}

  // For this warp's tiles among the `count` of the next phase, of kTileBytes each: calls take(tile, data), which waits for its StageReads and
  // gives a Held, hands the stage back, and calls use(tile, held).
  template <int kTileBytes, typename Held, typename Take, typename Use>
  __device__ __forceinline__ void tiles(int count, Take take, Use use) {
    static_assert(kTileBytes * Ring::kTiles <= Ring::kStageBytes, "tiles fit their stage");
    const int stages = (count + Ring::kTiles - 1) / Ring::kTiles;
    if constexpr (kTimed) of_phase_ = 0;
    for (; ahead_ < stages; ahead_ += Ring::kTeams) {
      const unsigned start = kTimed ? clock() : 0;
      mbarrier_wait_local(&barriers_.full[stage_], parity_);
      if constexpr (kTimed) {
        const unsigned waited = clock() - start;
        waited_ += waited, of_phase_ += waited;
      }
      const int tile = ahead_ * Ring::kTiles + tile_;
      const bool mine = Ring::kTiles == 1 || tile < count;
      Held held = {};  // of this turn alone: otherwise it would be kept from one to the next
      if (mine) held = take(tile, stages_ + stage_ * Ring::kStageBytes + tile_ * kTileBytes);
      mbarrier_arrive_local(&barriers_.empty[stage_]);
      if (mine) use(tile, held);
      stage_ += Ring::kTeams;
      if (stage_ >= Ring::kStages) stage_ -= Ring::kStages, parity_ ^= 1;
    }
    ahead_ -= stages;
  }

  // The same where nothing is left to do once a stage is handed back.
  template <int kTileBytes, typename Take>
  __device__ __forceinline__ void tiles(int count, Take take) {
    struct None {};
    tiles<kTileBytes, None>(
        count,
        [&](int tile, const char* data) {
          take(tile, data);
          return None();
        },
        [](int, None) {});
  }

  // With kTimed: what has been waited in this phase so far does not count.
  __device__ void forget_waits() {
    if constexpr (kTimed) waited_ -= of_phase_, of_phase_ = 0;
  }
  // Clocks of this warp's waits for data since the last call, with kTimed.
  __device__ long long take_waited() {
    const unsigned waited = waited_;
    waited_ = 0;
    return waited;
  }

 private:
  const char* stages_;
  typename Ring::Barriers& barriers_;
  int tile_, stage_;
  int ahead_;  // of the next stage of this warp's team, counted from the phase's first one
  unsigned parity_ = 0;
  unsigned waited_ = 0, of_phase_ = 0;  // of a layer: 32 bits last
};

}  // namespace clusterfusion
