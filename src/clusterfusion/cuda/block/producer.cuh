// The producer lane's walk through a CTA's schedule. LayerConsumer takes the same tiles in the same order.
#pragma once

#include "block/share.cuh"

namespace clusterfusion {

template <typename S>
class LayerProducer : public CtaShare<S> {
  using Base = CtaShare<S>;
  using typename Base::Cached;
  using typename Base::DownTiles;
  using typename Base::HiddenTiles;
  using typename Base::RingType;
  using Base::rows_from;
  using Base::rows_to;

 public:
  __device__ LayerProducer(int position, char* stages, typename RingType::Barriers& barriers)
      : Base(position), ring_(stages, barriers) {}

  // One layer, or a segment of it. before_cache() comes before the first cached tile.
  template <Segment kSegment, typename BeforeCache>
  __device__ void run(
      const LayerTensors& w, const TensorMap& k_map, const TensorMap& v_map, int first_head, BeforeCache before_cache) {
    constexpr bool kWhole = kSegment == Segment::whole;
    const int up_first = rows_from(S::kIntermediate), up_last = rows_to(S::kIntermediate);
    const int up_middle = kWhole && S::kParallel ? up_first + this->up_before(up_last - up_first) : up_last;
    if constexpr (runs<kSegment>(Segment::project)) {
      rows<HiddenTiles>(w.qkv_weight, rows_from(S::kQkvRows), rows_to(S::kQkvRows));
      if constexpr (S::kParallel) rows<HiddenTiles>(w.up_weight, up_first, up_middle);
    }
    if constexpr (runs<kSegment>(Segment::attend)) {
      before_cache();
      cached(k_map, v_map, first_head);
    }
    if constexpr (kWhole && S::kParallel) rows<HiddenTiles>(w.up_weight, up_middle, up_last);
    if constexpr (runs<kSegment>(Segment::output)) rows<HiddenTiles>(w.o_weight, rows_from(S::kHidden), rows_to(S::kHidden));
    if constexpr (!S::kParallel && runs<kSegment>(Segment::expand)) rows<HiddenTiles>(w.up_weight, up_first, up_last);
    if constexpr (S::kParallel ? runs<kSegment>(Segment::output) : runs<kSegment>(Segment::contract)) {
      rows<DownTiles>(w.down_weight, rows_from(S::kHidden), rows_to(S::kHidden));
    }
  }

  __device__ void vocabulary(const void* lm_head, int vocabulary_rows) {
    rows<HiddenTiles>(lm_head, rows_from(vocabulary_rows), rows_to(vocabulary_rows));
  }

 private:
  template <typename Tiles>
  __device__ void rows(const void* matrix, int from, int to) {
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

  // Whole tiles: of the last one, what lies beyond the position is copied and never looked at.
  __device__ void cached(const TensorMap& k_map, const TensorMap& v_map, int first_head) {
    const int tiles = this->cached_tiles();
    for (int tile = 0; tile < tiles; tile++) {
      const int token = (this->split() + tile * S::kSplits) * Cached::kTokens;
      char* to = ring_.begin(2 * Cached::kHalfBytes);
      ring_.copy_box(to, &k_map, token, first_head + this->head());
      ring_.copy_box(to + Cached::kValuesAt, &v_map, token, first_head + this->head());
      ring_.end();
    }
  }

  RingProducer<RingType> ring_;
};

}  // namespace clusterfusion
