// Pace keeps the streams of all CTAs abreast. Between two dependencies each has as much to read, yet now this one, now that one gets less of
// the memory than the others, and all wait for the last. So each tells how far it is, a mark a part of a layer, sees how far all are
// on average, and has the more copies in flight the further it is behind. Which bits come of it does not depend on it.
//
// The counter of marks only grows: every CTA adds kMarks a part of a step, a layer or the LM head, whatever its share of it is.
#pragma once

#include "block/share.cuh"

namespace clusterfusion {

// In place of Pace where a layer waits so often that there is not much to keep abreast.
struct NoPace {
  __device__ int lead() { return 0; }
  __device__ int more() const { return 0; }
  __device__ void end_part() {}
  __device__ void end() {}
};

// One thread's.
template <typename S>
class Pace {
  using TileRing = typename CtaShare<S>::TileRing;

 public:
  static constexpr int kStagesAMark = 16;
  static constexpr int kStagesALayer =
      static_cast<long long>(S::kHidden) * (S::kQkvRows + S::kQSize + (1 + S::kUpTimes) * S::kIntermediate) * 2 /
      (static_cast<long long>(S::kCtas) * S::kStageBytes);
  static constexpr int kMarks = kStagesALayer < kStagesAMark ? 1 : kStagesALayer / kStagesAMark;
  static constexpr int kTrip = 4;    // stages from a look at the others to what is made of it: by then it has come
  static constexpr int kBehind = 2;  // stages behind the others, for one more in flight

  // In shared memory: what was seen of the counter, and an mbarrier that says that it has come.
  struct alignas(16) Seen {
    unsigned words[4];
    cuda::std::uint64_t full;
  };
  static __device__ __forceinline__ void init(Seen& seen) { mbarrier_init(&seen.full, 1); }  // one thread; mbarrier_init_fence follows

  // `marks`: all CTAs' counter. `before`: marks that a CTA has made in earlier launches.
  __device__ Pace(unsigned* marks, unsigned before, Seen& seen) : marks_(marks), seen_(seen), own_(before) {}

  // Ahead of a stage of weights: how many more than usual may be in flight.
  __device__ __forceinline__ int lead() {
    if (--left_ == 0) {
      if (looks_) {
        look();
      } else if (marks_left_ > 1) {
        mark();
      }
    }
    return more_;
  }

  // The same ahead of another stage.
  __device__ __forceinline__ int more() const { return more_; }

  // After a part's last stage.
  __device__ __forceinline__ void end_part() {
    for (; marks_left_ > 1; marks_left_--) tell();
    mark();
    marks_left_ = kMarks;
  }

  // Nothing comes into shared memory any more.
  __device__ __forceinline__ void end() {
    if (looks_) await();
  }

 private:
  __device__ __forceinline__ void tell() {
    own_++;
    asm volatile("red.relaxed.gpu.global.add.u32 [%0], 1;" ::"l"(marks_) : "memory");
  }
  __device__ __forceinline__ void mark() {
    tell();
    marks_left_--;
    if (looks_) return;  // as of the mark before
    asked_ = own_;
    mbarrier_arrive_expect(&seen_.full, sizeof(seen_.words));
    bulk_copy(shared_address(seen_.words), marks_, sizeof(seen_.words), shared_address(&seen_.full));
    looks_ = true, left_ = kTrip;
  }
  // When this CTA asked it had just made a mark; the others were half a mark further, on average, than they had told.
  __device__ __forceinline__ void look() {
    await();
    const unsigned all = *const_cast<volatile unsigned*>(seen_.words);
    const int behind = static_cast<int>(all - asked_ * S::kCtas) + S::kCtas / 2;  // in units of 1 / kCtas of a mark
    more_ = max(-TileRing::kFewer, min(TileRing::kMore, behind * kStagesAMark / (S::kCtas * kBehind)));
    looks_ = false, left_ = kStagesAMark - kTrip;
  }
  __device__ __forceinline__ void await() {
    mbarrier_wait_local(&seen_.full, parity_);
    parity_ ^= 1;
  }

  unsigned* marks_;
  Seen& seen_;
  unsigned own_, asked_ = 0;                       // marks, and how many when it asked for the others'
  int marks_left_ = kMarks, left_ = kStagesAMark;  // of this part; stages until there is something to do
  bool looks_ = false;                             // at the others, or it makes a mark
  unsigned parity_ = 0;
  int more_ = 0;
};

template <typename S>
using PaceOf = cuda::std::conditional_t<S::kUpFirst, Pace<S>, NoPace>;

}  // namespace clusterfusion
