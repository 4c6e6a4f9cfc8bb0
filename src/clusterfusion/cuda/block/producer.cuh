// The producer lane's walk through a CTA's schedule. BlockConsumer takes the same tiles in the same order.
#pragma once

#include "block/share.cuh"

namespace clusterfusion {

template <typename S, Segment kSegment>
class BlockProducer : public BlockShare<S, kSegment> {
  using Base = BlockShare<S, kSegment>;
  using typename Base::Cached;
  using typename Base::DownTiles;
  using typename Base::HiddenTiles;
  using typename Base::RingType;
  using typename Base::W;
  using Base::a_;
  using Base::attends;
  using Base::cached_tiles;
  using Base::head;
  using Base::kWhole;
  using Base::rows_from;
  using Base::rows_to;
  using Base::runs;
  using Base::split;
  using Base::up_before;

 public:
  using Base::Base;

  __device__ void run(char* stages, typename RingType::Barriers& barriers) {
    RingProducer<RingType> ring(stages, barriers);
    const int up_first = rows_from(S::kIntermediate), up_last = rows_to(S::kIntermediate);
    const int up_middle = up_first + up_before(up_last - up_first);
    if constexpr (runs(Segment::project)) {
      produce_rows<HiddenTiles>(ring, a_.qkv_weight, rows_from(S::kQkvRows), rows_to(S::kQkvRows));
      if constexpr (S::kParallel) produce_rows<HiddenTiles>(ring, a_.up_weight, up_first, up_middle);
    }
    if constexpr (runs(Segment::attend)) produce_cached(ring);
    if constexpr (kWhole && S::kParallel) produce_rows<HiddenTiles>(ring, a_.up_weight, up_middle, up_last);
    if constexpr (runs(Segment::output)) produce_rows<HiddenTiles>(ring, a_.o_weight, rows_from(S::kHidden), rows_to(S::kHidden));
    if constexpr (!S::kParallel && runs(Segment::expand)) produce_rows<HiddenTiles>(ring, a_.up_weight, up_first, up_last);
    if constexpr (S::kParallel ? runs(Segment::output) : runs(Segment::contract)) {
      produce_rows<DownTiles>(ring, a_.down_weight, rows_from(S::kHidden), rows_to(S::kHidden));
    }
  }

 private:
  template <typename Tiles>
  __device__ void produce_rows(RingProducer<RingType>& ring, const void* matrix, int from, int to) {
    const char* source = static_cast<const char*>(matrix) + static_cast<cuda::std::int64_t>(from) * Tiles::kRowBytes;
    if constexpr (Tiles::kParts == 1) {
      for (int row = from; row < to; row += Tiles::kRows) {
        const unsigned bytes = min(Tiles::kRows, to - row) * Tiles::kRowBytes;
        ring.copy(ring.begin(bytes), source, bytes);
        ring.end();
        source += bytes;
      }
    } else {
      for (int row = from; row < to; row++) {
        for (int part = 0; part < Tiles::kParts; part++) {
          constexpr int kPartBytes = Tiles::kPartColumns * 2;
          const unsigned bytes = min(kPartBytes, Tiles::kRowBytes - part * kPartBytes);
          ring.copy(ring.begin(bytes), source, bytes);
          ring.end();
          source += bytes;
        }
      }
    }
  }

  // Whole tiles: of the last one, what lies beyond the position is copied and never looked at.
  __device__ void produce_cached(RingProducer<RingType>& ring) {
    const int tiles = cached_tiles();
    for (int tile = 0; tile < tiles; tile++) {
      const int token = (split() + tile * S::kSplits) * Cached::kTokens;
      char* to = ring.begin(2 * Cached::kHalfBytes);
      ring.copy_box(to, &a_.k_map, token, head());
      ring.copy_box(to + Cached::kValuesAt, &a_.v_map, token, head());
      ring.end();
    }
  }
};

}  // namespace clusterfusion
