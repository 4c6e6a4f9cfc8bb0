// The producer lane's walk through a CTA's weights and cached tokens, in the order in which the tile warps take them, as far ahead as
// the ring holds.
#pragma once

#include "block/cta.cuh"
#include "block/trace.cuh"
#include "primitives/launch_order.cuh"

namespace clusterfusion {

template <typename S, typename Tracer = NoTrace>
class TileProducer : public CtaShare<S> {
  using Base = CtaShare<S>;
  using typename Base::Cached;
  using typename Base::DownTiles;
  using typename Base::HiddenTiles;
  using typename Base::OutTiles;
  using typename Base::TileRing;

 public:
  __device__ TileProducer(
      const TensorMap& k_map, const TensorMap& v_map, int position, typename CtaTypes<S>::Shared& shared, Tracer& trace)
      : Base(position), k_map_(k_map), v_map_(v_map), ring_(shared.stages, shared.ring), trace_(trace),
        signals_(shared_address(shared.signals)) {}

  // At the start of a step of a launch of several. `attended`, but for the first: the counters of kAttentionDone, which stand at `target`
  // or higher when a head group's have attended the last layer of the step before, and so written their rows of the caches.
  __device__ void begin_step(int position, const unsigned* attended, unsigned target) {
    this->position_ = position, attended_ = attended, target_ = target;
  }

  // One layer, or a segment of it; `layer` counts those of a step.
  template <Segment kSegment>
  __device__ void run(const LayerTensors& w, int layer) {
    constexpr bool kInsideDown = S::kUpFirst && kSegment == Segment::whole;
    if constexpr (runs<kSegment>(Segment::project)) {
      early_for(kNormed, parities_ ^ parities_ >> 1);
      if constexpr (S::kUpFirst) up(w);
      qkv(w);
      if constexpr (S::kParallel && !S::kUpFirst) up(w);
    }
    if constexpr (runs<kSegment>(Segment::attend) && !kInsideDown) cached(layer);
    if constexpr (kInsideDown) {
      const int from = this->rows_from(S::kHidden), to = this->rows_to(S::kHidden);
      const int middle = from + Base::rows_before_cached(to - from);
      early_for(kHidden, parities_);
      between<DownTiles>(w.down_weight, from, middle);
      cached(layer);
      between<DownTiles>(w.down_weight, middle, to);
    } else if constexpr (S::kParallel && runs<kSegment>(Segment::output)) {
      early_for(kHidden, parities_);
      rows<DownTiles>(w.down_weight, S::kHidden);
    }
    if constexpr (runs<kSegment>(Segment::output)) output_by_groups(w);
    if constexpr (!S::kParallel && runs<kSegment>(Segment::expand)) {
      early_for(kMiddleNormed, parities_);
      up(w);
    }
    if constexpr (!S::kParallel && runs<kSegment>(Segment::contract)) down_by_groups(w);
    parities_ ^= 1;
    if constexpr (Tracer::kOn) trace_.record(TraceEvent::room_waited, ring_.take_waited_for_room());
  }

  __device__ void vocabulary(const void* lm_head, int vocabulary_rows) {
    early_for(kNormed, parities_ ^ parities_ >> 1);
    parities_ ^= 2;
    rows<HiddenTiles>(lm_head, vocabulary_rows);
    if constexpr (Tracer::kOn) trace_.record(TraceEvent::room_waited, ring_.take_waited_for_room());
  }

