// The tile warps' side of a decoder layer: rows of weights times a vector, and what one row's sum needs; queries over cached tokens.
#pragma once

#include "block/cta.cuh"
#include "block/trace.cuh"
#include "primitives/named_barrier.cuh"

namespace clusterfusion {

template <typename S, typename Tracer = NoTrace>
class TileWarps : public CtaState<S> {
  using Base = CtaState<S>;
  using typename Base::DownTiles;
  using typename Base::HiddenTiles;
  using typename Base::OutTiles;
  using typename Base::W;
  using Base::kGroupColumns;
  using Base::kGroupParts;
  using Base::kHiddenGroups;
  using Base::kUpBias;
  using Base::kVectorBytes;
  using Base::lane_;
  using Base::rows_from;
  using Base::rows_to;
  using Base::s_;
  using Base::u_;

 public:
  using typename Base::Shared;

  __device__ TileWarps(const Workspace& workspace, int position, Shared& shared, Tracer& trace)
      : Base(workspace, position, shared, S::kVectorThreads), ring_(shared.stages, shared.ring, this->warp_),
        trace_(trace) {}

  // One layer, or a segment of it; `layer`, `epoch` and kFaultCta as for VectorWarps.
  template <Segment kSegment, int kFaultCta = -1>
  __device__ void run(unsigned epoch, int layer) {
    constexpr bool kWhole = kSegment == Segment::whole;
    this->begin_layer();
    if constexpr (runs<kSegment>(Segment::project)) {
      trace_.mark(TraceEvent::project_wait);
      const auto normed = [&] {
        this->await(kNormed, layer);
        begin(TraceEvent::project_begin);
      };
      if constexpr (S::kUpFirst) {
        up<kWhole, kFaultCta>(normed, layer);
        qkv<kWhole>(Nothing(), epoch, layer);
      } else {
        qkv<kWhole>(normed, epoch, layer);
        if constexpr (S::kParallel) up<kWhole, kFaultCta>(Nothing(), layer);
      }
    }
    constexpr bool kInsideDown = S::kUpFirst && kWhole;
    if constexpr (runs<kSegment>(Segment::attend) && !kInsideDown) cached();
    if constexpr (S::kParallel && runs<kSegment>(Segment::output)) down<kInsideDown>(layer);
    if constexpr (runs<kSegment>(Segment::output)) {
      trace_.mark(TraceEvent::o_wait);
#pragma unroll 1
      for (int group = 0; group < S::kHeadGroups; group++) {
        const auto attended = [&] {
          this->await(kAttended + group, layer);
          if (group == 0) begin(TraceEvent::o_begin);
        };
        const SplitVector x = split_vector<S>(s_.vectors, 0);
        const int before = group * (S::kGroupQSize / kVector);
        gemv_parts<OutTiles, OutTiles::kParts, Base::kOutParts>(
            out_rows(), SplitVector{x.low + before, x.high + before}, attended, s_.o_sums + group * OutTiles::kParts);
      }
      this->signal(kOutputSums);
      trace_.mark(TraceEvent::o_done);
    }
    if constexpr (!S::kParallel && runs<kSegment>(Segment::expand)) {
      up<kWhole, kFaultCta>([&] { this->await(kMiddleNormed, layer); }, layer);
    }
    if constexpr (!S::kParallel && runs<kSegment>(Segment::contract)) {
      down<false>(layer);
      this->signal(kDownSums);
    }
    if constexpr (Tracer::kOn) trace_.record(TraceEvent::data_waited, ring_.take_waited());
  }

