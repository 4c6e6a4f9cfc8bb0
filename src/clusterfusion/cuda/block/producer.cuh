// The producer lane's walk through a CTA's weights, in the order in which the tile warps take them, as far ahead as the ring
// holds.
#pragma once

#include "block/share.cuh"

namespace clusterfusion {

template <typename S>
class WeightProducer : public CtaShare<S> {
  using Base = CtaShare<S>;
  using typename Base::DownTiles;
  using typename Base::HiddenTiles;
  using typename Base::WeightRing;

 public:
  __device__ WeightProducer(char* stages, typename WeightRing::Barriers& barriers) : Base(0), ring_(stages, barriers) {}

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
  }

  __device__ void vocabulary(const void* lm_head, int vocabulary_rows) { rows<HiddenTiles>(lm_head, vocabulary_rows); }

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
    if constexpr (Tiles::kParts == 1) {
      for (int row = from; row < to; row += Tiles::kRows) {
        const unsigned bytes = min(Tiles::kRows, to - row) * Tiles::kRowBytes;
        ring_.copy(ring_.begin(bytes), source, bytes);
        ring_.end();
        source += bytes;
      }
    } else {
      for (int row = from; row < to; row++) {
        for (int part = 0; part < Tiles::kParts; part++) {
          constexpr int kPartBytes = Tiles::kPartColumns * 2;
          const unsigned bytes = min(kPartBytes, Tiles::kRowBytes - part * kPartBytes);
          ring_.copy(ring_.begin(bytes), source, bytes);
          ring_.end();
          source += bytes;
        }
      }
    }
  }

  RingProducer<WeightRing> ring_;
};

}  // namespace clusterfusion
