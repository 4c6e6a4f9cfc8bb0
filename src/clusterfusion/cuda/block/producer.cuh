// The producer lane's walk through a CTA's weights, in the order in which the tile warps take them, as far ahead as the ring
// holds.
#pragma once

#include "block/cta.cuh"
#include "block/trace.cuh"

namespace clusterfusion {

template <typename S, typename Tracer = NoTrace>
class WeightProducer : public CtaShare<S> {
  using Base = CtaShare<S>;
  using typename Base::DownTiles;
  using typename Base::HiddenTiles;
  using typename Base::WeightRing;

 public:
  __device__ WeightProducer(typename CtaTypes<S>::Shared& shared, Tracer& trace)
      : Base(0), s_(shared), ring_(shared.stages, shared.ring), trace_(trace) {}

  // One layer, or a segment of it.
  template <Segment kSegment>
  __device__ void run(const LayerTensors& w) {
    if constexpr (runs<kSegment>(Segment::project)) {
      if constexpr (S::kUpFirst) up(w);
      rows<HiddenTiles>(w.qkv_weight, S::kQkvRows);
      if constexpr (S::kParallel && !S::kUpFirst) up(w);
    }
    if constexpr (S::kParallel && runs<kSegment>(Segment::output)) rows<DownTiles>(w.down_weight, S::kHidden);
    if constexpr (runs<kSegment>(Segment::output)) rows<HiddenTiles>(w.o_weight, S::kHidden);
    if constexpr (!S::kParallel && runs<kSegment>(Segment::expand)) up(w);
    if constexpr (!S::kParallel && runs<kSegment>(Segment::contract)) rows<DownTiles>(w.down_weight, S::kHidden);
    if constexpr (Tracer::kOn) trace_.record(TraceEvent::room_waited, ring_.take_waited_for_room());
  }

  __device__ void vocabulary(const void* lm_head, int vocabulary_rows) {
    rows<HiddenTiles>(lm_head, vocabulary_rows);
    if constexpr (Tracer::kOn) trace_.record(TraceEvent::room_waited, ring_.take_waited_for_room());
  }

 private:
  __device__ void up(const LayerTensors& w) { between<HiddenTiles>(w.up_weight, this->up_from(), this->up_to()); }

  // This CTA's rows of a matrix of `all_rows`.
  template <typename Tiles>
  __device__ void rows(const void* matrix, int all_rows) {
    between<Tiles>(matrix, this->rows_from(all_rows), this->rows_to(all_rows));
  }

  template <typename Tiles>
  __device__ void between(const void* matrix, int from, int to) {
    const char* source = static_cast<const char*>(matrix) + static_cast<cuda::std::int64_t>(from) * Tiles::kRowBytes;
    if constexpr (Tiles::kParts == 1 || Tiles::kBytes * Tiles::kParts == Tiles::kRowBytes) {  // tiles are alike
      constexpr int kStage = S::kStageTiles * Tiles::kBytes;
      for (int left = (to - from) * Tiles::kRowBytes; left > 0; left -= kStage, source += kStage) copy(source, min(kStage, left));
    } else {
      static_assert(S::kStageTiles == 1, "a row's last tile is a stage of its own");
      for (int row = from; row < to; row++) {
        for (int left = Tiles::kRowBytes; left > 0; left -= Tiles::kBytes) {
          const int bytes = min(Tiles::kBytes, left);
          copy(source, bytes);
          source += bytes;
        }
      }
    }
  }

  __device__ __forceinline__ void copy(const char* source, unsigned bytes) {
    // Attention is in a hurry where it waits for cached tokens; weights that come later come in time, since much is left of the
    // layer's when it has done.
    const bool others_first = mbarrier_met(&s_.cache_turns, 0);
    ring_.copy(ring_.begin(bytes, others_first ? WeightRing::kWindowInOthersHurry : WeightRing::kWindow), source, bytes);
    ring_.end();
  }

  typename CtaTypes<S>::Shared& s_;
  RingProducer<WeightRing, Tracer::kOn> ring_;
  Tracer& trace_;
};

}  // namespace clusterfusion