  // The LM head: calls out(index, logit) on some lane for each of this CTA's rows of the vocabulary.
  template <typename Out>
  __device__ void vocabulary(int vocabulary_rows, int layer, Out out) {
    trace_.mark(TraceEvent::project_wait);
    const auto normed = [&] {
      this->await(kNormed, layer);
      begin(TraceEvent::project_begin);
    };
    const int first = rows_from(vocabulary_rows), rows = rows_to(vocabulary_rows) - first;
    float kept = 0;
    int kept_row = -1;  // what is made of a logit takes one lane as long as all lanes
    gemv<W, HiddenTiles>(
        ring_, rows, split_vector<S>(s_.vectors, 0), lane_, normed, [&](int row, int, float value) { kept = value, kept_row = row; },
        [&] {
          if (kept_row < 0) return;
          this->template await_scale<false>(layer);
          out(first + kept_row, this->template scaled<false>(kept));
          kept_row = -1;
        });
    this->template await_scale<false>(layer);  // who has no row, too: a signal that is given is awaited
    trace_.mark(TraceEvent::logits_done);
    if constexpr (Tracer::kOn) trace_.record(TraceEvent::data_waited, ring_.take_waited());
  }

  __device__ void tiles_sync() { named_barrier_sync<2, S::kTileThreads>(); }

 private:
  // What tiles are multiplied by is there. A warp has waited for its first one by then, which is a part of the other wait.
  __device__ void begin(TraceEvent event) {
    trace_.mark(event);
    ring_.forget_waits();
  }
  __device__ int out_rows() const { return rows_to(S::kHidden) - rows_from(S::kHidden); }

  template <bool kWhole, typename Ready>
  __device__ void qkv(Ready ready, unsigned epoch, int layer) {
    int done = 0;  // of the CTA's rows
#pragma unroll 1
    for (int group = 0; group < S::kHeadGroups; group++) {
      const auto qkv_rows = this->qkv_rows();
      const int first = qkv_rows.first(group), rows = qkv_rows.count(group);
      const float* biases = s_.biases + done;
      const auto ready_once = [&] {
        if (group == 0) ready();
      };
      gemv_rows<HiddenTiles>(rows, split_vector<S>(s_.vectors, 0), ready_once, [&](int row, float value) {
        this->template await_scale<false>(layer);
        const float biased = this->template scaled<false>(value, biases[row]);
        if constexpr (kWhole) {
          store_pair(static_cast<Pair*>(u_.qkv) + first + row, biased, epoch);
        } else {
          static_cast<float*>(u_.qkv)[first + row] = biased;
        }
      });
      this->signal(kProjected + group);
      done += rows;
    }
    this->template await_scale<false>(layer);  // as in vocabulary
    trace_.mark(TraceEvent::qkv_done);
  }

  template <bool kWhole, int kFaultCta, typename Ready>
  __device__ void up(Ready ready, int layer) {
    const SplitVector x = split_vector<S>(s_.vectors, S::kParallel ? 1 : 0);
    int done = 0;  // of the CTA's rows
#pragma unroll 1
    for (int group = 0; group < kHiddenGroups; group++) {
      const auto up_rows = this->up_rows();
      const int first = up_rows.first(group), rows = up_rows.count(group);
      const auto ready_once = [&] {
        if (group == 0) ready();
      };
      if constexpr (S::kGated) {  // a row and its gate may be other warps': the vector warps finish them
        float* sums = s_.up_sums + 2 * done;
        gemv_rows<HiddenTiles>(2 * rows, x, ready_once, [&](int row, float value) { sums[row] = value; });
        this->signal(kExpanded + group);
      } else {
        const float* biases = s_.biases + kUpBias + done;
        float kept = 0;
        int kept_row = -1;  // the activation takes one lane as long as all lanes
        gemv<W, HiddenTiles>(
            ring_, rows, x, lane_, ready_once, [&](int row, int, float value) { kept = value, kept_row = row; },
            [&] {
              if (kept_row < 0) return;
              this->template await_scale<!S::kParallel>(layer);
              const float h = activate<S::kActivation>(this->template scaled<!S::kParallel>(kept, biases[kept_row]));
              static_cast<W*>(u_.h)[first + kept_row] = from_float<W>(h);
              kept_row = -1;
            });
        this->signal(kExpanded + group);
        if (kWhole && (kFaultCta < 0 || this->cta_ != kFaultCta)) warp_done(group);
      }
      done += rows;
    }
    if constexpr (!S::kParallel && !S::kGated) this->template await_scale<true>(layer);
    trace_.mark(TraceEvent::up_done);
  }

