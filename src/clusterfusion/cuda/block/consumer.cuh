// The consumer warps' side of a decoder layer: norms, projections, attention, residual, and the waits in between.
#pragma once

#include "block/attend.cuh"
#include "block/residual.cuh"
#include "block/trace.cuh"

namespace clusterfusion {

// Where the counters stand once all have arrived for a layer.
struct LayerTargets {
  unsigned all_ctas, all_heads;
};

// kTrace: a Trace of trace.cuh, or NoTrace, which costs nothing.
template <typename S, typename Trace = NoTrace>
class LayerConsumer : public Attention<S> {
  using Base = Attention<S>;
  using typename Base::DownTiles;
  using typename Base::HiddenTiles;
  using typename Base::RingType;
  using typename Base::W;
  using Base::attends;
  using Base::block_sync;
  using Base::kBiases;
  using Base::kDownBias;
  using Base::kOutBias;
  using Base::kUpBias;
  using Base::kVectorBytes;
  using Base::lane_;
  using Base::local_;
  using Base::rows_from;
  using Base::rows_to;
  using Base::s_;
  using Base::u_;
  using Base::up_before;
  static constexpr int kQuads = S::kHidden / 4;
  static constexpr int kItems = (kQuads + S::kThreads - 1) / S::kThreads * 4;  // of a vector, elements a thread
  static constexpr bool kEarly = kItems <= 24;  // with more, what waits in registers would make them spill
  static constexpr int kBiasItems = (kBiases + S::kThreads - 1) / S::kThreads;

 public:
  using typename Base::Shared;

  __device__ LayerConsumer(const Workspace& workspace, int position, Shared& shared, Trace& trace)
      : Base(workspace, position, shared), ring_(shared.stages, shared.ring, this->warp_, lane_), trace_(trace) {}

  // One layer, or a segment of it. kFaultCta, for tests: that CTA never arrives for its part of h.
  template <Segment kSegment, int kFaultCta = -1, typename Residual>
  __device__ void run(const LayerTensors& w, const LayerCache& cache, Residual& residual, const LayerTargets& targets) {
    constexpr bool kWhole = kSegment == Segment::whole;
    const SplitVector x1 = split_vector(0), x2 = split_vector(1);
    const int up_first = rows_from(S::kIntermediate), up_rows = rows_to(S::kIntermediate) - up_first;
    const int up_early = kWhole && S::kParallel ? up_before(up_rows) : up_rows;
    const int out_first = rows_from(S::kHidden), out_rows = rows_to(S::kHidden) - out_first;
    trace_.mark(TraceEvent::begin);
    // Read before they are needed: each would cost the trip to memory behind a finished sum.
    float biases[kBiasItems];
    if constexpr (kEarly) load_biases(w, biases);
    const auto stage_biases = [&] {
      if constexpr (!kEarly) load_biases(w, biases);
      store_biases(biases);
    };

    if constexpr (runs<kSegment>(Segment::project)) {
      normalise<S::kParallel>(
          w.norm1_weight, w.norm1_bias, w, [&](float (&values)[kItems]) { residual.read_input(*this, values); },
          stage_biases);
      const int first = rows_from(S::kQkvRows), rows = rows_to(S::kQkvRows) - first;
      gemv_rows<HiddenTiles>(rows, x1, [&](int row, float value) { u_.qkv[first + row] = value + s_.biases[row]; });
      if constexpr (kWhole) this->warp_done(0, kQkvDone);
      trace_.mark(TraceEvent::qkv_done);
      if constexpr (S::kParallel) up(up_first, 0, up_early, x2);
    }
    if constexpr (runs<kSegment>(Segment::attend)) {
      if (attends()) {
        trace_.mark(TraceEvent::attention_wait);
        if constexpr (kWhole) this->wait(kQkvDone, targets.all_ctas);
        trace_.mark(TraceEvent::attention_begin);
        const bool tells = this->attend(ring_, cache);
        if (kWhole && tells && threadIdx.x == 0) grid_arrive(this->counter(kAttentionDone));
        trace_.mark(TraceEvent::attention_done);
      }
    }
    if constexpr (kWhole && S::kParallel) {
      up(up_first, up_early, up_rows, x2);
      hidden_done<kFaultCta>();
      trace_.mark(TraceEvent::up_done);
    }
    if constexpr (runs<kSegment>(Segment::output)) {
      trace_.mark(TraceEvent::output_wait);
      if constexpr (kWhole) this->wait(kAttentionDone, targets.all_heads);
      trace_.mark(TraceEvent::output_begin);
      this->load_attention(x1);
      if constexpr (!kWhole) stage_biases();
      block_sync();
      gemv_parts<HiddenTiles>(out_rows, x1, s_.o_sums);
      trace_.mark(TraceEvent::output_done);
    }
    if constexpr (!S::kParallel) {
      if constexpr (runs<kSegment>(Segment::output)) {
        block_sync();
        for (int row = threadIdx.x; row < out_rows; row += S::kThreads) {
          residual.write_middle(row, out_first + row, residual.input_row(row, out_first + row) + attention_row(row));
        }
        residual.middle_done(*this);
      }
      if constexpr (runs<kSegment>(Segment::expand)) {
        normalise<false>(
            w.norm2_weight, w.norm2_bias, w, [&](float (&values)[kItems]) { residual.read_middle(*this, values); },
            [&] { if constexpr (!kWhole) stage_biases(); }, 1);
        up(up_first, 0, up_rows, x2);
        if constexpr (kWhole) hidden_done<kFaultCta>();
        trace_.mark(TraceEvent::up_done);
      }
    }
    if constexpr (S::kParallel ? runs<kSegment>(Segment::output) : runs<kSegment>(Segment::contract)) {
      trace_.mark(TraceEvent::down_wait);
      if constexpr (kWhole) this->wait(kHiddenDone, targets.all_ctas);
      trace_.mark(TraceEvent::down_begin);
      uint4* hidden = reinterpret_cast<uint4*>(s_.vectors + kVectorBytes);
      for (int i = threadIdx.x; i < S::kIntermediate / kVector; i += S::kThreads) hidden[i] = __ldcg(static_cast<const uint4*>(u_.h) + i);
      if constexpr (!S::kParallel && !kWhole) stage_biases();
      block_sync();
      gemv_parts<DownTiles>(out_rows, PackedVector<W>{hidden}, s_.down_sums);
      trace_.mark(TraceEvent::down_done);
      block_sync();
      for (int row = threadIdx.x; row < out_rows; row += S::kThreads) {
        const int index = out_first + row;
        float value;
        if constexpr (S::kParallel) {
          value = residual.input_row(row, index) + attention_row(row);
        } else {
          value = residual.middle_row(row, index);
        }
        float mlp = s_.biases[kDownBias + row];
#pragma unroll
        for (int part = 0; part < DownTiles::kParts; part++) mlp += s_.down_sums[row * DownTiles::kParts + part];
        residual.write_output(row, index, value + mlp);
      }
    }
    if constexpr (Trace::kOn) trace_.record(TraceEvent::data_waited, ring_.take_waited());
    trace_.mark(TraceEvent::end);
  }