 private:
  // This CTA's tiles of cached tokens, whole ones: of the last, what lies beyond the position is copied and never looked at.
  __device__ void cached(int layer) {
    const int tiles = this->cached_tiles(), head = layer * S::kKvHeads + this->kv_head();
    if (layer == 0 && tiles > 0) {  // weights never change; the step before has written a row of a cache
      if (attended_ == nullptr) {
        wait_for_previous_launch();
      } else {
        grid_wait(attended_ + this->head_group() * kCounterStride, target_);  // if it expires, so does the vector warps' own, which is for the same
      }
      async_proxy_fence();
    }
    for (int first = 0; first < tiles; first += S::kStageTiles) {
      const int count = min(S::kStageTiles, tiles - first);
      SharedAddress to = ring_.begin(count * 2 * Cached::kHalfBytes);
      for (int tile = first; tile < first + count; tile++, to += S::kTileBytes) {
        const int token = (this->split() + tile * this->active_splits()) * Cached::kTokens;
        ring_.copy_box(to, k_map_, 0, token, head);
        ring_.copy_box(to + Cached::kValuesAt, v_map_, 0, token, head);
      }
      ring_.end();
    }
  }

  __device__ void qkv(const LayerTensors& w) {
    const auto qkv_rows = this->qkv_rows();
#pragma unroll 1
    for (int group = 0; group < S::kHeadGroups; group++) {
      const int from = qkv_rows.first(group), to = from + qkv_rows.count(group);
      if constexpr (S::kFusedQkv) {
        between<HiddenTiles>(w.q_weight, from, to);
      } else {
        pieces<HiddenTiles>(from, to, [&](int row) {
          const QkvRow found = qkv_row<S>(w, row);
          return Piece{at_row<HiddenTiles>(found.weight, found.row), found.run};
        });
      }
    }
  }

  __device__ void up(const LayerTensors& w) {
    const auto up_rows = this->up_rows();
#pragma unroll 1
    for (int group = 0; group < Base::kHiddenGroups; group++) {
      const int from = up_rows.first(group), to = from + up_rows.count(group);
      if constexpr (S::kGated) {
        in_turn<HiddenTiles>(at_row<HiddenTiles>(w.gate_weight, from), at_row<HiddenTiles>(w.up_weight, from), to - from);
      } else {
        between<HiddenTiles>(w.up_weight, from, to);
      }
    }
  }

  // Of each row what is multiplied by the attention of the first head group, then by the next one's: a tile is of as many rows as fit.
  __device__ void output_by_groups(const LayerTensors& w) {
    if constexpr (S::kHeadGroups == 1) {
      early_for(kAttended, parities_);
      rows<OutTiles>(w.o_weight, S::kHidden);
    } else {
      constexpr int kRows = S::kStageTiles * OutTiles::kRows, kRowBytes = S::kQSize * 2;
      const int from = this->rows_from(S::kHidden), all = this->rows_to(S::kHidden) - from;
#pragma unroll 1
      for (int group = 0; group < S::kHeadGroups; group++) {
        early_for(kAttended + group, parities_);
        const char* source = static_cast<const char*>(w.o_weight) + static_cast<cuda::std::int64_t>(from) * kRowBytes + group * OutTiles::kRowBytes;
        for (int left = all; left > 0; left -= kRows) {
          const int rows = min(kRows, left);
          SharedAddress to = begin_stage(rows * OutTiles::kRowBytes);
#pragma unroll 2
          for (int row = 0; row < rows; row++, to += OutTiles::kRowBytes, source += kRowBytes) ring_.copy(to, source, OutTiles::kRowBytes);
          ring_.end();
        }
      }
    }
  }

  // With sequential residual: of each row what is multiplied by the first group of h, then by the next one.
  __device__ void down_by_groups(const LayerTensors& w) {
    if constexpr (Base::kHiddenGroups == 1) {
      early_for(kHidden, parities_);
      rows<DownTiles>(w.down_weight, S::kHidden);
    } else {
      constexpr int kBytes = Base::kGroupParts * DownTiles::kBytes;
      static_assert(Base::kGroupParts == S::kStageTiles, "a stage for every row and group");
      const int from = this->rows_from(S::kHidden), to = this->rows_to(S::kHidden);
#pragma unroll 1
      for (int group = 0; group < Base::kHiddenGroups; group++) {
        early_for(kHidden + group, parities_);
        const char* source = at_row<DownTiles>(w.down_weight, from) + group * kBytes;
        for (int row = from; row < to; row++, source += DownTiles::kRowBytes) copy(source, kBytes);
      }
    }
  }