  template <bool kCachedInside>
  __device__ void down(int layer) {
    const int rows = out_rows();
    const uint4* h_at = reinterpret_cast<const uint4*>(s_.vectors + kVectorBytes);
    trace_.mark(TraceEvent::down_tiles_wait);
    int group = 0;
    const auto brought = [&] {
      this->await(kHidden + group, layer);
      if (group == 0) begin(TraceEvent::down_tiles_begin);
    };
    if constexpr (kCachedInside) {
      const PackedVector<W> h{h_at};
      const int before = Base::rows_before_cached(rows);
      gemv_parts<DownTiles>(before, h, brought, s_.down_sums);
      cached();
      gemv_parts<DownTiles>(rows - before, h, Nothing(), s_.down_sums + before * DownTiles::kParts);
    } else {  // of every row the parts that a group of h is for, then those of the next one
#pragma unroll 1
      for (; group < kHiddenGroups; group++) {
        const PackedVector<W> h{h_at + group * (kGroupColumns / kVector)};
        gemv_parts<DownTiles, kGroupParts>(rows, h, brought, s_.down_sums + group * kGroupParts);
      }
    }
    trace_.mark(TraceEvent::down_tiles_done);
  }

  // This CTA's part of its bundle's cached tokens. Tile t goes to slot t % kWarps, whichever warp takes it.
  __device__ void cached() {
    trace_.mark(TraceEvent::cached_wait);
    if (this->works()) this->await_of_attended(kQueriesReady);
    trace_.mark(TraceEvent::cached_begin);
    if (this->works()) {
      typename Base::Warp mine(lane_, s_.query);
      int slot = -1;
      ring_.template tiles<S::kTileBytes>(this->cached_tiles(), [&](int tile, const char* data) {
        mine.add_tile(data, this->tile_tokens(tile));
        slot = tile % S::kWarps;
      });
      if (slot >= 0) mine.store(this->slots() + slot * Base::kPartialsFloats, Base::kPartial);
      this->signal(kPartialsReady);
    }
    trace_.mark(TraceEvent::cached_done);
  }

  // The last tile warp of the CTA to come here arrives for the CTA's part of a group of h. Its warps meet before any of them is
  // here again with that group.
  __device__ void warp_done(int group) {
    __syncwarp();
    if (lane_ == 0) {
      unsigned before;
      asm volatile("atom.acq_rel.cta.shared.add.u32 %0, [%1], 1;"
                   : "=r"(before)
                   : "r"(static_cast<unsigned>(__cvta_generic_to_shared(&s_.warps_done[group])))
                   : "memory");
      if ((before + 1) % S::kWarps == 0) grid_arrive(this->counter(kHiddenDone + group));
    }
  }

  // Rows that one lane can finish at once: calls out(row, value).
  template <typename Tiles, typename V, typename Ready, typename Out>
  __device__ void gemv_rows(int rows, const V& x, Ready ready, Out out) {
    static_assert(Tiles::kParts == 1, "hidden rows fit a stage");
    gemv<W, Tiles>(ring_, rows, x, lane_, ready, [&](int row, int, float value) { out(row, value); });
  }

  template <typename Tiles, int kParts = Tiles::kParts, int kSums = Tiles::kParts, typename V, typename Ready>
  __device__ void gemv_parts(int rows, const V& x, Ready ready, float* sums) {
    const auto out = [&](int row, int part, float value) { sums[row * kSums + part] = value; };
    gemv<W, Tiles, kParts>(ring_, rows, x, lane_, ready, out);
  }

  RingConsumer<typename Base::TileRing, Tracer::kOn> ring_;
  Tracer& trace_;
};

}  // namespace clusterfusion