  // Final norm and LM head: calls out(index, logit) on one lane for each of this CTA's rows of the vocabulary.
  template <typename Residual, typename Out>
  __device__ void vocabulary(const void* norm_weight, const void* norm_bias, int vocabulary_rows, Residual& residual, Out out) {
    const LayerTensors none{};
    trace_.mark(TraceEvent::begin);
    normalise<false>(norm_weight, norm_bias, none, [&](float (&values)[kItems]) { residual.read_input(*this, values); }, [] {});
    const int first = rows_from(vocabulary_rows), rows = rows_to(vocabulary_rows) - first;
    gemv_rows<HiddenTiles>(rows, split_vector(0), [&](int row, float value) { out(first + row, value); });
    if constexpr (Trace::kOn) trace_.record(TraceEvent::data_waited, ring_.take_waited());
    trace_.mark(TraceEvent::end);
  }

 private:
  __device__ SplitVector split_vector(int which) const {
    float4* base = reinterpret_cast<float4*>(s_.vectors + which * kVectorBytes);
    return {base, base + S::kHidden / kVector};
  }

  template <int kFaultCta>
  __device__ void hidden_done() {
    if (kFaultCta < 0 || this->cta_ != kFaultCta) this->warp_done(1, kHiddenDone);
  }

  // This CTA's share of every bias vector, in the order of s_.biases.
  __device__ void load_biases(const LayerTensors& w, float (&biases)[kBiasItems]) const {
#pragma unroll
    for (int i = 0; i < kBiasItems; i++) {
      const int at = i * S::kThreads + threadIdx.x;
      biases[i] = at < kUpBias     ? bias(w.qkv_bias, S::kQkvRows, at)
                  : at < kOutBias  ? bias(w.up_bias, S::kIntermediate, at - kUpBias)
                  : at < kDownBias ? bias(w.o_bias, S::kHidden, at - kOutBias)
                  : at < kBiases   ? bias(w.down_bias, S::kHidden, at - kDownBias)
                                   : 0.0f;
    }
  }
  __device__ float bias(const void* vector, int all_rows, int row) const {
    const int index = rows_from(all_rows) + row;
    return index < rows_to(all_rows) ? load_or_zero<W>(vector, index) : 0.0f;
  }
  __device__ void store_biases(const float (&biases)[kBiasItems]) {
#pragma unroll
    for (int i = 0; i < kBiasItems; i++) {
      const int at = i * S::kThreads + threadIdx.x;
      if (at < kBiases) s_.biases[at] = biases[i];
    }
  }