  // This CTA's rows of a matrix of `all_rows`.
  template <typename Tiles>
  __device__ void rows(const void* matrix, int all_rows) {
    between<Tiles>(matrix, this->rows_from(all_rows), this->rows_to(all_rows));
  }

  template <typename Tiles>
  static __device__ const char* at_row(const void* matrix, int row) {
    return static_cast<const char*>(matrix) + static_cast<cuda::std::int64_t>(row) * Tiles::kRowBytes;
  }

  // Rows that lie in several matrices: find(row) says where a row is and how many follow it there. A stage is of as many copies
  // as it has pieces.
  struct Piece {
    const char* from;
    int rows;
  };
  template <typename Tiles, typename Find>
  __device__ void pieces(int from, int to, Find find) {
    static_assert(Tiles::kParts == 1, "hidden rows fit a tile");
    constexpr int kRows = S::kStageTiles * Tiles::kRows;
    if constexpr (kRows == 1) {
      for (int row = from; row < to;) {
        Piece piece = find(row);
        for (const int end = min(to, row + piece.rows); row < end; row++, piece.from += Tiles::kRowBytes) copy(piece.from, Tiles::kRowBytes);
      }
    } else {
      for (int first = from; first < to; first += kRows) {
        const int rows = min(kRows, to - first);
        const SharedAddress stage = begin_stage(rows * Tiles::kRowBytes);
        for (int row = 0; row < rows;) {
          const Piece piece = find(first + row);
          const int taken = min(piece.rows, rows - row);
          ring_.copy(stage + row * Tiles::kRowBytes, piece.from, taken * Tiles::kRowBytes);
          row += taken;
        }
        ring_.end();
      }
    }
  }

  // So many rows of two matrices, the first one's before the other's.
  template <typename Tiles>
  __device__ void in_turn(const char* one, const char* other, int rows) {
    constexpr int kRows = S::kStageTiles * Tiles::kRows;
    for (int left = 2 * rows; left > 0; left -= kRows) {
      SharedAddress to = begin_stage(min(kRows, left) * Tiles::kRowBytes);
#pragma unroll
      for (int row = 0; row < kRows; row++, to += Tiles::kRowBytes) {
        if (kRows > 1 && row >= left) break;
        ring_.copy(to, one, Tiles::kRowBytes);
        const char* next = one + Tiles::kRowBytes;
        one = other, other = next;
      }
      ring_.end();
    }
  }

  template <typename Tiles>
  __device__ void between(const void* matrix, int from, int to) {
    const char* source = at_row<Tiles>(matrix, from);
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
    ring_.copy(begin_stage(bytes), source, bytes);
    ring_.end();
  }

  // A stage of weights.
  __device__ __forceinline__ SharedAddress begin_stage(unsigned bytes) {
    if (needed_ != 0 && mbarrier_is_over(needed_ & ~1u, needed_ & 1)) needed_ = 0;
    return ring_.begin(bytes, needed_ != 0 ? S::kEarlyWindow : S::kWindow);
  }

  // Of the stages to come: the signal that says that what they are multiplied by is there, and its round. Until then this CTA waits for others, and
  // leaves the memory to those that still have to read what everybody waits for. Where the ring holds as much as a layer has, an older round can
  // be taken for this one, and nobody yields: nothing but time rests on it.
  __device__ __forceinline__ void early_for(int signal, unsigned round) {
    if constexpr (S::kEarlyWindow < S::kWindow) needed_ = signals_ + signal * sizeof(cuda::std::uint64_t) | (round & 1);
  }

  const TensorMap &k_map_, &v_map_;
  const unsigned* attended_ = nullptr;
  unsigned target_ = 0;
  RingProducer<TileRing, Tracer::kOn> ring_;
  Tracer& trace_;
  const SharedAddress signals_;
  SharedAddress needed_ = 0;  // a signal's, and in its last bit a parity; or nothing
  unsigned parities_ = 0;     // of the layers of this launch so far, and of its steps
};

}  // namespace clusterfusion
