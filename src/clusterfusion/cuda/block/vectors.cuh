// The vector warps' side of a decoder layer: norms, attention, activations from other CTAs, residual, and the waits in between.
#pragma once

#include "block/attend.cuh"
#include "block/residual.cuh"
#include "block/trace.cuh"

namespace clusterfusion {

// Where the counters stand once all have arrived for a layer.
struct LayerTargets {
  unsigned all_ctas, all_heads;
};

// Tracer: a Trace of trace.cuh, or NoTrace, which costs nothing.
template <typename S, typename Tracer = NoTrace>
class VectorWarps : public Attention<S> {
  using Base = Attention<S>;
  using typename Base::DownTiles;
  using typename Base::HiddenTiles;
  using typename Base::W;
  using Base::block_sync;
  using Base::kBiases;
  using Base::kDownBias;
  using Base::kOutBias;
  using Base::kUpBias;
  using Base::kVectorBytes;
  using Base::local_;
  using Base::rows_from;
  using Base::rows_to;
  using Base::s_;
  using Base::thread_;
  using Base::u_;
  static constexpr int kThreads = S::kVectorThreads;
  static constexpr int kQuads = S::kHidden / 4;
  static constexpr int kItems = (kQuads + kThreads - 1) / kThreads * 4;  // of a vector, elements a thread
  static constexpr int kBiasItems = (kBiases + kThreads - 1) / kThreads;

 public:
  using typename Base::Shared;

  __device__ VectorWarps(
      const Workspace& workspace, const TensorMap& k_map, const TensorMap& v_map, int position, Shared& shared, Tracer& trace)
      : Base(workspace, k_map, v_map, position, shared), trace_(trace) {}