  // What read(values) gives, normed into vector `to`; with kBoth by norm 1 into the first and by norm 2 into the second, from
  // the same statistics. Norm weights are asked for before read, which may wait; stage() runs before the last barrier, when
  // nobody of the CTA is still at work on what came before.
  template <bool kBoth, typename Read, typename Stage>
  __device__ void normalise(const void* weight, const void* bias, const LayerTensors& w, Read read, Stage stage, int to = 0) {
    typename Base::Block block(s_.block);
    typename Base::Reduce reduce(s_.reduce);
    Vector<W, 4> norm[kEarly ? kItems / 4 : 1][kBoth ? 4 : 2];
    float values[kItems];
    int valid = 0;
    const auto load_norm = [&](int quad, int i) {
      norm[i][0] = static_cast<const Vector<W, 4>*>(weight)[quad];
      norm[i][1] = static_cast<const Vector<W, 4>*>(bias)[quad];
      if constexpr (kBoth) {
        norm[i][2] = static_cast<const Vector<W, 4>*>(w.norm2_weight)[quad];
        norm[i][3] = static_cast<const Vector<W, 4>*>(w.norm2_bias)[quad];
      }
    };
    for_my_quads<S>(values, [&](int quad, float* at) {
      const int i = (at - values) / 4;
      if constexpr (kEarly) load_norm(quad, i);
      valid = 4 * i + 4;
    });
    read(values);
    trace_.mark(TraceEvent::residual_read);
    const NormTransform t = layer_norm_transform(values, valid, 1.0f / S::kHidden, u_.eps, local_, block, reduce);
    for_my_quads<S>(values, [&](int quad, const float* at) {
      const int i = kEarly ? (at - values) / 4 : 0;
      if constexpr (!kEarly) load_norm(quad, 0);
      split_vector(to).quad(quad) = normed(at, t, norm[i][0], norm[i][1]);
      if constexpr (kBoth) split_vector(1).quad(quad) = normed(at, t, norm[i][2], norm[i][3]);
    });
    stage();
    block_sync();
    trace_.mark(TraceEvent::normed);
  }

  static __device__ float4 normed(const float* values, NormTransform t, const Vector<W, 4>& weight, const Vector<W, 4>& bias) {
    float y[4];
#pragma unroll
    for (int k = 0; k < 4; k++) {
      y[k] = fmaf(fmaf(values[k], t.scale, t.shift), to_float(weight.element[k]), to_float(bias.element[k]));
    }
    return make_float4(y[0], y[1], y[2], y[3]);
  }

  // Rows whose parts, if any, one lane can finish at once: calls out(row, value).
  template <typename Tiles, typename V, typename Out>
  __device__ void gemv_rows(int rows, const V& x, Out out) {
    static_assert(Tiles::kParts == 1, "hidden rows fit a stage");
    gemv<W, Tiles>(ring_, rows, x, lane_, [&](int row, int, float value) { out(row, value); });
  }

  template <typename Tiles, typename V>
  __device__ void gemv_parts(int rows, const V& x, float* sums) {
    gemv<W, Tiles>(ring_, rows, x, lane_, [&](int row, int part, float value) { sums[row * Tiles::kParts + part] = value; });
  }

  __device__ void up(int first, int from, int to, const SplitVector& x) {
    gemv_rows<HiddenTiles>(to - from, x, [&](int row, float value) {
      const int own = from + row;
      static_cast<W*>(u_.h)[first + own] = from_float<W>(gelu<S::kGelu>(value + s_.biases[kUpBias + own]));
    });
  }

  __device__ float attention_row(int row) const {
    float value = s_.biases[kOutBias + row];
#pragma unroll
    for (int part = 0; part < HiddenTiles::kParts; part++) value += s_.o_sums[row * HiddenTiles::kParts + part];
    return value;
  }

  RingConsumer<RingType, Trace::kOn> ring_;
  Trace& trace_;
};

}  // namespace clusterfusion