  // One layer, or a segment of it. `layer` counts those of a launch.
  template <Segment kSegment, typename Residual>
  __device__ void run(
      const LayerTensors& w, const KvCache& cache, Residual& residual, const LayerTargets& targets, int layer) {
    constexpr bool kWhole = kSegment == Segment::whole;
    const SplitVector x1 = split_vector<S>(s_.vectors, 0);
    const int out_first = rows_from(S::kHidden), out_rows = rows_to(S::kHidden) - out_first;
    trace_.mark(TraceEvent::begin);
    // Read before they are needed: each would cost the trip to memory behind a finished sum.
    float biases[kBiasItems];
    load_biases(w, biases);
    if constexpr (runs<kSegment>(Segment::attend)) this->fetch_ahead(layer);

    if constexpr (runs<kSegment>(Segment::project)) {
      normalise<S::kParallel>(
          w.norm1_weight, w.norm1_bias, w, [&](float (&values)[kItems]) { residual.read_input(*this, values); },
          [&] { store_biases(biases); });
      this->signal(kNormed);
      trace_.mark(TraceEvent::normed);
    }
    if constexpr (runs<kSegment>(Segment::attend)) {
      if (this->attends()) {
        trace_.mark(TraceEvent::attention_wait);
        if constexpr (kWhole) this->wait(kQkvDone, targets.all_ctas);
        trace_.mark(TraceEvent::attention_begin);
        const bool tells = this->attend(cache, layer);
        if (kWhole && tells && thread_ == 0) grid_arrive(this->counter(kAttentionDone));
        trace_.mark(TraceEvent::attention_done);
      }
    }
    if constexpr (runs<kSegment>(Segment::output)) {
      trace_.mark(TraceEvent::output_wait);
      if constexpr (kWhole) this->wait(kAttentionDone, targets.all_heads);
      trace_.mark(TraceEvent::output_begin);
      this->load_attention(x1);
      this->signal(kAttended);
      trace_.mark(TraceEvent::output_ready);
      if constexpr (!kWhole) store_biases(biases), block_sync();
    }
    if constexpr (!S::kParallel) {
      if constexpr (runs<kSegment>(Segment::output)) {
        this->await(kOutputSums, layer);
        for (int row = thread_; row < out_rows; row += kThreads) {
          residual.write_middle(row, out_first + row, residual.input_row(row, out_first + row) + attention_row(row));
        }
        residual.middle_done(*this);
      }
      if constexpr (runs<kSegment>(Segment::expand)) {
        normalise<false>(
            w.norm2_weight, w.norm2_bias, w, [&](float (&values)[kItems]) { residual.read_middle(*this, values); },
            [&] { if constexpr (!kWhole) store_biases(biases); }, 1);
        this->signal(kMiddleNormed);
      }
    }
    if constexpr (S::kParallel ? runs<kSegment>(Segment::output) : runs<kSegment>(Segment::contract)) {
      trace_.mark(TraceEvent::down_wait);
      if constexpr (kWhole) this->wait(kHiddenDone, targets.all_ctas);
      trace_.mark(TraceEvent::down_begin);
      uint4* hidden = reinterpret_cast<uint4*>(s_.vectors + kVectorBytes);
      for (int i = thread_; i < S::kIntermediate / kVector; i += kThreads) hidden[i] = __ldcg(static_cast<const uint4*>(u_.h) + i);
      this->signal(kHidden);
      trace_.mark(TraceEvent::down_ready);
      if constexpr (!S::kParallel && !kWhole) store_biases(biases), block_sync();
      trace_.mark(TraceEvent::sums_wait);
      this->await(kDownSums, layer);
      for (int row = thread_; row < out_rows; row += kThreads) {
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
      trace_.mark(TraceEvent::published);
    }
  }

  // The final norm, for the LM head's rows.
  template <typename Residual>
  __device__ void final_norm(const void* weight, const void* bias, Residual& residual) {
    trace_.mark(TraceEvent::begin);
    normalise<false>(
        weight, bias, LayerTensors{}, [&](float (&values)[kItems]) { residual.read_input(*this, values); }, [] {});
    this->signal(kNormed);
    trace_.mark(TraceEvent::normed);
  }

 private:
  // This CTA's share of every bias vector, in the order of s_.biases.
  __device__ void load_biases(const LayerTensors& w, float (&biases)[kBiasItems]) const {
#pragma unroll
    for (int i = 0; i < kBiasItems; i++) {
      const int at = i * kThreads + thread_;
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
      const int at = i * kThreads + thread_;
      if (at < kBiases) s_.biases[at] = biases[i];
    }
  }

  // What read(values) gives, normed into vector `to`; with kBoth by norm 1 into the first and by norm 2 into the second, from
  // the same statistics. Norm weights are asked for before read, which may wait. stage() runs behind the sums' barriers, when
  // nobody of the vector warps is still at work on what came before.
  template <bool kBoth, typename Read, typename Stage>
  __device__ void normalise(const void* weight, const void* bias, const LayerTensors& w, Read read, Stage stage, int to = 0) {
    typename Base::Block block(s_.block);
    typename Base::Reduce reduce(s_.reduce);
    constexpr bool kEarly = kItems <= 16;  // with more, norm weights that wait in registers would make them spill
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
      split_vector<S>(s_.vectors, to).quad(quad) = normed(at, t, norm[i][0], norm[i][1]);
      if constexpr (kBoth) split_vector<S>(s_.vectors, 1).quad(quad) = normed(at, t, norm[i][2], norm[i][3]);
    });
    stage();
  }

  static __device__ float4 normed(const float* values, NormTransform t, const Vector<W, 4>& weight, const Vector<W, 4>& bias) {
    float y[4];
#pragma unroll
    for (int k = 0; k < 4; k++) {
      y[k] = fmaf(fmaf(values[k], t.scale, t.shift), to_float(weight.element[k]), to_float(bias.element[k]));
    }
    return make_float4(y[0], y[1], y[2], y[3]);
  }

  __device__ float attention_row(int row) const {
    float value = s_.biases[kOutBias + row];
#pragma unroll
    for (int part = 0; part < HiddenTiles::kParts; part++) value += s_.o_sums[row * HiddenTiles::kParts + part];
    return value;
  }

  Tracer& trace_;
};

}  // namespace clusterfusion
